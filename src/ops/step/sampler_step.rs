use rayon::prelude::*;

use super::guidance::rescale_factors;
use super::thresholding::dynamic_thresholds;
use super::{CpuOutput, Guidance, LearnedNoise, Output, SampleState, StepRow, StepTable};
use crate::error::{Error, Result};
use crate::ops::elementwise::CHUNK;
use crate::ops::{by_dtype, bytes_of, cuda, profile};
use crate::runtime::{DType, Device, OpKind, Tensor, Work};

/// Guidance, x0 and update in one pass, in place, with the row of each image's step. An image's result does not depend on
/// the others of the batch; an image that has ended keeps its samples.
///
/// * `model_output`: `[N, H, W, C]` without guidance, else `[2N, H, W, C]`, unconditional rows first; any float dtype. Of a
///   network that also predicts the variance of its noise 2C channels, the second half the variance: rows with
///   [`learned`](super::StepCoefficients::learned) noise read it, with guidance from the conditional rows, and need it; other
///   rows do not read it
/// * `guidance`: of N images; `None` when the output has N rows. Where an image rescales, a pass over the output before
///   finds the standard deviations
/// * `noise`: `[N, H, W, C]`, f32, required exactly when a row of the table has a `next_from_noise` other than 0; an image
///   whose row has 0 does not read it
///
/// With [thresholding](StepTable::with_thresholding), a pass before finds each image's quantile, exactly (torch.quantile's
/// linear interpolation between the two nearest values).
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`]: which argument; [`Error::Argument`]: noise missing or
/// superfluous, no step left for any image, a number of images that the table's does not divide, a state without the history
/// that the rows need; [`Error::TooLarge`]: 2^31 or more values per image with guidance rescale or thresholding.
pub fn sampler_step(
    state: &mut SampleState,
    model_output: &Tensor,
    guidance: Option<&Guidance>,
    steps: &StepTable,
    noise: Option<&Tensor>,
) -> Result<()> {
    const OP: &str = "sampler_step";
    let x = &state.x;
    let [n, h, w, c] = x.dims(OP, "x")?;
    x.expect(OP, "x", x.shape(), DType::F32, steps.tensor().device())?;
    let learns = steps.learns_noise();
    let mut output = Output::new(OP, model_output, guidance, [n, h, w, c], learns, x.device())?;
    match (noise, steps.adds_noise()) {
        (Some(noise), true) => noise.expect(OP, "noise", x.shape(), DType::F32, x.device())?,
        (None, false) => {}
        (Some(_), false) => {
            return Err(Error::argument(OP, "noise", "given", "none: next_from_noise is 0 in every step"));
        }
        (None, true) => return Err(Error::argument(OP, "noise", "missing", "a tensor: next_from_noise is not 0")),
    }
    if state.depth() < steps.history() {
        let want = format!("{}, which the steps reach back to", steps.history());
        return Err(Error::argument(OP, "history", state.depth(), want));
    }
    steps.check(OP, n)?;

    let factors = match guidance {
        Some(guidance) if guidance.rescales() => Some(rescale_factors(&output, guidance, n)?),
        _ => None,
    };
    output.factors = factors.as_ref();
    let thresholds = match steps.thresholding {
        Some(thresholding) => Some(dynamic_thresholds(x, &output, steps, thresholding)?),
        None => None,
    };
    let _timed = profile::scope(OP, x.shape());
    match model_output.device() {
        Device::Meta(meta) => {
            let flops = x.numel() as u64 * (if guidance.is_some() { 13 } else { 10 } + if learns { 9 } else { 0 });
            let history = state.history.as_ref().map_or(0, |history| 2 * history.bytes());
            let bytes = 4 * x.bytes() + history + bytes_of(&[Some(model_output), noise]);
            meta.record(OP, OpKind::Elementwise, x.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => *state = sampler_step_cpu(state, &output, steps, noise, thresholds.as_ref())?,
        Device::Cuda(card) => cuda::step::sampler_step(card, state, &output, steps, noise, thresholds.as_ref())?,
    }
    Ok(())
}

/// The state after the step.
fn sampler_step_cpu(
    state: &SampleState,
    output: &Output,
    steps: &StepTable,
    noise: Option<&Tensor>,
    thresholds: Option<&Tensor>,
) -> Result<SampleState> {
    let uninit = || Tensor::uninit(state.x.device(), state.x.shape(), DType::F32);
    let (mut next, mut x0) = (uninit()?, uninit()?);
    let count = state.x.numel();
    let per_image = count / state.x.shape()[0];
    // [depth, N, ...]; what an image keeps is written once the image is done.
    let mut history = match &state.history {
        Some(history) => Some(history.duplicate()?),
        None => None,
    };
    by_dtype!(output.values.dtype(), T => {
        let output = CpuOutput::<T>::new(output);
        let of_images = next.cpu_mut::<f32>().chunks_exact_mut(per_image).zip(x0.cpu_mut().chunks_exact_mut(per_image));
        for (image, (next, x0)) in of_images.enumerate() {
            let first = image * per_image;
            let of_image = |tensor: &Tensor| tensor.cpu::<f32>()[first..first + per_image].to_vec();
            let Some(StepRow { coefficients: k, .. }) = steps.next_row(image) else {
                next.copy_from_slice(&of_image(&state.x));
                x0.copy_from_slice(&of_image(&state.x0));
                continue;
            };
            let x = &state.x.cpu::<f32>()[first..first + per_image];
            let noise = noise.filter(|_| k.next_from_noise != 0.0).map(|noise| &noise.cpu::<f32>()[first..]);
            let bound = thresholds.map(|thresholds| thresholds.cpu::<f32>()[image]);
            let clip = k.clip.unwrap_or(f32::INFINITY);
            let before = state.history.as_ref().map_or(&[] as &[f32], |history| history.cpu());
            let earlier: Vec<(f32, &[f32])> = k
                .next_from_history
                .iter()
                .enumerate()
                .filter(|(_, weight)| **weight != 0.0)
                .map(|(j, &weight)| (weight, &before[j * count + first..][..per_image]))
                .collect();
            // One value kept per element, or none: then the chunks are empty.
            let keeps = k.kept.filter(|_| history.is_some());
            let mut kept = keeps.map_or_else(Vec::new, |_| vec![0f32; per_image]);
            let mut kept_chunks: Vec<&mut [f32]> = kept.chunks_mut(CHUNK).collect();
            kept_chunks.resize_with(per_image.div_ceil(CHUNK), Default::default);
            let chunks = next.par_chunks_mut(CHUNK).zip(x0.par_chunks_mut(CHUNK));
            chunks.zip(kept_chunks).enumerate().for_each(|(chunk, ((next, x0), kept))| {
                for (j, (next, x0)) in next.iter_mut().zip(x0).enumerate() {
                    let i = chunk * CHUNK + j;
                    let e = output.at(first + i, image);
                    let clean = |x: f32| {
                        let value = k.x0_from_x * x + k.x0_from_e * e;
                        match bound {
                            // Not clamp, which a NaN bound stops; a NaN value stays.
                            Some(bound) if value > bound => 1.0,
                            Some(bound) if value < -bound => -1.0,
                            Some(bound) => value / bound,
                            None => value.clamp(-clip, clip),
                        }
                    };
                    *x0 = clean(x[i]);
                    *next = k.next_from_x * x[i] + k.next_from_e * e + k.next_from_x0 * *x0;
                    for (weight, values) in &earlier {
                        *next += weight * values[i];
                    }
                    if let Some(noise) = noise {
                        let deviation = |learned: LearnedNoise| learned.deviation(output.variance(first + i));
                        *next += k.learned.map_or(1.0, deviation) * k.next_from_noise * noise[i];
                    }
                    if let (Some(of), Some(kept)) = (keeps, kept.get_mut(j)) {
                        *kept = of.from_x * x[i] + of.from_e * e + of.from_x0 * *x0;
                    }
                    if k.x0_from_next {
                        *x0 = clean(*next);
                    }
                }
            });
            if let (Some(history), Some(_)) = (&mut history, keeps) {
                let (depth, history) = (history.shape()[0], history.cpu_mut::<f32>());
                for j in (1..depth).rev() {
                    let latest = (j - 1) * count + first;
                    history.copy_within(latest..latest + per_image, j * count + first);
                }
                history[first..first + per_image].copy_from_slice(&kept);
            }
        }
    });
    Ok(SampleState { x: next, x0, history })
}
