//! NVIDIA cards through the driver alone: memory, launches, graphs. The driver may be the emulated card's library, which
//! has the same interface; nothing here can tell.

mod arena;
mod device;
mod driver;
mod graph;
mod kernels;
mod launch;
mod memory;
mod staging;

pub use device::{CudaDevice, CudaOptions, MemoryReport};
pub use driver::{driver_version, emulated_library, is_emulated, use_library};
pub use graph::Graph;
pub use kernels::{ARCHS as KERNEL_ARCHS, BUILT as KERNELS_BUILT};
pub use launch::{Arg, DevicePtr, Launch};
pub(super) use memory::Buffer;

/// The arguments of a kernel in its order: device addresses ([`DevicePtr`]), numbers, `#[repr(C)]` structs by value.
#[macro_export]
#[doc(hidden)]
macro_rules! kernel_args {
    ($($arg:expr),* $(,)?) => { &[$($crate::runtime::cuda::Arg::of(&$arg)),*] };
}
pub use crate::kernel_args as args;
