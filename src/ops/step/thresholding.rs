use super::{CpuOutput, Output, StepTable, per_image};
use crate::error::Result;
use crate::ops::{by_dtype, cuda, profile};
use crate::runtime::{DType, Device, Element, OpKind, Tensor, Work};

/// Dynamic thresholding of the clean sample, per image: with s the `ratio` quantile of |x0|, at least 1 and at most
/// `max`, x0 becomes clamp(x0, -s, s) / s. Saharia et al. 2022, arXiv:2205.11487, sec. 2.3.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholding {
    /// 0 to 1.
    pub ratio: f32,
    /// Above 0.
    pub max: f32,
}

/// `[N]`, f32: the bound of each image's clean sample.
pub(super) fn dynamic_thresholds(
    x: &Tensor,
    output: &Output,
    steps: &StepTable,
    thresholding: Thresholding,
) -> Result<Tensor> {
    const OP: &str = "dynamic_threshold";
    let (n, count) = (x.shape()[0], per_image(OP, x)?);
    let (rank, max) = (Rank::of(thresholding.ratio, count), thresholding.max);

    let mut thresholds = Tensor::uninit(x.device(), &[n], DType::F32)?;
    let _timed = profile::scope(OP, thresholds.shape());
    match x.device() {
        Device::Meta(meta) => {
            let (flops, bytes) = (8 * x.numel() as u64, 8 * (x.bytes() + output.values.bytes()) + thresholds.bytes());
            meta.record(OP, OpKind::Elementwise, thresholds.shape(), Work { macs: 0, flops, bytes, launches: 1 });
        }
        Device::Cpu(_) | Device::Cuda(_) if x.numel() == 0 => {}
        Device::Cpu(_) => by_dtype!(output.values.dtype(), T => {
            dynamic_thresholds_cpu(x, &CpuOutput::<T>::new(output), steps, max, rank, &mut thresholds);
        }),
        Device::Cuda(card) => {
            cuda::step::dynamic_threshold(card, x, output, steps, max, rank, count, &mut thresholds)?;
        }
    }
    Ok(thresholds)
}

fn dynamic_thresholds_cpu<T: Element>(
    x: &Tensor,
    output: &CpuOutput<T>,
    steps: &StepTable,
    max: f32,
    rank: Rank,
    thresholds: &mut Tensor,
) {
    let (x, count) = (x.cpu::<f32>(), x.numel() / thresholds.numel());
    for (image, threshold) in thresholds.cpu_mut::<f32>().iter_mut().enumerate() {
        let k = steps.row(image).coefficients;
        let of = |i: usize| (k.x0_from_x * x[i] + k.x0_from_e * output.at(i, image)).abs();
        let mut magnitudes: Vec<f32> = (image * count..(image + 1) * count).map(of).collect();
        let (_, &mut below, larger) = magnitudes.select_nth_unstable_by(rank.below, f32::total_cmp);
        let above = match rank.above == rank.below {
            true => below,
            false => larger.iter().copied().min_by(f32::total_cmp).unwrap_or(below),
        };
        *threshold = rank.between(below, above).max(1.0).min(max);
    }
}

/// Between which two values of the sorted ones a quantile lies, and how far from the first to the second.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Rank {
    pub below: usize,
    pub above: usize,
    pub weight: f32,
}

impl Rank {
    /// The `ratio` quantile's of `count` values, as torch computes it.
    fn of(ratio: f32, count: usize) -> Rank {
        let last = count.saturating_sub(1);
        let rank = ratio * last as f32;
        Rank { below: rank as usize, above: (rank.ceil() as usize).min(last), weight: rank.fract() }
    }

    /// As torch's lerp, which is exact at both ends.
    fn between(&self, below: f32, above: f32) -> f32 {
        match self.weight < 0.5 {
            true => below + self.weight * (above - below),
            false => above - (above - below) * (1.0 - self.weight),
        }
    }
}
