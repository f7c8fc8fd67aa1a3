//! Tensors and the devices they live on.
//!
//! `cpu` computes in Rust; `meta` holds no data and records what each op would cost. The model code is the same.

mod device;
mod dtype;
mod meta;
mod tensor;

pub use device::{CpuDevice, Device};
pub use dtype::{DType, Element};
pub use meta::{MetaDevice, OpKind, OpRecord, Report, Work};
pub use tensor::{CpuData, Tensor};
