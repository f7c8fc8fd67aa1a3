use rayon::prelude::*;

use super::elementwise::{CHUNK, pointwise};
use super::{Tensor, by_dtype, bytes_of, cuda, float, profile};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device, Element, OpKind, Work};

/// `signal * x0 + sigma * noise`, f32: the forward process, sqrt(abar) and sqrt(1 - abar). Any shape.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument.
pub fn add_noise(x0: &Tensor, noise: &Tensor, signal: f32, sigma: f32) -> Result<Tensor> {
    const OP: &str = "add_noise";
    x0.expect(OP, "x0", x0.shape(), DType::F32, x0.device())?;
    noise.expect(OP, "noise", x0.shape(), DType::F32, x0.device())?;

    let mut y = Tensor::uninit(x0.device(), x0.shape(), DType::F32)?;
    let _timed = profile::scope(OP, y.shape());
    match x0.device() {
        Device::Meta(meta) => {
            meta.record(OP, OpKind::Elementwise, y.shape(), pointwise(&y, &[Some(x0), Some(noise)], 3));
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => add_noise_cpu(x0, noise, signal, sigma, &mut y),
        Device::Cuda(card) => cuda::sampler::add_noise(card, x0, noise, signal, sigma, &mut y)?,
    }
    Ok(y)
}

fn add_noise_cpu(x0: &Tensor, noise: &Tensor, signal: f32, sigma: f32, y: &mut Tensor) {
    let (x0, noise) = (x0.cpu::<f32>(), noise.cpu::<f32>());
    y.cpu_mut::<f32>().par_chunks_mut(CHUNK).zip(x0.par_chunks(CHUNK).zip(noise.par_chunks(CHUNK))).for_each(
        |(y, (x0, noise))| {
            for ((y, x0), noise) in y.iter_mut().zip(x0).zip(noise) {
                *y = signal * x0 + sigma * noise;
            }
        },
    );
}

/// The VAE's posterior. `moments: [N, H, W, 2C]` (mean, then log variance, clamped to [-30, 20]) to `[N, H, W, C]` f32:
/// the mean, or `mean + exp(logvar / 2) * noise`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Dtype`](crate::Error::Dtype), [`Error::Device`](crate::Error::Device):
/// which argument.
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
    let _timed = profile::scope(OP, y.shape());
    match moments.device() {
        Device::Meta(meta) => {
            let (flops, read) = if noise.is_some() { (6, moments.bytes()) } else { (0, moments.bytes() / 2) };
            let (flops, bytes) = (flops * y.numel() as u64, read + bytes_of(&[noise, Some(&y)]));
            meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if y.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(moments.dtype(), T => diagonal_gaussian_cpu::<T>(moments, noise, &mut y)),
        Device::Cuda(card) => cuda::sampler::diagonal_gaussian(card, moments, noise, &mut y)?,
    }
    Ok(y)
}

fn diagonal_gaussian_cpu<T: Element>(moments: &Tensor, noise: Option<&Tensor>, y: &mut Tensor) {
    let c = y.shape()[3];
    let (moments, noise) = (moments.cpu::<T>(), noise.map(|noise| noise.cpu::<f32>()));
    y.cpu_mut::<f32>().par_chunks_mut(c).enumerate().for_each(|(pixel, y)| {
        let (mean, logvar) = moments[2 * pixel * c..][..2 * c].split_at(c);
        for (i, y) in y.iter_mut().enumerate() {
            *y = mean[i].to_f32();
            if let Some(noise) = noise {
                *y += (0.5 * logvar[i].to_f32().clamp(-30.0, 20.0)).exp() * noise[pixel * c + i];
            }
        }
    });
}
