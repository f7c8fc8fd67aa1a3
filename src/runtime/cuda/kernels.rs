//! What build.rs compiled: `KERNELS`, one `KernelFile` a file of kernels/ and its folders; `BUILT`, false where there was no
//! nvcc.

use super::isa::Isa;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
