use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use ureq::http::StatusCode;

use super::client::FURTHER_ATTEMPTS;
use super::{Client, Failure, HubObserver, RemoteFile, Repository, cache_error};
use crate::error::Error;

/// Fetches files of one commit into the cache.
pub(crate) struct Download<'a> {
    pub client: &'a Client,
    pub repository: &'a Repository,
    pub commit: &'a str,
}

/// So much between two broken connections is progress: the attempts are counted anew.
const PROGRESS_BYTES: u64 = 1 << 20;

/// Why a file's bytes do not go on.
enum Broken {
    /// Another attempt may go on.
    Connection(String),
    /// Another attempt must begin again.
    Beginning,
    Failed(Failure),
}

impl Download<'_> {
    /// Has `file` whole in blobs/; it is not yet in the snapshot. `done`: bytes of other files, for the observer.
    ///
    /// # Errors
    /// Those of the hub and of the system; a size or a SHA-256 that is not the listed one; a lock that another process keeps.
    pub fn blob(&self, file: &RemoteFile, done: u64, observer: &mut dyn HubObserver) -> Result<(), Failure> {
        let blob = self.repository.blob(&file.id);
        let whole = || fs::metadata(&blob).is_ok_and(|found| found.is_file() && found.len() == file.size);
        if whole() {
            return Ok(());
        }
        let lock = self.repository.lock(&file.id, &file.path, observer)?;
        if whole() {
            return Ok(()); // another process was faster
        }
        if fs::symlink_metadata(&blob).is_ok() {
            observer.warning(&format!("{} has not the size that the hub lists and is fetched again", blob.display()));
            fs::remove_file(&blob).map_err(|error| cache_error(&blob, error))?;
        }
        let path = self.repository.incomplete(&file.id, &lock);
        let (mut attempt, mut first, mut restarts) = (0, true, 0);
        loop {
            let before = fs::metadata(&path).map_or(0, |found| found.len());
            let resumed = first && before > 0;
            first = false;
            let failure = match self.go_on(file, &path, done, observer) {
                Ok(sha256) if !file.is_sha256 || sha256.eq_ignore_ascii_case(&file.id) => break,
                Ok(sha256) => {
                    fs::remove_file(&path).map_err(|error| cache_error(&path, error))?;
                    if !resumed {
                        let reason = format!(
                            "{} arrived with SHA-256 {sha256}, the hub lists {}; try again, and if it stays so, something \
                             between here and {} changes it",
                            file.path,
                            file.id,
                            self.client.endpoint()
                        );
                        return Err(Failure::Final(self.client.refused(reason)));
                    }
                    observer.warning(&format!("the kept beginning of {} was damaged; fetching all of it", file.path));
                    continue;
                }
                Err(Broken::Failed(failure)) => return Err(failure),
                Err(Broken::Beginning) if restarts < FURTHER_ATTEMPTS => {
                    restarts += 1;
                    fs::remove_file(&path).map_err(|error| cache_error(&path, error))?;
                    continue;
                }
                Err(Broken::Beginning) => {
                    format!("{} does not send {} as it is listed", self.client.endpoint(), file.path)
                }
                Err(Broken::Connection(reason)) => reason,
            };
            let after = fs::metadata(&path).map_or(0, |found| found.len());
            if after >= before + PROGRESS_BYTES {
                attempt = 0;
            }
            if attempt == FURTHER_ATTEMPTS {
                let kept = match after {
                    0 => String::new(),
                    _ => format!("; {after} of {} bytes are kept, and the next run goes on from there", file.size),
                };
                return Err(Failure::Unreachable(format!("{} could not be fetched: {failure}{kept}", file.path)));
            }
            self.client.pause(&mut attempt);
        }
        fs::rename(&path, &blob).map_err(|error| Failure::Final(cache_error(&blob, error)))
    }

    /// Goes on where the file at `path` ends; its SHA-256 when all bytes are there.
    fn go_on(
        &self,
        file: &RemoteFile,
        path: &Path,
        done: u64,
        observer: &mut dyn HubObserver,
    ) -> Result<String, Broken> {
        let failed = |error| Broken::Failed(Failure::Final(cache_error(path, error)));
        let mut hasher = Sha256::new();
        // Only a hash tells whether a beginning is this file's.
        let mut have = if file.is_sha256 { hash_file(path, file.size, &mut hasher).map_err(failed)? } else { 0 };
        if have > file.size {
            return Err(Broken::Beginning);
        }
        let mut options = File::options();
        let options = if have > 0 { options.append(true) } else { options.write(true).truncate(true) };
        let mut to = options.create(true).open(path).map_err(failed)?;
        if have < file.size {
            let response = match self.client.file(self.commit, file, have) {
                Ok(response) => response,
                Err(Failure::Unreachable(reason)) => return Err(Broken::Connection(reason)),
                Err(failure) => return Err(Broken::Failed(failure)),
            };
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            match response.status() {
                StatusCode::OK if have == 0 => {}
                StatusCode::PARTIAL_CONTENT if have > 0 => {
                    let begins =
                        header("content-range").is_some_and(|range| range.starts_with(&format!("bytes {have}-")));
                    if !begins {
                        return Err(Broken::Beginning);
                    }
                }
                // The server does not go on from the middle, or the beginning is none of its file.
                StatusCode::OK | StatusCode::RANGE_NOT_SATISFIABLE => return Err(Broken::Beginning),
                _ => {
                    return Err(match self.client.refusal(&response, Some(&file.path)) {
                        Failure::Unreachable(reason) => Broken::Connection(reason),
                        failure => Broken::Failed(failure),
                    });
                }
            }
            let wrong_size = |got: u64| {
                let reason = format!(
                    "{} has {got} bytes where {} are listed; try again later, or name a revision",
                    file.path, file.size
                );
                Broken::Failed(Failure::Final(self.client.refused(reason)))
            };
            let length = header("content-length").and_then(|length| length.parse::<u64>().ok());
            if let Some(length) = length.filter(|&length| have.saturating_add(length) != file.size) {
                return Err(wrong_size(have.saturating_add(length)));
            }
            let mut body = response.into_body().into_reader();
            let mut buffer = vec![0; 1 << 16];
            observer.position(&file.path, done + have);
            loop {
                let read = match body.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) => read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(Broken::Connection(error.to_string())),
                };
                if have + read as u64 > file.size {
                    return Err(wrong_size(have + read as u64));
                }
                to.write_all(&buffer[..read]).map_err(failed)?;
                hasher.update(&buffer[..read]);
                have += read as u64;
                observer.position(&file.path, done + have);
            }
        }
        if have < file.size {
            return Err(Broken::Connection("the connection ended early".into()));
        }
        to.sync_all().map_err(failed)?;
        Ok(hex(hasher))
    }
}

/// The SHA-256 of a file, 64 hexadecimal digits: by it the hub knows large files, and other programs models.
///
/// # Errors
/// [`Error::Io`].
pub fn sha256_of(path: &Path) -> crate::Result<String> {
    let mut hasher = Sha256::new();
    hash_file(path, u64::MAX, &mut hasher).map_err(|error| Error::io(path, error))?;
    Ok(hex(hasher))
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes what is at `path`: how many bytes; none where nothing is. Beyond `most` it only sees that there are more.
fn hash_file(path: &Path, most: u64, hasher: &mut Sha256) -> std::io::Result<u64> {
    let mut file = match File::open(path) {
        Ok(file) => file.take(most.saturating_add(1)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let (mut buffer, mut total) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(total),
            read => {
                hasher.update(&buffer[..read]);
                total += read as u64;
            }
        }
    }
}
