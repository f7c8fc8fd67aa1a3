//! Where files go, and that an interrupt never leaves half of one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

pub use megafuse::image::is_part;
use megafuse::image::write_atomically;
use megafuse::{Error, Result};

use super::INTERRUPTED;

/// Held while a file is written, so that an interrupt waits for the file to be complete.
static WRITING: Mutex<()> = Mutex::new(());
/// Files that this run has completed and named.
static WRITTEN: AtomicUsize = AtomicUsize::new(0);
/// What an interrupt says beside what is complete.
static ADVICE: Mutex<&str> = Mutex::new("");

/// From now on an interrupt also says this.
pub fn advise_on_interrupt(advice: &'static str) {
    *ADVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = advice;
}

/// From now on Ctrl-C ends the program at once, wherever it is, except inside a write.
///
/// # Errors
/// When the system refuses a handler.
pub fn end_at_once_on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        let _complete = lock();
        let advice = *ADVICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The newline leaves the terminal's "^C" and the progress line alone.
        match WRITTEN.load(Ordering::Relaxed) {
            0 => eprintln!("\ninterrupted; nothing was written{advice}"),
            files => eprintln!("\ninterrupted; the {files} file(s) named above are complete{advice}"),
        }
        std::process::exit(i32::from(INTERRUPTED));
    })
    .map_err(|error| Error::config("Ctrl-C", format!("the system refuses a handler: {error}")))
}

fn lock() -> MutexGuard<'static, ()> {
    WRITING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Writes `path` whole; what was there stays until the new file is complete.
///
/// # Errors
/// Those of [`write_atomically`]; [`Error::Io`] naming `path`.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let _writing = lock();
    write_locked(path, bytes)?;
    WRITTEN.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

/// The same for a file that the run does not name.
///
/// # Errors
/// As [`replace`].
pub fn replace_unnamed(path: &Path, bytes: &[u8]) -> Result<()> {
    let _writing = lock();
    write_locked(path, bytes)
}

/// Adds a line to a file, which is made if need be.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn append_line(path: &Path, line: &str) -> Result<()> {
    let _writing = lock();
    let file = fs::OpenOptions::new().append(true).create(true).open(path);
    // In one call, so that the file never has half a line.
    let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    written.map_err(|error| Error::io(path, error))
}

/// Removes every file of `folder` that a killed run left half-written. Nobody may be writing there.
pub fn remove_parts(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_part(&entry.file_name().to_string_lossy())) {
        // What cannot be removed does no harm but to the eye.
        let _ = fs::remove_file(entry.path());
    }
}

fn write_locked(path: &Path, bytes: &[u8]) -> Result<()> {
    if is_special(path) {
        let written = fs::OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(bytes));
        written.map_err(|error| Error::io(path, error))?;
    } else {
        // Through a link to the file behind it, which is what is replaced.
        let behind = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        write_atomically(&behind, |file| file.write_all(bytes))?;
    }
    Ok(())
}

/// A device or pipe, such as /dev/null: written into, never replaced.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Can `path` be written? Asked before the computing starts, not after an hour of it.
///
/// # Errors
/// [`Error::File`]: the folder is missing or not writable, or `path` is a folder itself.
pub fn check_writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::file(path, "is a folder, a file name is needed"));
    }
    if is_special(path) {
        return Ok(());
    }
    let folder = folder(path);
    if !folder.is_dir() {
        return Err(Error::file(path, format!("the folder {} does not exist; create it first", folder.display())));
    }
    tempfile::tempfile_in(folder)
        .map(drop)
        .map_err(|error| Error::file(path, format!("the folder {} cannot be written: {error}", folder.display())))
}

/// Where `--out` and `--dump` go, one path per picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A name that the user chose: replaced.
    Chosen(PathBuf),
    /// `STEM.png` in this folder, or the first of `STEM-2.png`, ... that is free.
    Free { folder: PathBuf, stem: String },
}

impl Target {
    /// For picture `index` (from 0) of `count`.
    pub fn picture(out: Option<&Path>, index: usize, count: usize, seed: u64) -> Target {
        Target::named(out.map(|path| numbered_file(path, index, count)), &format!("megafuse-{seed}"))
    }

    /// `out`, or a free name with this stem, in the folder `out` or the current one.
    pub fn named(out: Option<PathBuf>, stem: &str) -> Target {
        match out {
            None => Target::Free { folder: PathBuf::from("."), stem: stem.into() },
            Some(path) if path.is_dir() => Target::Free { folder: path, stem: stem.into() },
            Some(path) => Target::Chosen(path),
        }
    }

    /// # Errors
    /// As [`check_writable`].
    pub fn check(&self) -> Result<()> {
        match self {
            Target::Chosen(path) => check_writable(path),
            Target::Free { folder, stem } => check_writable(&folder.join(default_name(stem, 1))),
        }
    }

    /// Writes the file; returns where it went.
    ///
    /// # Errors
    /// As [`replace`].
    pub fn write(&self, bytes: &[u8]) -> Result<PathBuf> {
        let _writing = lock();
        let path = match self {
            Target::Chosen(path) => path.clone(),
            Target::Free { folder, stem } => {
                let here = folder == Path::new(".");
                let place = |name: String| if here { PathBuf::from(name) } else { folder.join(name) };
                let mut names = (1u64..).map(|number| place(default_name(stem, number)));
                names.find(|path| fs::symlink_metadata(path).is_err()).expect("there are more names than files")
            }
        };
        write_locked(&path, bytes)?;
        WRITTEN.fetch_add(1, Ordering::Relaxed);
        Ok(path)
    }
}

fn default_name(stem: &str, number: u64) -> String {
    match number {
        1 => format!("{stem}.png"),
        _ => format!("{stem}-{number}.png"),
    }
}

/// [`numbered`], unless `path` is a folder.
fn numbered_file(path: &Path, index: usize, count: usize) -> PathBuf {
    if path.is_dir() { path.to_path_buf() } else { numbered(path, index, count) }
}

/// # Errors
/// [`Error::Request`]: the name after `flag` ends like no PNG's.
pub fn check_png(flag: &'static str, path: Option<&Path>) -> Result<()> {
    match path {
        Some(path) if !path.is_dir() && path.extension().is_some_and(|e| !e.eq_ignore_ascii_case("png")) => {
            let reason = "pictures are written as PNG; give a name that ends in .png";
            Err(Error::Request { flag, value: path.display().to_string(), reason: reason.into() })
        }
        _ => Ok(()),
    }
}

/// `a/b.png` as picture 2 of 12: `a/b-02.png`; of 1: as it is.
pub fn numbered(path: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_path_buf();
    }
    let width = count.to_string().len();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = match path.extension() {
        Some(extension) => format!("{stem}-{:0width$}.{}", index + 1, extension.to_string_lossy()),
        None => format!("{stem}-{:0width$}", index + 1),
    };
    path.with_file_name(name)
}

/// A line on standard output; a closed pipe is not an error of ours.
pub fn print_line(line: impl std::fmt::Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn numbered_names() {
        assert_eq!(numbered(Path::new("a/b.png"), 0, 1), Path::new("a/b.png"));
        assert_eq!(numbered(Path::new("a/b.c.png"), 1, 3), Path::new("a/b.c-2.png"));
        assert_eq!(numbered(Path::new("b.png"), 1, 12), Path::new("b-02.png"));
        assert_eq!(numbered(Path::new("dump"), 9, 10), Path::new("dump-10"));
    }

    #[test]
    fn a_chosen_name_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        fs::write(&path, "old").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["a.png"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_devices_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("a.png"), folder.path().join("link.png"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        replace(&link, b"new").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        replace(Path::new("/dev/null"), b"new").unwrap();
        assert!(is_special(Path::new("/dev/null")));
    }

    #[test]
    fn default_names_never_replace() {
        let folder = tempfile::tempdir().unwrap();
        let target = Target::picture(Some(folder.path()), 0, 1, 7);
        for _ in 0..3 {
            target.write(b"").unwrap();
        }
        assert_eq!(names(folder.path()), ["megafuse-7-2.png", "megafuse-7-3.png", "megafuse-7.png"]);
    }

    #[test]
    fn unwritable_places() {
        let folder = tempfile::tempdir().unwrap();
        let error = check_writable(&folder.path().join("no/such/a.png")).unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
        let error = check_writable(folder.path()).unwrap_err().to_string();
        assert!(error.contains("is a folder"), "{error}");
        check_writable(&folder.path().join("a.png")).unwrap();
        assert!(names(folder.path()).is_empty());
    }
}
