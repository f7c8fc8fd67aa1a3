use rayon::prelude::*;

use super::StepIndex;
use crate::error::{Error, Result};
use crate::ops::{bytes_of, cuda, profile};
use crate::runtime::{DType, Device, OpKind, Tensor, Work};

/// What inpainting keeps of a picture. Lugmayr et al. 2022, arXiv:2201.09865, eq. (8).
#[derive(Clone, Copy, Debug)]
pub struct Repaint<'a> {
    /// `[1, H, W, 1]`, f32, for all images: 1 is repainted, below 1/2 is kept.
    pub mask: &'a Tensor,
    /// `[N, H, W, C]`, f32: the picture's clean samples.
    pub known: &'a Tensor,
    /// `[N, H, W, C]`, f32
    pub noise: &'a Tensor,
    /// `[steps, 2]`, f32: what the samples are made of after each evaluation, `signal known + sigma noise`.
    pub levels: &'a Tensor,
    /// Which evaluation each image makes.
    pub step: &'a StepIndex,
}

/// `x` where the mask is 1, else the known samples noised to the level of each image's step, in place. An image that has
/// ended keeps its samples. `x`: `[N, H, W, C]`, f32, that nobody else holds.
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: `x` is shared, a number of
/// images that the index's does not divide, a step beyond the levels.
pub fn repaint(x: &mut Tensor, args: Repaint) -> Result<()> {
    const OP: &str = "repaint";
    let Repaint { mask, known, noise, levels, step } = args;
    let [n, h, w, c] = x.dims(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, x.device())?;
    mask.expect(OP, "mask", &[1, h, w, 1], DType::F32, x.device())?;
    known.expect(OP, "known", &[n, h, w, c], DType::F32, x.device())?;
    noise.expect(OP, "noise", &[n, h, w, c], DType::F32, x.device())?;
    let [steps, _] = levels.dims(OP, "levels")?;
    levels.expect(OP, "levels", &[steps, 2], DType::F32, x.device())?;
    step.tensor().expect(OP, "step", &[2, step.images()], DType::U32, x.device())?;
    step.check_images(OP, n)?;
    if n > 0 && step.last() >= steps {
        return Err(Error::argument(OP, "step", step.last(), format!("below {steps}, the levels that there are")));
    }
    if !x.is_unshared() {
        return Err(Error::argument(OP, "x", "shared", "a tensor that nobody else holds"));
    }

    let _timed = profile::scope(OP, x.shape());
    match x.device().clone() {
        Device::Meta(meta) => {
            // As if all of it were kept.
            let bytes = x.bytes() + bytes_of(&[Some(known), Some(noise), Some(mask)]);
            let work = Work { macs: 0, flops: 3 * x.numel() as u64, bytes, launches: 1 };
            meta.record(OP, OpKind::Elementwise, x.shape(), work);
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => repaint_cpu(x, args, c),
        Device::Cuda(card) => cuda::repaint::repaint(&card, &args, x)?,
    }
    Ok(())
}

fn repaint_cpu(x: &mut Tensor, Repaint { mask, known, noise, levels, step }: Repaint, channels: usize) {
    let per_image = x.numel() / x.shape()[0];
    let (mask, levels) = (mask.cpu::<f32>(), levels.cpu::<f32>());
    let known = known.cpu::<f32>().par_chunks_exact(per_image).zip(noise.cpu::<f32>().par_chunks_exact(per_image));
    x.cpu_mut::<f32>().par_chunks_exact_mut(per_image).zip(known).enumerate().for_each(
        |(image, (x, (known, noise)))| {
            if step.has_ended(image) {
                return;
            }
            let [signal, sigma] = [0, 1].map(|column| levels[2 * step.get(image) + column]);
            for (pixel, _) in mask.iter().enumerate().filter(|(_, repainted)| **repainted < 0.5) {
                for i in pixel * channels..(pixel + 1) * channels {
                    x[i] = signal * known[i] + sigma * noise[i];
                }
            }
        },
    );
}
