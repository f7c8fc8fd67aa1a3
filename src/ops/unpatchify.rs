use rayon::prelude::*;

use super::elementwise::pointwise;
use super::{Tensor, by_dtype, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{Device, Element, OpKind};

/// A map from the tokens of its patches: `[N, h * w, p * p * C]`, a token as (p, p, C), to `[N, h * p, w * p, C]`, same dtype.
/// The end of a diffusion transformer: Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2.
///
/// * `grid`: h and w, in patches; `patch`: p
///
/// # Errors
/// [`Error::Shape`]: other than h * w tokens, a width that p * p does not divide; [`Error::Argument`]: a patch of 0;
/// [`Error::Dtype`]; [`Error::OutOfMemory`].
pub fn unpatchify(x: &Tensor, grid: [usize; 2], patch: usize) -> Result<Tensor> {
    const OP: &str = "unpatchify";
    let ([n, tokens, width], [h, w]) = (x.dims(OP, "x")?, grid);
    float(OP, "x", x)?;
    if patch == 0 {
        return Err(Error::argument(OP, "patch", patch, "1 or more"));
    }
    let cells = patch.checked_mul(patch).filter(|&cells| width.is_multiple_of(cells));
    let (Some(cells), true) = (cells, h.checked_mul(w) == Some(tokens)) else {
        return Err(Error::shape(OP, "x", x, format!("[N, {h} * {w}, {patch} * {patch} * C]")));
    };

    let mut y = Tensor::uninit(x.device(), &[n, h * patch, w * patch, width / cells], x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    match x.device() {
        Device::Meta(meta) => {
            meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x)], 0));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => unpatchify_cpu::<T>(x, w, patch, &mut y)),
        Device::Cuda(card) => cuda::unpatchify::unpatchify(card, x, w, patch, &mut y)?,
    }
    Ok(y)
}

/// A row of patches at a time.
fn unpatchify_cpu<T: Element>(x: &Tensor, w: usize, patch: usize, y: &mut Tensor) {
    let width = x.shape()[2];
    let run = width / patch; // a row of a patch
    y.cpu_mut::<T>().par_chunks_mut(w * width).zip(x.cpu::<T>().par_chunks(w * width)).for_each(|(y, x)| {
        for (token, x) in x.chunks_exact(width).enumerate() {
            for (row, x) in x.chunks_exact(run).enumerate() {
                y[(row * w + token) * run..][..run].copy_from_slice(x);
            }
        }
    });
}
