use rayon::prelude::*;

use super::elementwise::CHUNK;
use super::{Tensor, by_dtype, bytes_of, cuda, float};
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
    if let Device::Meta(meta) = y.device() {
        let (flops, bytes) = (3 * y.numel() as u64, 3 * y.bytes());
        meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        return Ok(y);
    }
    if let Device::Cuda(device) = x0.device() {
        cuda::sampler::add_noise(device, x0, noise, signal, sigma, &mut y)?;
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
    if let Device::Meta(meta) = y.device() {
        let (flops, read) = if noise.is_some() { (6, moments.bytes()) } else { (0, moments.bytes() / 2) };
        let (flops, bytes) = (flops * y.numel() as u64, read + y.bytes() + bytes_of(&[noise]));
        meta.record(OP, OpKind::Elementwise, y.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        return Ok(y);
    }
    if y.numel() == 0 {
        return Ok(y);
    }
    if let Device::Cuda(device) = moments.device() {
        cuda::sampler::diagonal_gaussian(device, moments, noise, &mut y)?;
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
