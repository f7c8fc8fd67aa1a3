use std::ffi::c_void;
use std::marker::PhantomData;

use bytemuck::{NoUninit, Pod, Zeroable};

use crate::runtime::Tensor;

/// An address in the card's memory, as a kernel receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Zeroable, Pod)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    pub const NULL: DevicePtr = DevicePtr(0);

    /// A tensor's first element, or null for an argument that is left out.
    pub fn or_null(tensor: Option<&Tensor>) -> DevicePtr {
        tensor.map_or(DevicePtr::NULL, Tensor::cuda)
    }
}

/// Grid, block and dynamic shared memory of a launch, and what else the driver is told of it.
///
/// Every launch may begin before the one before it is done (programmatic dependent launch): its kernel waits for that one by
/// `wait_for_previous()`, before it reads what others write or writes what others may still read. The build refuses a kernel
/// that does not wait, and the emulated card a launch of one. Where the card, or the code that was compiled for it, has no
/// such wait, a launch begins when all before are done.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub(super) grid: [usize; 3],
    pub(super) block: usize,
    pub(super) shared_bytes: usize,
    pub(super) cluster: [usize; 3],
    pub(super) carveout: Option<usize>,
}

impl Launch {
    /// Blocks in x, y, z; a grid without blocks launches nothing.
    pub fn grid(grid: [usize; 3]) -> Launch {
        Launch { grid, block: 1, shared_bytes: 0, cluster: [1; 3], carveout: None }
    }

    /// Threads a block.
    pub fn block(self, threads: usize) -> Launch {
        Launch { block: threads, ..self }
    }

    /// Dynamic shared memory a block.
    pub fn shared(self, bytes: usize) -> Launch {
        Launch { shared_bytes: bytes, ..self }
    }

    /// Blocks of a cluster in x, y, z, which run together and read each other's shared memory. They divide the grid and are
    /// at most 8 together; the card must have clusters (compute capability 9.0).
    pub fn cluster(self, blocks: [usize; 3]) -> Launch {
        Launch { cluster: blocks, ..self }
    }

    /// How much of the memory that shared memory and L1 share on a multiprocessor should be shared memory, in percent. A
    /// hint; without it the driver goes by what the launch needs. Launches that differ in it do not overlap.
    pub fn carveout(self, percent: usize) -> Launch {
        Launch { carveout: Some(percent), ..self }
    }

    /// Why the driver would not take it.
    pub(super) fn refusal(&self) -> Option<String> {
        let Launch { grid: [x, y, z], cluster, .. } = *self;
        if x > i32::MAX as usize || y > 65_535 || z > 65_535 {
            return Some(format!("a grid of {x} x {y} x {z} blocks; the limit is 2147483647 x 65535 x 65535"));
        }
        let [a, b, c] = cluster;
        if cluster.iter().any(|&blocks| !(1..=LARGEST_CLUSTER).contains(&blocks)) || a * b * c > LARGEST_CLUSTER {
            return Some(format!("a cluster of {a} x {b} x {c} blocks; it has 1 to {LARGEST_CLUSTER}"));
        }
        if !(x.is_multiple_of(a) && y.is_multiple_of(b) && z.is_multiple_of(c)) {
            return Some(format!("a grid of {x} x {y} x {z} blocks, which is not whole clusters of {a} x {b} x {c}"));
        }
        match self.carveout {
            Some(percent) if percent > 100 => Some(format!("a carve-out of {percent} percent; it is 0 to 100")),
            _ => None,
        }
    }
}

/// What every card with clusters can do.
const LARGEST_CLUSTER: usize = 8;

/// The arguments of a kernel in its order: device addresses ([`DevicePtr`]), numbers, `#[repr(C)]` structs and
/// [`TensorMap`](super::TensorMap)s by value.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$($crate::runtime::cuda::Arg::of(&$arg)),*] };
}
pub(crate) use args;

/// A kernel argument: where its bytes are, how many, and how a parameter of its type is aligned.
#[derive(Clone, Copy, Debug)]
pub struct Arg<'a> {
    pub(super) value: *const c_void,
    pub(super) bytes: usize,
    pub(super) align: usize,
    lifetime: PhantomData<&'a c_void>,
}

impl<'a> Arg<'a> {
    /// A type without padding: the driver copies every byte, and what stands in padding is anything.
    pub fn of<T: NoUninit>(value: &'a T) -> Arg<'a> {
        Arg {
            value: std::ptr::from_ref(value).cast(),
            bytes: size_of::<T>(),
            align: align_of::<T>(),
            lifetime: PhantomData,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_that_the_driver_would_refuse_are_described() {
        let launch = Launch::grid([6, 4, 1]);
        for good in [launch, launch.cluster([2, 4, 1]), launch.cluster([3, 1, 1]).carveout(100), launch.carveout(0)] {
            assert_eq!(good.refusal(), None, "{good:?}");
        }
        for (bad, words) in [
            (launch.cluster([4, 1, 1]), "a grid of 6 x 4 x 1 blocks, which is not whole clusters of 4 x 1 x 1"),
            (launch.cluster([1, 1, 2]), "not whole clusters of 1 x 1 x 2"),
            (launch.cluster([6, 2, 1]), "a cluster of 6 x 2 x 1 blocks; it has 1 to 8"),
            (launch.cluster([0, 1, 1]), "a cluster of 0 x 1 x 1 blocks"),
            (launch.cluster([usize::MAX, 2, 1]), "blocks; it has 1 to 8"),
            (launch.carveout(101), "a carve-out of 101 percent; it is 0 to 100"),
            (Launch::grid([1, 65_536, 1]), "a grid of 1 x 65536 x 1 blocks; the limit is"),
        ] {
            let refusal = bad.refusal().unwrap();
            assert!(refusal.contains(words), "{words:?} is not in: {refusal}");
        }
    }
}
