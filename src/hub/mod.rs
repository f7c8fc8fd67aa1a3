//! Models of the Hugging Face hub: their names, the local cache as the hub's own programs lay it out, and the fetching of
//! what is missing. Which files a model needs is not decided here: [`pipeline::fetch_model`](crate::pipeline::fetch_model).
//!
//! HTTP is ureq's, over rustls. The cache is shared with other programs, so its layout and locks are theirs:
//!
//! ```text
//! models--ORG--NAME/refs/REVISION             the commit that a branch or tag was at
//! models--ORG--NAME/snapshots/COMMIT/PATH     links into blobs
//! models--ORG--NAME/blobs/ID                  ID: SHA-256 of a large file, git's own hash of a small one
//! models--ORG--NAME/blobs/ID.incomplete       the beginning of one that is being fetched
//! .locks/models--ORG--NAME/ID.lock            held while it is
//! ```

mod cache;
mod client;
mod download;
mod name;
mod settings;

use std::path::Path;

pub(crate) use cache::{Presence, Repository};
pub(crate) use client::{Client, Listing, RemoteFile};
pub(crate) use download::Download;
pub use download::sha256_of;
pub use name::HubName;
pub use settings::HubSettings;

use crate::error::Error;

/// Is told how the fetching of a model goes.
pub trait HubObserver {
    /// This many files will be fetched, of so many bytes together.
    fn begin(&mut self, files: usize, bytes: u64);

    /// `name` is being fetched; of the bytes that [`begin`](HubObserver::begin) named, `done` are here.
    fn position(&mut self, name: &str, done: u64);

    /// All files are here.
    fn end(&mut self);

    fn warning(&mut self, message: &str);
}

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It would fail again.
    Final(Error),
    /// Nobody answered, or the connection broke: why. What is in the cache may serve.
    Unreachable(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Final(error)
    }
}

/// An error of the system at a place in the cache: a full disk is said as one.
fn cache_error(path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let cache = "HF_HUB_CACHE names another folder for the cache";
    match error.kind() {
        StorageFull | QuotaExceeded => {
            let kept = "what has arrived is kept, and the next run goes on from there";
            Error::file(path, format!("no space left on the disk; make room ({kept}), or {cache}"))
        }
        PermissionDenied | ReadOnlyFilesystem => Error::file(path, format!("cannot be written ({error}); {cache}")),
        _ => Error::io(path, error),
    }
}
