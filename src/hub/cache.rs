use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::name::{is_commit, is_segment};
use super::{HubName, HubObserver, HubSettings, cache_error};
use crate::error::{Error, Result};

/// A model's folder in the cache.
pub(crate) struct Repository {
    /// `models--ORG--NAME`
    folder: PathBuf,
    /// `.locks/models--ORG--NAME`
    locks: PathBuf,
    lock_patience: Duration,
}

/// Links made by this process: each is made under a name of its own.
static LINKS: AtomicU64 = AtomicU64::new(0);

/// What a snapshot has of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// With its size in bytes.
    There(u64),
    /// A link to a blob that is gone.
    Dangling,
    Missing,
}

/// Held while a blob is fetched; the system frees it when the process ends, however it ends.
pub(super) struct Lock {
    /// `None`: the file system knows no locks.
    file: Option<File>,
}

impl Lock {
    pub fn is_exclusive(&self) -> bool {
        self.file.is_some()
    }
}

impl Repository {
    pub fn new(name: &HubName, settings: &HubSettings) -> Repository {
        // Links are made relative to it, wherever the program is started.
        let cache = std::path::absolute(&settings.cache).unwrap_or_else(|_| settings.cache.clone());
        let folder = cache.join(name.folder());
        let locks = cache.join(".locks").join(name.folder());
        Repository { folder, locks, lock_patience: settings.lock_patience }
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit of `name`'s revision as far as the cache knows, with its snapshot there.
    ///
    /// # Errors
    /// [`Error::Hub`]: the cache has nothing of this model or revision; a ref that names no snapshot, or is no commit.
    pub fn cached_commit(&self, name: &HubName) -> Result<String> {
        let refuse = |reason: String| Err(Error::Hub { name: name.to_string(), reason });
        if !self.folder.is_dir() {
            return refuse(format!("it is not in the cache ({})", self.folder.display()));
        }
        let place = self.folder.join("refs").join(name.revision());
        let commit = match name.commit() {
            Some(commit) => commit.to_string(),
            None => match fs::read_to_string(&place) {
                Ok(text) => text.trim().to_string(),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    match (&name.revision, self.snapshots().as_slice()) {
                        (None, [only]) => only.clone(),
                        _ => return refuse(format!("the cache has no revision {} of it", name.revision())),
                    }
                }
                Err(error) if error.kind() == ErrorKind::InvalidData => String::new(),
                Err(error) => return Err(Error::io(&place, error)),
            },
        };
        if !is_commit(&commit) && name.revision.is_none() && self.snapshots() == [commit.clone()] {
            return Ok(commit); // made by hand, not by the hub
        }
        if !is_commit(&commit) {
            let shown: String = commit.chars().take(60).collect();
            return refuse(format!("{} holds {shown:?}, which is no commit; remove this file", place.display()));
        }
        match self.snapshot(&commit).is_dir() {
            true => Ok(commit),
            false if name.commit().is_some() => refuse(format!("the cache has no revision {commit} of it")),
            false => refuse(format!("{} names the snapshot {commit}, which is not there", place.display())),
        }
    }

    fn snapshots(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.join("snapshots")).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.path().is_dir())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// `path`: in the snapshot, with slashes.
    pub fn presence(&self, commit: &str, path: &str) -> Presence {
        let place = self.snapshot(commit).join(path);
        match fs::metadata(&place) {
            Ok(found) if found.is_file() => Presence::There(found.len()),
            Ok(_) => Presence::Missing,
            Err(_) if fs::symlink_metadata(&place).is_ok() => Presence::Dangling,
            Err(_) => Presence::Missing,
        }
    }

    /// Every file of a snapshot, dangling links among them; paths with slashes, sorted.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let (mut files, mut folders) = (Vec::new(), vec![(self.snapshot(commit), String::new())]);
        while let Some((folder, inside)) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let name = format!("{inside}{}", entry.file_name().to_string_lossy());
                match entry.path().is_dir() {
                    true => folders.push((entry.path(), format!("{name}/"))),
                    false => files.push(name),
                }
            }
        }
        files.sort();
        files
    }

    /// Where the bytes of a file are when they are whole.
    pub fn blob(&self, id: &str) -> PathBuf {
        self.folder.join("blobs").join(id)
    }

    /// Where a blob grows. Without a lock every process has a place of its own.
    pub(super) fn incomplete(&self, id: &str, lock: &Lock) -> PathBuf {
        let own = if lock.is_exclusive() { String::new() } else { format!(".{}", std::process::id()) };
        self.folder.join("blobs").join(format!("{id}{own}.incomplete"))
    }

    /// Waits for another process as long as the blob that it fetches grows.
    ///
    /// # Errors
    /// [`Error::File`]: it does not grow; those of the system.
    pub(super) fn lock(&self, id: &str, what: &str, observer: &mut dyn HubObserver) -> Result<Lock> {
        for folder in [&self.locks, &self.folder.join("blobs")] {
            fs::create_dir_all(folder).map_err(|error| cache_error(folder, error))?;
        }
        let path = self.locks.join(format!("{id}.lock"));
        let file = File::options().create(true).append(true).open(&path).map_err(|error| cache_error(&path, error))?;
        let size =
            || fs::metadata(self.folder.join("blobs").join(format!("{id}.incomplete"))).map_or(0, |file| file.len());
        let (mut told, mut last, mut since) = (false, size(), Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { file: Some(file) }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    return Ok(Lock { file: None });
                }
                Err(TryLockError::Error(error)) => return Err(cache_error(&path, error)),
            }
            if !std::mem::replace(&mut told, true) {
                observer.warning(&format!("another process is fetching {what}; waiting for it"));
            }
            let now = size();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            if since.elapsed() >= self.lock_patience {
                let seconds = self.lock_patience.as_secs();
                let reason = format!(
                    "another process holds this lock, and {what} has not grown for {seconds} s; end that process and try again"
                );
                return Err(Error::file(&path, reason));
            }
            std::thread::sleep(Duration::from_millis(100).min(self.lock_patience));
        }
    }

    /// Puts a blob that is whole into a snapshot, in one step: nobody sees half a link.
    ///
    /// # Errors
    /// Those of the system.
    pub fn link(&self, commit: &str, path: &str, id: &str) -> Result<()> {
        let place = self.snapshot(commit).join(path);
        let folder = place.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(|error| cache_error(folder, error))?;
        let up = "../".repeat(2 + path.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{id}"));
        if fs::read_link(&place).is_ok_and(|found| found == target) {
            return Ok(());
        }
        let number = LINKS.fetch_add(1, Ordering::Relaxed);
        let new = folder.join(format!(".{id}.{}-{number}.link", std::process::id()));
        let _ = fs::remove_file(&new); // of a process that had this number before
        symlink(&target, &self.blob(id), &new).map_err(|error| cache_error(&place, error))?;
        fs::rename(&new, &place).map_err(|error| {
            let _ = fs::remove_file(&new);
            cache_error(&place, error)
        })
    }

    /// Remembers where a revision is; a commit needs no memory.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set_ref(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.folder.join("refs").join(revision);
        if is_commit(revision) || fs::read_to_string(&path).is_ok_and(|found| found == commit) {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(|error| cache_error(folder, error))?;
        crate::image::write_atomically(&path, |file| file.write_all(commit.as_bytes()))
    }

    /// Is it known where this revision is?
    pub fn has_ref(&self, revision: &str) -> bool {
        self.folder.join("refs").join(revision).is_file()
    }
}

/// A file's name that a server sent may become a path.
pub(super) fn is_inside(path: &str) -> bool {
    path.split('/').all(is_segment)
}

#[cfg(unix)]
fn symlink(target: &Path, _blob: &Path, place: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, place)
}

/// Links need a permission on Windows; without it a second name of the file, or a copy, does.
#[cfg(not(unix))]
fn symlink(_target: &Path, blob: &Path, place: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, place).or_else(|_| fs::copy(blob, place).map(drop))
}
