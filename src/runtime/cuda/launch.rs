use std::ffi::c_void;
use std::marker::PhantomData;

use crate::runtime::Tensor;

/// An address in the card's memory, as a kernel receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    pub const NULL: DevicePtr = DevicePtr(0);

    /// A tensor's first element, or null for an argument that is left out.
    pub fn or_null(tensor: Option<&Tensor>) -> DevicePtr {
        tensor.map_or(DevicePtr::NULL, Tensor::cuda)
    }
}

/// Grid, block and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub(super) grid: [usize; 3],
    pub(super) block: usize,
    pub(super) shared_bytes: usize,
}

impl Launch {
    /// Blocks in x, y, z; a grid without blocks launches nothing.
    pub fn grid(grid: [usize; 3]) -> Launch {
        Launch { grid, block: 1, shared_bytes: 0 }
    }

    /// Threads a block.
    pub fn block(self, threads: usize) -> Launch {
        Launch { block: threads, ..self }
    }

    /// Dynamic shared memory a block.
    pub fn shared(self, bytes: usize) -> Launch {
        Launch { shared_bytes: bytes, ..self }
    }
}

/// The arguments of a kernel in its order: device addresses ([`DevicePtr`]), numbers, `#[repr(C)]` structs by value.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::runtime::cuda::Arg::of(&$arg)),*] };
}
pub(crate) use args;

/// A kernel argument: where its bytes are and how many.
#[derive(Clone, Copy, Debug)]
pub struct Arg<'a> {
    pub(super) value: *const c_void,
    pub(super) bytes: usize,
    lifetime: PhantomData<&'a c_void>,
}

impl<'a> Arg<'a> {
    pub fn of<T: Copy>(value: &'a T) -> Arg<'a> {
        Arg { value: std::ptr::from_ref(value).cast(), bytes: size_of::<T>(), lifetime: PhantomData }
    }
}
