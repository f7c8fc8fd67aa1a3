//! NVIDIA cards through the driver alone: memory, launches, graphs. The driver may be the emulated card's library, which
//! has the same interface; nothing here can tell.

mod arena;
mod device;
mod driver;
mod graph;
mod isa;
mod kernels;
mod launch;
mod mark;
mod memory;
mod staging;
mod tensor_map;

pub use device::{CudaDevice, CudaOptions, MemoryReport};
pub use driver::{driver_version, emulated_library, is_emulated, use_library};
pub use graph::Graph;
pub use isa::Isa;
pub use kernels::BUILT as KERNELS_BUILT;
pub(crate) use launch::args;
pub use launch::{Arg, DevicePtr, Launch};
pub use mark::Mark;
pub(super) use memory::Buffer;
pub use tensor_map::{Im2col, Swizzle, TensorMap, TensorView};
