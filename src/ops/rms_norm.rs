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

/// The same of queries and keys where a fused projection has left them: `x: [N, L, P, heads, head_dim]` of P = 3 parts (q, k, v) or
/// 2 (k, v), whose last stays as it is. In place. The norms of SD3.5's attention: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2.
///
/// * `gammas`: `[head_dim]` each, of the first P - 1 parts
///
/// # Errors
/// As [`rms_norm`]; [`Error::Argument`](crate::Error::Argument): other than P - 1 gammas, somebody else holds `x`.
pub fn rms_norm_heads(x: &mut Tensor, gammas: &[&Tensor], eps: f32) -> Result<()> {
    const OP: &str = "rms_norm_heads";
    let [_, _, parts, _, c] = x.dims(OP, "x")?;
    float(OP, "x", x)?;
    if !(2..=3).contains(&parts) {
        return Err(Error::shape(OP, "x", x, "[N, L, 2 or 3, heads, head_dim]"));
    }
    if gammas.len() + 1 != parts {
        let want = format!("{}: one for each of {parts} parts but the last", parts - 1);
        return Err(Error::argument(OP, "number of gammas", gammas.len(), want));
    }
    gammas.iter().try_for_each(|gamma| gamma.expect(OP, "gamma", &[c], x.dtype(), x.device()))?;
    check_eps(OP, eps)?;

    if !x.is_unshared() {
        return Err(Error::argument(OP, "x", "shared", "a tensor that nobody else holds"));
    }

    let shape = x.shape().to_vec();
    let _timed = profile::scope(OP, &shape);
    profile::call(OP, || cases::heads_shape(&shape));
    let normalised = x.numel() / parts * (parts - 1);
    match x.device().clone() {
        Device::Meta(meta) => {
            let bytes =
                2 * (normalised * x.dtype().size_bytes()) as u64 + gammas.iter().map(|g| g.bytes()).sum::<u64>();
            let work = Work { macs: 0, flops: 4 * normalised as u64, bytes, launches: 1 };
            meta.record(OP, OpKind::Norm, &shape, work);
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(x.dtype(), T => rms_norm_heads_cpu::<T>(x, gammas, eps)),
        Device::Cuda(card) => cuda::rms_norm::rms_norm_heads(&card, x, gammas, eps)?,
    }
    Ok(())
}

/// A token at a time.
fn rms_norm_heads_cpu<T: Element>(x: &mut Tensor, gammas: &[&Tensor], eps: f32) {
    let &[_, _, parts, heads, c] = x.shape() else { unreachable!("checked: five dimensions") };
    let gammas: Vec<Vec<f32>> = gammas.iter().map(|gamma| cpu::to_f32::<T>(gamma)).collect();
    x.cpu_mut::<T>().par_chunks_mut(parts * heads * c).for_each(|token| {
        let mut values = vec![0.0; c];
        for (part, gamma) in token.chunks_exact_mut(heads * c).zip(&gammas) {
            for row in part.chunks_exact_mut(c) {
                math::load(&mut values, row);
                cpu::norm::rms_norm_row(&mut values, gamma, eps);
                math::store(row, &values);
            }
        }
    });
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
