//! One error type for the whole crate: every variant names the thing, its value, and what was wanted or can be done.

use std::path::{Path, PathBuf};

use crate::runtime::{DType, Tensor};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor argument of an op has the wrong shape.
    #[error("{op}: {arg} has shape {got:?}, expected {want}")]
    Shape { op: &'static str, arg: &'static str, got: Vec<usize>, want: String },

    /// A tensor argument of an op has the wrong element type.
    #[error("{op}: {arg} is {got}, expected {want}")]
    Dtype { op: &'static str, arg: &'static str, got: DType, want: String },

    /// Arguments of one op live on different devices.
    #[error("{op}: {arg} is on {got}, the other arguments are on {want}")]
    Device { op: &'static str, arg: &'static str, got: String, want: String },

    /// A scalar argument (stride, groups, eps, ...) is out of range.
    #[error("{op}: {arg} is {got}, expected {want}")]
    Argument { op: &'static str, arg: &'static str, got: String, want: String },

    /// A size does not fit the index type or the address space.
    #[error("{op}: {what} = {got} is too large, the limit is {limit}")]
    TooLarge { op: &'static str, what: &'static str, got: u128, limit: u128 },

    /// The device could not give the memory.
    #[error(
        "out of memory on {device}: {requested_bytes} bytes requested for {what}, {in_use_bytes} bytes in use; {hint}"
    )]
    OutOfMemory { device: String, what: String, requested_bytes: u64, in_use_bytes: u64, hint: String },

    /// An output holds NaN or infinity; `what` names the layer or module.
    #[error("{what}: the result is not finite ({count} of {total} values); f32 has the widest range")]
    NonFinite { what: String, count: usize, total: usize },

    /// A configuration (config.json, scheduler_config.json, plan of a method) cannot be used.
    #[error("{what}: {reason}")]
    Config { what: String, reason: String },

    /// A file is missing, unreadable, truncated or not what its name says.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },

    /// A tensor of a weight file is missing, extra, of a wrong shape or dtype, or not finite.
    #[error("{}: tensor {key}: {reason}", file.display())]
    Weight { file: PathBuf, key: String, reason: String },

    /// A device was asked for that this build or machine does not have.
    #[error("device {device}: {reason}")]
    DeviceUnavailable { device: String, reason: String },

    /// The card's driver refused a call, or reports that earlier work failed.
    #[error("{device}: {call}: {name}: {text}")]
    Driver { device: String, call: &'static str, name: String, text: String },

    /// A kernel cannot be launched as asked.
    #[error("kernel {kernel}: {reason}")]
    Kernel { kernel: String, reason: String },

    /// What was asked for is inconsistent or out of range: a field of the pipeline's request (`steps`, `size_ids.crop`), an
    /// option of a method (`relay_clamp`) or what the caller itself calls it; its value, and what would be accepted. Other
    /// fields and options stand in the reason as `request.stages`.
    #[error("{field} {value}: {reason}")]
    Request { field: &'static str, value: String, reason: String },

    /// A model of the Hugging Face hub cannot be named, found or fetched.
    #[error("{name}: {reason}")]
    Hub { name: String, reason: String },

    /// Ctrl-C or the caller's cancellation.
    #[error("interrupted; nothing was written")]
    Interrupted,

    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

impl Error {
    pub fn shape(op: &'static str, arg: &'static str, got: &Tensor, want: impl Into<String>) -> Error {
        Error::Shape { op, arg, got: got.shape().to_vec(), want: want.into() }
    }

    pub fn argument(op: &'static str, arg: &'static str, got: impl ToString, want: impl Into<String>) -> Error {
        Error::Argument { op, arg, got: got.to_string(), want: want.into() }
    }

    pub fn config(what: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Config { what: what.into(), reason: reason.into() }
    }

    pub fn file(path: &Path, reason: impl Into<String>) -> Error {
        Error::File { path: path.to_path_buf(), reason: reason.into() }
    }

    pub fn io(path: &Path, source: std::io::Error) -> Error {
        Error::Io { path: path.to_path_buf(), source }
    }
}
