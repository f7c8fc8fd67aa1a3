//! Launches of kernels/latents.cu.

use super::int;
use crate::error::Result;
use crate::ops::StepRows;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

/// Threads a block: `kThreads` and `kReduceThreads` of latents.cu.
const THREADS: usize = 256;
const REDUCE_THREADS: usize = 512;

fn over(count: usize) -> Launch {
    Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS)
}

/// The images with a step of their own.
fn step_images(op: &'static str, rows: &StepRows) -> Result<i32> {
    int(op, "images with a step of their own", rows.step.images())
}

pub fn mix(device: &CudaDevice, x: &mut Tensor, a: &Tensor, b: Option<&Tensor>, factors: StepRows) -> Result<()> {
    let count = x.numel();
    let (per_image, step_images) = (count / x.shape()[0], step_images("mix_latents", &factors)?);
    let (table, step, b) = (factors.table.cuda(), factors.step.tensor().cuda(), DevicePtr::or_null(b));
    // SAFETY: as the entry has them; x, a and b have `count` elements, the table three factors for the step.
    unsafe {
        device.launch(
            "latents",
            "mix_latents_f32",
            over(count),
            args![x.cuda(), a.cuda(), b, table, step, step_images, per_image as i64, count as i64],
        )
    }
}

pub fn moments(device: &CudaDevice, x: &Tensor, padding: usize, moments: &mut Tensor) -> Result<()> {
    let images = x.shape()[0];
    let launch = Launch::grid([images, 1, 1]).block(REDUCE_THREADS);
    // SAFETY: as the entry has them; the op has seen that both counts fit.
    unsafe {
        let (per_image, padding) = ((x.numel() / images) as i32, padding as i32);
        device.launch("latents", "latent_moments_f32", launch, args![moments.cuda(), x.cuda(), per_image, padding])
    }
}

pub fn standardise(device: &CudaDevice, x: &Tensor, from: &Tensor, to: &Tensor, y: &mut Tensor) -> Result<()> {
    let count = x.numel();
    let per_image = count / x.shape()[0];
    // SAFETY: as the entry has them; x and y have `count` elements, from and to a row for each image.
    unsafe {
        device.launch(
            "latents",
            "standardise_latents_f32",
            over(count),
            args![y.cuda(), x.cuda(), from.cuda(), to.cuda(), per_image as i64, count as i64],
        )
    }
}

pub fn blur(device: &CudaDevice, x: &Tensor, [top, left]: [usize; 2], weights: StepRows, y: &mut Tensor) -> Result<()> {
    const OP: &str = "blur_latents";
    let &[_, height, width, channels] = x.shape() else { unreachable!("checked") };
    let taps = weights.table.shape()[1];
    let step_images = step_images(OP, &weights)?;
    // The kernel adds these up in 32 bits.
    int(OP, "padded height and taps", top + height + taps)?;
    int(OP, "padded width and taps", left + width + taps)?;
    let [taps, height, width, channels, top, left] = [taps, height, width, channels, top, left].map(|n| n as i32);
    let count = y.numel();
    // SAFETY: as the entry has them; y is x with the padding, and the table has the step's taps.
    unsafe {
        device.launch(
            "latents",
            "blur_latents_f32",
            over(count),
            args![
                y.cuda(),
                x.cuda(),
                weights.table.cuda(),
                weights.step.tensor().cuda(),
                step_images,
                taps,
                height,
                width,
                channels,
                top,
                left,
                count as i64
            ],
        )
    }
}
