//! Tensors and the devices they live on.
//!
//! `cpu` computes in Rust; `cuda` launches the kernels of kernels/ on a card, or on its emulation; `meta` holds no data and
//! records what each op would cost. The model code is the same.

pub mod cuda;
mod device;
mod dtype;
mod host_memory;
mod meta;
pub mod nvtx;
mod repeat;
mod tensor;

pub use cuda::{CudaDevice, CudaOptions};
pub use device::{CpuDevice, Device};
pub use dtype::{DType, Element, F8E4M3};
pub use host_memory::{available_bytes, bytes_text, total_bytes};
pub use meta::{MetaDevice, OpKind, OpRecord, Report, Work};
pub use repeat::Repeated;
pub use tensor::{CpuData, Tensor};
