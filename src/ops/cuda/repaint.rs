//! Launches of kernels/repaint.cu.

use super::int;
use crate::error::Result;
use crate::ops::Repaint;
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, Launch, args};

/// Threads a block: `kThreads` of repaint.cu.
const THREADS: usize = 256;

pub fn repaint(device: &CudaDevice, args: &Repaint, x: &mut Tensor) -> Result<()> {
    let Repaint { mask, known, noise, levels, step } = *args;
    let (count, channels) = (x.numel(), int("repaint", "C", x.shape()[3])?);
    let per_image = (count / x.shape()[0].max(1)) as i64;
    let step_images = int("repaint", "images with a step of their own", step.images())?;
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    // SAFETY: arguments as the entry has them; known and noise have the `count` elements of x, the mask one per pixel of an
    // image, the levels a row for every step of the index, which has `step_images` images.
    unsafe {
        device.launch(
            "repaint",
            "repaint_f32",
            launch,
            args![
                x.cuda(),
                known.cuda(),
                noise.cuda(),
                mask.cuda(),
                levels.cuda(),
                step.tensor().cuda(),
                step_images,
                per_image,
                channels,
                count as i64
            ],
        )
    }
}
