use rayon::prelude::*;

use super::cpu::{self, math};
use super::norm::check_eps;
use super::{Tensor, by_dtype, bytes_of, cases, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{Device, Element, OpKind, Work};

/// Arguments of [`rms_norm`].
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a> {
    /// `[..., C]`
    pub x: &'a Tensor,
    /// `[C]`
    pub gamma: &'a Tensor,
    /// Added to the mean square, units of x squared.
    pub eps: f32,
}

/// Root mean square norm over the last dimension, shape and dtype of `x`: `x / sqrt(mean(x^2) + eps) * gamma`, in f32 and
/// rounded once. Zhang & Sennrich 2019, arXiv:1910.07467.
///
/// A row's result depends on that row only, bit for bit.
///
/// # Errors
/// As [`layer_norm`](super::layer_norm).
pub fn rms_norm(args: RmsNorm) -> Result<Tensor> {
    const OP: &str = "rms_norm";
    let RmsNorm { x, gamma, eps } = args;
    float(OP, "x", x)?;
    let Some(&c) = x.shape().last() else {
        return Err(Error::shape(OP, "x", x, "[..., C]"));
    };
    gamma.expect(OP, "gamma", &[c], x.dtype(), x.device())?;
    check_eps(OP, eps)?;

    let mut y = Tensor::uninit(x.device(), x.shape(), x.dtype())?;
    let _timed = profile::scope(OP, y.shape());
    profile::call(OP, || cases::rows_shape(x, c));
    match x.device() {
        Device::Meta(meta) => {
            // Square and add, scale, gamma.
            let flops = 4 * y.numel() as u64;
            let bytes = bytes_of(&[Some(x), Some(gamma), Some(&y)]);
            meta.record(OP, OpKind::Norm, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => rms_norm_cpu::<T>(&args, c, &mut y)),
        Device::Cuda(card) => cuda::rms_norm::rms_norm(card, &args, c, &mut y)?,
    }
    Ok(y)
}

fn rms_norm_cpu<T: Element>(args: &RmsNorm, c: usize, y: &mut Tensor) {
    let gamma = cpu::to_f32::<T>(args.gamma);
    let rows = cpu::norm::rows_per_task(c) * c;
    let x = args.x.cpu::<T>();
    y.cpu_mut::<T>().par_chunks_mut(rows).zip(x.par_chunks(rows)).for_each(|(y, x)| {
        let mut values = vec![0.0; c];
        for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
            math::load(&mut values, x);
            cpu::norm::rms_norm_row(&mut values, &gamma, args.eps);
            math::store(y, &values);
        }
    });
}
