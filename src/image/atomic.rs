use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes a file whole or not at all: into a temporary file of the same folder, flushed to the disk, then renamed over
/// `path`. When `write` or anything else fails, the temporary file is removed and an older `path` is as it was.
///
/// # Errors
/// [`Error::File`] naming `path`: its folder does not exist or is no folder, no permission, no space, `path` is a folder;
/// [`Error::Io`] for anything rarer.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(Error::file(path, "is a folder; name a file to write")),
    };
    if path.is_dir() || path.file_name().is_none() {
        return Err(Error::file(path, "is a folder; name a file to write"));
    }
    if !folder.is_dir() {
        let what = if folder.exists() { "is not a folder" } else { "does not exist" };
        return Err(Error::file(path, format!("the folder {} {what}; create it or write elsewhere", folder.display())));
    }
    let failed = |error: io::Error| explain(path, folder, error);
    let mut temporary = temporary_in(folder).map_err(failed)?;
    let mut buffered = BufWriter::new(temporary.as_file_mut());
    write(&mut buffered).and_then(|()| buffered.flush()).map_err(failed)?;
    drop(buffered);
    temporary.as_file().sync_all().map_err(failed)?;
    temporary.persist(path).map_err(|error| failed(error.error))?;
    // The file is there; whether its name survives a power cut is up to the folder, which not every system can flush.
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// What the temporary files of [`write_atomically`] are called, with letters between the two.
const PART: (&str, &str) = (".megafuse-", ".part");

/// Is this the name of a file that [`write_atomically`] has not finished? A killed program leaves one.
pub fn is_part(name: &str) -> bool {
    name.starts_with(PART.0) && name.ends_with(PART.1)
}

/// A hidden file that removes itself, with the permissions that any new file would get.
fn temporary_in(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PART.0).suffix(PART.1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // less the umask
    }
    builder.tempfile_in(folder)
}

fn explain(path: &Path, folder: &Path, error: io::Error) -> Error {
    let folder = folder.display();
    match error.kind() {
        ErrorKind::PermissionDenied => {
            Error::file(path, format!("no permission to write into the folder {folder}; write elsewhere"))
        }
        ErrorKind::ReadOnlyFilesystem => {
            Error::file(path, format!("the folder {folder} is on a read-only file system; write elsewhere"))
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Error::file(path, format!("no space left in the folder {folder} ({error}); nothing was written"))
        }
        _ => Error::io(path, error),
    }
}
