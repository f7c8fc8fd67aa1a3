use super::{entry, int};
use crate::error::Result;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

/// Threads a block: `kThreads` of sampler.cu.
const THREADS: usize = 256;

fn over(count: usize) -> Launch {
    Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS)
}

pub fn add_noise(
    device: &CudaDevice,
    x0: &Tensor,
    noise: &Tensor,
    signal: f32,
    sigma: f32,
    y: &mut Tensor,
) -> Result<()> {
    let count = y.numel();
    // SAFETY: arguments as the entry has them; all three tensors have `count` elements.
    unsafe {
        device.launch(
            "sampler",
            "add_noise_f32",
            over(count),
            args![y.cuda(), x0.cuda(), noise.cuda(), signal, sigma, count as i64],
        )
    }
}

pub fn diagonal_gaussian(device: &CudaDevice, moments: &Tensor, noise: Option<&Tensor>, y: &mut Tensor) -> Result<()> {
    let (entry, count) = (entry("diagonal_gaussian", moments.dtype()), y.numel());
    let channels = int("diagonal_gaussian", "C", y.shape()[3])?;
    // SAFETY: arguments as the entry has them; y and noise have `count` elements, the moments twice as many.
    unsafe {
        device.launch(
            "sampler",
            &entry,
            over(count),
            args![y.cuda(), moments.cuda(), DevicePtr::or_null(noise), channels, count as i64],
        )
    }
}
