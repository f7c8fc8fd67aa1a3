use rayon::prelude::*;

use super::elementwise::CHUNK;
use super::{Tensor, by_dtype, bytes_of, float};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// One sampler step as the affine map that every sampler of the family is, computed in f64 by the schedulers:
/// ```text
/// e    = e_uncond + guidance (e_cond - e_uncond)            (the model's output: eps, v or x0)
/// x0   = x0_from_x x + x0_from_e e,                          then clamped to [-clip, clip] if asked
/// next = next_from_x x + next_from_e e + next_from_x0 x0 + next_from_noise n
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCoefficients {
    pub x0_from_x: f32,
    pub x0_from_e: f32,
    pub clip: Option<f32>,
    pub next_from_x: f32,
    pub next_from_e: f32,
    pub next_from_x0: f32,
    pub next_from_noise: f32,
}

/// What [`sampler_step`] returns, both f32 of the latents' shape.
#[derive(Clone, Debug)]
pub struct StepOutput {
    pub next: Tensor,
    pub x0: Tensor,
}

/// Guidance, x0 and update in one pass.
///
/// * `x`: latents `[N, H, W, C]`, f32
/// * `model_output`: `[N, H, W, C]` without guidance, else `[2N, H, W, C]`, unconditional rows first; any float dtype
/// * `guidance`: the scale w, `None` when the output has N rows
/// * `noise`: `[N, H, W, C]`, f32, required exactly when `next_from_noise` is not 0
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument; [`Error::Argument`](crate::Error::Argument): noise missing or superfluous, a negative `clip`.
pub fn sampler_step(
    x: &Tensor,
    model_output: &Tensor,
    guidance: Option<f32>,
    coefficients: &StepCoefficients,
    noise: Option<&Tensor>,
) -> Result<StepOutput> {
    const OP: &str = "sampler_step";
    let [n, h, w, c] = x.dims(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
    float(OP, "model_output", model_output)?;
    let rows = if guidance.is_some() { 2 * n } else { n };
    model_output.expect(OP, "model_output", &[rows, h, w, c], model_output.dtype(), x.device())?;
    match (noise, coefficients.next_from_noise != 0.0) {
        (Some(noise), true) => noise.expect(OP, "noise", x.shape(), DType::F32, x.device())?,
        (None, false) => {}
        (Some(_), false) => return Err(Error::argument(OP, "noise", "given", "none: next_from_noise is 0")),
        (None, true) => {
            let got = coefficients.next_from_noise;
            return Err(Error::argument(OP, "noise", "missing", format!("a tensor: next_from_noise is {got}")));
        }
    }
    if let Some(clip) = coefficients.clip
        && (clip.is_nan() || clip < 0.0)
    {
        return Err(Error::argument(OP, "clip", clip, "0 or more"));
    }

    let mut next = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
    let mut x0 = Tensor::uninit(x.device(), x.shape(), DType::F32)?;
    if let Device::Meta(meta) = x.device() {
        let bytes = bytes_of(&[Some(x), Some(model_output), noise, Some(&next), Some(&x0)]);
        let flops = x.numel() as u64 * if guidance.is_some() { 13 } else { 10 };
        meta.record(OP, OpKind::Elementwise, x.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        return Ok(StepOutput { next, x0 });
    }
    let noise = noise.map(|noise| noise.cpu::<f32>());
    by_dtype!(model_output.dtype(), T => {
        let (uncond, cond) = model_output.cpu::<T>().split_at(x.numel());
        let guided = guidance.map(|scale| (scale, cond));
        step(x.cpu(), uncond, guided, coefficients, noise, next.cpu_mut(), x0.cpu_mut());
    });
    Ok(StepOutput { next, x0 })
}

/// The loop of [`sampler_step`]; `guided` holds the guidance scale and the conditional half.
fn step<T: Element>(
    x: &[f32],
    output: &[T],
    guided: Option<(f32, &[T])>,
    k: &StepCoefficients,
    noise: Option<&[f32]>,
    next: &mut [f32],
    x0: &mut [f32],
) {
    let clip = k.clip.unwrap_or(f32::INFINITY);
    next.par_chunks_mut(CHUNK).zip(x0.par_chunks_mut(CHUNK)).enumerate().for_each(|(chunk, (next, x0))| {
        let start = chunk * CHUNK;
        for (i, (next, x0)) in next.iter_mut().zip(x0).enumerate() {
            let i = start + i;
            let mut e = output[i].to_f32();
            if let Some((scale, cond)) = guided {
                e += scale * (cond[i].to_f32() - e);
            }
            *x0 = (k.x0_from_x * x[i] + k.x0_from_e * e).clamp(-clip, clip);
            *next = k.next_from_x * x[i] + k.next_from_e * e + k.next_from_x0 * *x0;
            if let Some(noise) = noise {
                *next += k.next_from_noise * noise[i];
            }
        }
    });
}

/// `signal * x0 + sigma * noise`, f32: the forward process, sqrt(abar) and sqrt(1 - abar). Any shape.
///
/// # Errors
/// As [`sampler_step`].
pub fn add_noise(x0: &Tensor, noise: &Tensor, signal: f32, sigma: f32) -> Result<Tensor> {
    const OP: &str = "add_noise";
    x0.expect(OP, "x0", x0.shape(), DType::F32, x0.device())?;
    noise.expect(OP, "noise", x0.shape(), DType::F32, x0.device())?;
    let mut y = Tensor::uninit(x0.device(), x0.shape(), DType::F32)?;
    if let Device::Meta(meta) = y.device() {
        let (flops, bytes) = (3 * y.numel() as u64, 3 * y.bytes());
        meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        return Ok(y);
    }
    let (x0, noise) = (x0.cpu::<f32>(), noise.cpu::<f32>());
    y.cpu_mut::<f32>().par_chunks_mut(CHUNK).zip(x0.par_chunks(CHUNK).zip(noise.par_chunks(CHUNK))).for_each(
        |(y, (x0, noise))| {
            for ((y, x0), noise) in y.iter_mut().zip(x0).zip(noise) {
                *y = signal * x0 + sigma * noise;
            }
        },
    );
    Ok(y)
}

/// The VAE's posterior. `moments: [N, H, W, 2C]` (mean, then log variance, clamped to [-30, 20]) to `[N, H, W, C]` f32:
/// the mean, or `mean + exp(logvar / 2) * noise`.
///
/// # Errors
/// As [`sampler_step`].
pub fn diagonal_gaussian(moments: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "diagonal_gaussian";
    let [n, h, w, channels] = moments.dims(OP, "moments")?;
    float(OP, "moments", moments)?;
    if channels % 2 != 0 {
        return Err(Error::shape(OP, "moments", moments, "[N, H, W, 2C]: as many means as log variances"));
    }
    let c = channels / 2;
    if let Some(noise) = noise {
        noise.expect(OP, "noise", &[n, h, w, c], DType::F32, moments.device())?;
    }
    let mut y = Tensor::uninit(moments.device(), &[n, h, w, c], DType::F32)?;
    if let Device::Meta(meta) = y.device() {
        let (flops, read) = if noise.is_some() { (6, moments.bytes()) } else { (0, moments.bytes() / 2) };
        let (flops, bytes) = (flops * y.numel() as u64, read + y.bytes() + bytes_of(&[noise]));
        meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        return Ok(y);
    }
    if y.numel() == 0 {
        return Ok(y);
    }
    let noise = noise.map(|noise| noise.cpu::<f32>());
    by_dtype!(moments.dtype(), T => {
        let moments = moments.cpu::<T>();
        y.cpu_mut::<f32>().par_chunks_mut(c).enumerate().for_each(|(pixel, y)| {
            let (mean, logvar) = moments[pixel * channels..][..channels].split_at(c);
            for (i, y) in y.iter_mut().enumerate() {
                *y = mean[i].to_f32();
                if let Some(noise) = noise {
                    *y += (0.5 * logvar[i].to_f32().clamp(-30.0, 20.0)).exp() * noise[pixel * c + i];
                }
            }
        });
    });
    Ok(y)
}
