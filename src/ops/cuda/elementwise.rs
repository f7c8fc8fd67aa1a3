use super::entry;
use crate::error::Result;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block: `kThreads` of elementwise.cu.
const THREADS: usize = 256;

pub fn add(device: &CudaDevice, a: &Tensor, b: &Tensor, y: &mut Tensor) -> Result<()> {
    let count = y.numel();
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    let entry = entry("add", y.dtype());
    // SAFETY: arguments as the entry has them; all three tensors have `count` elements.
    unsafe { device.launch("elementwise", &entry, launch, args![y.cuda(), a.cuda(), b.cuda(), count as i64]) }
}
