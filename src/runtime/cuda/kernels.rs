//! What build.rs compiled: `KERNELS`, one `KernelFile` a file of kernels/; `BUILT`, false where there was no nvcc.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
