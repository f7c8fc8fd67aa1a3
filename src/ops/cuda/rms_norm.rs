use super::{aligned, entry, int};
use crate::error::Result;
use crate::ops::RmsNorm;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

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

/// Longer heads get a warp each, others a quarter of one.
const QUARTER: usize = 64;

/// `x: [N, L, P, heads, head_dim]`, not empty; P - 1 `gammas`.
pub fn rms_norm_heads(device: &CudaDevice, x: &mut Tensor, gammas: &[&Tensor], eps: f32) -> Result<()> {
    const OP: &str = "rms_norm_heads";
    let &[n, l, parts, heads, c] = x.shape() else { unreachable!("checked: five dimensions") };
    let vector = c.is_multiple_of(VECTOR) && aligned(x) && gammas.iter().all(|gamma| aligned(gamma));
    let rows = n * l * (parts - 1) * heads;
    let (name, lanes) = if c > QUARTER { ("rms_norm_heads_wide", 32) } else { (OP, 8) };
    let launch = Launch::grid([rows.div_ceil(THREADS / lanes), 1, 1]).block(THREADS);
    let [heads, parts, channels] = [int(OP, "heads", heads)?, int(OP, "parts", parts)?, int(OP, "head_dim", c)?];
    let second = DevicePtr::or_null(gammas.get(1).copied());
    // SAFETY: arguments as the entry has them; x has `rows` rows of head_dim elements in all parts but the last, each gamma has
    // head_dim, and there is a second one where there are three parts.
    unsafe {
        device.launch(
            "rms_norm",
            &entry(name, x.dtype()),
            launch,
            args![x.cuda(), gammas[0].cuda(), second, rows as i64, parts, heads, channels, eps, i32::from(vector)],
        )
    }
}
