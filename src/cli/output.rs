//! Where files go, and that an interrupt never leaves half of one.

use std::collections::HashMap;
use std::fs;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

pub use super::console::print_line;
pub use megafuse::image::is_part;
use megafuse::image::write_atomically;
use megafuse::{Error, Result};

use super::INTERRUPTED;
use super::console::{self, say};

/// Held while a file is written, so that an interrupt waits for the file to be complete.
static WRITING: Mutex<()> = Mutex::new(());
/// Files that this run has completed and named.
static WRITTEN: AtomicUsize = AtomicUsize::new(0);
/// What an interrupt says beside what is complete.
static ADVICE: Mutex<&str> = Mutex::new("");
/// Folders that this run has made, parents first.
static MADE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A folder that an interrupt removes, with all that is in it.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// From now on an interrupt removes this folder, with all that is in it.
pub fn remove_on_interrupt(folder: PathBuf) {
    *UNFINISHED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(folder);
}

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
            0 => say!("\ninterrupted; nothing was written{advice}"),
            files => say!("\ninterrupted; the {files} file(s) named above are complete{advice}"),
        }
        if let Some(folder) = UNFINISHED.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
            let _ = fs::remove_dir_all(folder);
        }
        remove_made_folders();
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
    if is_stdout(path) {
        console::write_file(bytes)
    } else if is_special(path) {
        let written = fs::OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(bytes));
        written.map_err(|error| Error::io(path, error))
    } else {
        // Through a link to the file behind it, which is what is replaced.
        write_atomically(&behind(path)?, |file| file.write_all(bytes))
    }
}

/// `-`, or another name of what standard output is, such as /dev/stdout.
pub fn is_stdout(path: &Path) -> bool {
    path == Path::new("-") || is_open_as_stdout(path)
}

#[cfg(unix)]
fn is_open_as_stdout(path: &Path) -> bool {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    let place = |file: fs::Metadata| (file.dev(), file.ino());
    // What goes to /dev/null may be of any number of files.
    let Ok(named) = fs::metadata(path).map(place) else { return false };
    let stdout = io::stdout().as_fd().try_clone_to_owned().and_then(|file| fs::File::from(file).metadata()).map(place);
    stdout.is_ok_and(|stdout| stdout == named) && fs::metadata("/dev/null").map(place).is_ok_and(|null| null != named)
}

#[cfg(not(unix))]
fn is_open_as_stdout(_path: &Path) -> bool {
    false
}

/// A device or pipe, such as /dev/null: written into, never replaced.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

/// A folder, or named as one: `new/` is a folder also before it is made.
pub fn is_folder(path: &Path) -> bool {
    path.is_dir()
        || path.as_os_str().as_encoded_bytes().last().is_some_and(|&byte| std::path::is_separator(byte.into()))
}

/// Where a symbolic link leads, also to a file that is not there yet.
///
/// # Errors
/// [`Error::File`]: links that lead to each other.
fn behind(path: &Path) -> Result<PathBuf> {
    const MOST_LINKS: usize = 40; // Linux follows as many
    let mut place = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&place) {
            Ok(target) => place = folder(&place).join(target),
            Err(_) => return Ok(place),
        }
    }
    Err(Error::file(path, "is a symbolic link that leads in a circle"))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Can `path` be written? Found out before the computing starts, not after an hour of it, by doing what writing it will
/// do: its folder is made where it is missing, and a file of that name. An existing file stays as it is. For standard
/// output, which then carries nothing else: is it no terminal?
///
/// # Errors
/// [`Error::File`]: `path` is a folder, or why it cannot be written.
pub fn check_writable(path: &Path) -> Result<()> {
    if is_stdout(path) {
        if io::stdout().is_terminal() {
            let reason = "is standard output, a terminal here; send it to a file or a program, or name a file";
            return Err(Error::file(path, reason));
        }
        console::keep_for_a_file();
        return Ok(());
    }
    if is_folder(path) {
        return Err(Error::file(path, "is a folder, a file name is needed"));
    }
    if is_special(path) {
        return check_special(path);
    }
    let place = behind(path)?;
    make_folder(folder(&place)).map_err(|reason| Error::file(path, reason))?;
    let fails = |error: io::Error| Error::file(path, format!("cannot be written: {error}"));
    match fs::symlink_metadata(&place) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let made = fs::OpenOptions::new().write(true).create_new(true).open(&place);
            drop(made.map_err(fails)?);
            fs::remove_file(&place).map_err(fails)
        }
        other => other.map(drop).map_err(fails),
    }
}

/// A pipe is not opened: that would wait for its reader.
fn check_special(path: &Path) -> Result<()> {
    #[cfg(unix)]
    if fs::metadata(path).is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_fifo(&metadata.file_type())) {
        return Ok(());
    }
    let opened = fs::OpenOptions::new().write(true).open(path);
    opened.map(drop).map_err(|error| Error::file(path, format!("cannot be written: {error}")))
}

/// Can files be made in this folder? It is made itself where it is missing, with its parents.
///
/// # Errors
/// [`Error::File`]: why it cannot be made or written.
pub fn check_folder(folder: &Path) -> Result<()> {
    make_folder(folder).map_err(|reason| Error::file(folder, reason))
}

fn make_folder(folder: &Path) -> std::result::Result<(), String> {
    if !folder.is_dir() {
        let missing = folder.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let missing: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
        let mut made = MADE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let done = fs::create_dir_all(folder);
        made.extend(missing.into_iter().rev());
        done.map_err(|error| format!("the folder {} cannot be made: {error}", folder.display()))?;
    }
    let temporary = tempfile::tempfile_in(folder);
    temporary.map(drop).map_err(|error| format!("the folder {} cannot be written: {error}", folder.display()))
}

/// A run that ends without a file leaves no folder either. Folders with something in them stay.
pub fn remove_made_folders() {
    let mut made = MADE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    for folder in made.drain(..).rev() {
        let _ = fs::remove_dir(folder);
    }
}

/// The files that a run will write: each can be written, and no two are one.
#[derive(Default)]
pub struct Outputs {
    /// Flag and path of each file, by where it really is; `None`: standard output.
    files: HashMap<Option<PathBuf>, String>,
    /// The same by folder and stem, with and without a number at its end: a default name could be that one.
    stems: HashMap<(PathBuf, String), String>,
    /// Folders and stems of pictures that get the first free name.
    free: HashMap<(PathBuf, String), String>,
}

impl Outputs {
    /// # Errors
    /// As [`check_writable`]; [`Error::Request`]: another output is the same file, by whatever name.
    pub fn file(&mut self, flag: &'static str, path: &Path) -> Result<()> {
        check_writable(path)?;
        let refuse = |reason: String| Err(Error::Request { field: flag, value: path.display().to_string(), reason });
        let place = match is_stdout(path) {
            true => None,
            false if is_special(path) => return Ok(()),
            false => Some(place_of(&behind(path)?)?),
        };
        let name = format!("{flag} {}", path.display());
        if let Some(other) = self.files.insert(place.clone(), name.clone()) {
            return refuse(format!("is the same file as {other}"));
        }
        for stem in place.iter().flat_map(|place| default_stems(place)) {
            if let Some(other) = self.free.get(&stem) {
                return refuse(format!("could be the default name of {other}; name another file"));
            }
            self.stems.insert(stem, name.clone());
        }
        Ok(())
    }

    /// # Errors
    /// As [`Outputs::file`].
    pub fn target(&mut self, flag: &'static str, target: &Target) -> Result<()> {
        target.check()?;
        match target {
            Target::Chosen(path) => self.file(flag, path),
            Target::Free { folder, stem } => {
                let place = fs::canonicalize(folder).map_err(|error| Error::io(folder, error))?;
                let key = (place, stem.clone());
                let name = format!("{flag} {}", folder.join(default_name(stem, 1)).display());
                if let Some(other) = self.stems.get(&key) {
                    let reason = format!("could be the same file as {other}; name another file");
                    return Err(Error::Request { field: flag, value: folder.display().to_string(), reason });
                }
                self.free.insert(key, name);
                Ok(())
            }
        }
    }
}

/// A file's name in its real folder, which is there.
fn place_of(path: &Path) -> Result<PathBuf> {
    let folder = fs::canonicalize(folder(path)).map_err(|error| Error::io(path, error))?;
    Ok(folder.join(path.file_name().unwrap_or_default()))
}

/// Of which stems could this be a default name? `a/b-2.png`: of `b-2` and `b`.
fn default_stems(place: &Path) -> Vec<(PathBuf, String)> {
    let name = place.file_name().unwrap_or_default().to_string_lossy();
    let Some(stem) = name.strip_suffix(".png") else { return Vec::new() };
    let unnumbered = stem.rsplit_once('-').filter(|(_, number)| number.parse::<u64>().is_ok()).map(|(stem, _)| stem);
    [stem].into_iter().chain(unnumbered).map(|stem| (folder(place).to_path_buf(), stem.to_string())).collect()
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
            Some(path) if is_folder(&path) => Target::Free { folder: path, stem: stem.into() },
            Some(path) => Target::Chosen(path),
        }
    }

    /// Where another picture goes beside this one: `a.png` with the suffix `-phase1` is `a-phase1.png`. `None` beside standard
    /// output.
    pub fn beside(&self, suffix: &str) -> Option<Target> {
        match self {
            Target::Chosen(path) if is_stdout(path) => None,
            Target::Chosen(path) => {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy();
                Some(Target::Chosen(path.with_file_name(format!("{stem}{suffix}.png"))))
            }
            Target::Free { folder, stem } => {
                Some(Target::Free { folder: folder.clone(), stem: format!("{stem}{suffix}") })
            }
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
    if is_folder(path) { path.to_path_buf() } else { numbered(path, index, count) }
}

/// # Errors
/// [`Error::Request`]: the name after `flag` ends like no PNG's.
pub fn check_png(flag: &'static str, path: Option<&Path>) -> Result<()> {
    match path {
        Some(path) if !is_folder(path) && path.extension().is_some_and(|e| !e.eq_ignore_ascii_case("png")) => {
            let reason = "pictures are written as PNG; give a name that ends in .png";
            Err(Error::Request { field: flag, value: path.display().to_string(), reason: reason.into() })
        }
        _ => Ok(()),
    }
}

/// `a/b.png` as picture 2 of 12: `a/b-02.png`; of 1: as it is.
pub fn numbered(path: &Path, index: usize, count: usize) -> PathBuf {
    if count == 1 || is_stdout(path) {
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

/// The name of a file that was written, on standard output, unless the file itself went there.
pub fn print_name(path: &Path) {
    if !is_stdout(path) {
        print_line(path.display());
    }
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
    fn names_beside_a_picture() {
        let beside = |out: Option<&Path>| Target::picture(out, 1, 2, 8).beside("-phase1");
        assert_eq!(beside(Some(Path::new("a/b.png"))), Some(Target::Chosen("a/b-2-phase1.png".into())));
        let stem = "megafuse-8-phase1".into();
        assert_eq!(beside(None), Some(Target::Free { folder: ".".into(), stem }));
        assert_eq!(beside(Some(Path::new("-"))), None);
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
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = check_writable(&file.join("a.png")).unwrap_err().to_string();
        assert!(error.contains("cannot be made"), "{error}");
        fs::remove_file(file).unwrap();
        let error = check_writable(&folder.path().join(format!("{}.png", "x".repeat(300)))).unwrap_err().to_string();
        assert!(error.contains("cannot be written"), "{error}");
        let error = check_writable(folder.path()).unwrap_err().to_string();
        assert!(error.contains("is a folder"), "{error}");
        check_writable(&folder.path().join("a.png")).unwrap();
        assert!(names(folder.path()).is_empty());
    }
}
