use super::tiles::chunk;
use super::{aligned, entry, int};
use crate::error::Result;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block: `kThreads` of unpatchify.cu.
const THREADS: usize = 256;

/// `w`: patches side by side.
pub fn unpatchify(device: &CudaDevice, x: &Tensor, w: usize, patch: usize, y: &mut Tensor) -> Result<()> {
    const OP: &str = "unpatchify";
    let run = x.shape()[2] / patch;
    let of_wide = chunk(x.dtype());
    let wide = run.is_multiple_of(of_wide) && aligned(x) && aligned(y);
    let (entry, unit) = if wide { ("unpatchify_wide".into(), of_wide) } else { (entry(OP, x.dtype()), 1) };
    let units = y.numel() / unit;
    let [w, patch, run] = [int(OP, "w", w)?, int(OP, "patch", patch)?, int(OP, "patch * C", run / unit)?];
    let launch = Launch::grid([units.div_ceil(THREADS), 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; x and y have `units` units, whole rows of patches of w * patch runs, `wide` only
    // where runs are whole aligned units.
    unsafe { device.launch(OP, &entry, launch, args![y.cuda(), x.cuda(), units as i64, w, patch, run]) }
}
