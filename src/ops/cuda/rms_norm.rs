use super::{aligned, entry, int};
use crate::error::Result;
use crate::ops::RmsNorm;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block and elements a thread moves at once: `kThreads` of rms_norm.cu, `kVector` of common/vector.cuh.
const THREADS: usize = 256;
const VECTOR: usize = 8;
/// Longer rows get a block each: four vectors a lane of a warp.
const WIDE: usize = 1024;

pub fn rms_norm(device: &CudaDevice, args: &RmsNorm, c: usize, y: &mut Tensor) -> Result<()> {
    let RmsNorm { x, gamma, eps } = *args;
    let vector = c.is_multiple_of(VECTOR) && [x, gamma, y].iter().all(|tensor| aligned(tensor));
    let rows = y.numel() / c;
    // By C alone: the order of a row's sum must not depend on how many rows there are.
    let (name, blocks) = if c > WIDE { ("rms_norm_wide", rows) } else { ("rms_norm", rows.div_ceil(THREADS / 32)) };
    let (entry, channels) = (entry(name, y.dtype()), int("rms_norm", "C", c)?);
    // SAFETY: arguments as the entry has them; x and y have `rows` rows of C elements, gamma has C.
    unsafe {
        device.launch(
            "rms_norm",
            &entry,
            Launch::grid([blocks, 1, 1]).block(THREADS),
            args![y.cuda(), x.cuda(), gamma.cuda(), rows as i64, channels, eps, i32::from(vector)],
        )
    }
}
