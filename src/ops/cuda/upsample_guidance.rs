//! Launches of kernels/upsample_guidance.cu.

use super::{entry, int};
use crate::error::Result;
use crate::ops::StepRows;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block: `kThreads` of upsample_guidance.cu.
const THREADS: usize = 256;

fn over(count: usize) -> Launch {
    Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS)
}

/// Side of a square, and height, width and channels of the smaller map.
fn sizes(op: &'static str, large: &Tensor, small: &Tensor) -> Result<[i32; 4]> {
    let ([_, large, ..], [_, h, w, c]) = (large.dims::<4>(op, "x")?, small.dims::<4>(op, "y")?);
    Ok([int(op, "scale", large / h)?, int(op, "H", h)?, int(op, "W", w)?, int(op, "C", c)?])
}

pub fn pool(device: &CudaDevice, x: &Tensor, y: &mut Tensor) -> Result<()> {
    let ([size, h, w, c], count) = (sizes("pool_latents", x, y)?, y.numel());
    // SAFETY: as the entry has them; each of y's `count` values has its square in x.
    unsafe {
        device.launch(
            "upsample_guidance",
            "pool_latents_f32",
            over(count),
            args![y.cuda(), x.cuda(), size, h, w, c, count as i64],
        )
    }
}

pub fn guide(
    device: &CudaDevice,
    output: &Tensor,
    low: &Tensor,
    pooled: &Tensor,
    factors: StepRows,
    y: &mut Tensor,
) -> Result<()> {
    const OP: &str = "upsample_guidance";
    let ([size, h, w, c], count) = (sizes(OP, output, low)?, low.numel());
    let step_images = int(OP, "images with a step of their own", factors.step.images())?;
    let (table, step, images) = (factors.table.cuda(), factors.step.tensor().cuda(), pooled.shape()[0] as i64);
    // SAFETY: as the entry has them; y and the output have a square for each of the `count` values of low, pooled has those of
    // its images, which low repeats, and the table three factors for the step.
    unsafe {
        device.launch(
            "upsample_guidance",
            &entry(OP, y.dtype()),
            over(count),
            args![
                y.cuda(),
                output.cuda(),
                low.cuda(),
                pooled.cuda(),
                table,
                step,
                step_images,
                size,
                h,
                w,
                c,
                images,
                count as i64
            ],
        )
    }
}
