//! The card's side of the ops: which kernel, which grid. The arguments were checked by the op.

pub mod attention;
pub mod elementwise;
pub mod step;

use crate::error::Error;
use crate::runtime::DType;

/// The entry of a kernel for a dtype: `add_bf16`.
pub fn entry(name: &str, dtype: DType) -> String {
    format!("{name}_{dtype}")
}

/// For an op that has no kernel yet.
pub fn missing(op: &'static str) -> Error {
    Error::Kernel { kernel: op.into(), reason: "this op has no kernel yet; use --device cpu".into() }
}
