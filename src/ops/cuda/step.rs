use super::{entry, int};
use crate::error::Result;
use crate::ops::step::{Output, Rank};
use crate::ops::{Guidance, SampleState, StepTable};
use crate::runtime::Tensor;
use crate::runtime::cuda::{CudaDevice, DevicePtr, Launch, args};

/// Threads a block: `kThreads` of step.cu.
const THREADS: usize = 256;
/// Of the kernels with a block per image: `kReduceThreads` of step.cu.
const REDUCE_THREADS: usize = 512;

pub fn advance(device: &CudaDevice, images: usize, index: &mut Tensor) -> Result<()> {
    let launch = Launch::grid([images, 1, 1]).block(1);
    // SAFETY: the index has two u32 for every block.
    unsafe { device.launch("step", "advance_step", launch, args![index.cuda()]) }
}

pub fn scale_input(device: &CudaDevice, x: &Tensor, steps: &StepTable, repeats: usize, y: &mut Tensor) -> Result<()> {
    let (count, entry) = (x.numel(), entry("scale_input", y.dtype()));
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    let (table, step) = (steps.tensor().cuda(), steps.index().tensor().cuda());
    let (repeats, step_images) = (int("scale_input", "repeats", repeats)?, step_images(steps)?);
    let per_image = (count / x.shape()[0].max(1)) as i64;
    // SAFETY: as the entry has them; y holds `repeats` times x, and the table has the steps.
    unsafe {
        device.launch(
            "step",
            &entry,
            launch,
            args![y.cuda(), x.cuda(), table, step, step_images, per_image, count as i64, repeats],
        )
    }
}

/// The images with a step of their own.
fn step_images(steps: &StepTable) -> Result<i32> {
    int("step", "images with a step of their own", steps.index().images())
}

pub fn sampler_step(
    device: &CudaDevice,
    state: &mut SampleState,
    output: &Output,
    steps: &StepTable,
    noise: Option<&Tensor>,
    thresholds: Option<&Tensor>,
) -> Result<()> {
    let (x, x0, history) = state.parts_mut();
    let (count, entry) = (x.numel(), entry("sampler_step", output.values.dtype()));
    let launch = Launch::grid([count.div_ceil(THREADS), 1, 1]).block(THREADS);
    let (table, step, step_images) = (steps.tensor().cuda(), steps.index().tensor().cuda(), step_images(steps)?);
    let depth = history.as_ref().map_or(0, |history| history.shape()[0] as i32);
    let per_image = (count / x.shape()[0].max(1)) as i64;
    let (guidance, factors) =
        (DevicePtr::or_null(output.guidance.map(|g| g.tensor())), DevicePtr::or_null(output.factors));
    let (noise, thresholds) = (DevicePtr::or_null(noise), DevicePtr::or_null(thresholds));
    let history = DevicePtr::or_null(history.as_deref());
    // SAFETY: as the entry has them; x, x0 and noise have `count` elements, the history `depth` times as many, the output as
    // many, twice with guidance and again with a variance; guidance, factors and thresholds have a row per image; the table has
    // the step, the history what its rows reach back to, and noise and variance are there when one of its rows wants them.
    unsafe {
        let count = count as i64;
        device.launch(
            "step",
            &entry,
            launch,
            args![
                x.cuda(),
                x0.cuda(),
                history,
                output.values.cuda(),
                guidance,
                factors,
                thresholds,
                noise,
                table,
                step,
                step_images,
                depth,
                per_image,
                count,
                output.variance_channels as i32
            ],
        )
    }
}

pub fn guidance_rescale(
    device: &CudaDevice,
    output: &Output,
    guidance: &Guidance,
    per_image: usize,
    factors: &mut Tensor,
) -> Result<()> {
    let images = factors.numel();
    let launch = Launch::grid([images, 1, 1]).block(REDUCE_THREADS);
    let (values, guidance, per_image) = (output.values, guidance.tensor().cuda(), per_image as i32);
    let variance_channels = output.variance_channels as i32;
    // SAFETY: as the entry has them; the output has two halves of `images * per_image` elements, with a variance of twice as
    // many, guidance a row per image.
    unsafe {
        let entry = entry("guidance_rescale", values.dtype());
        device.launch(
            "step",
            &entry,
            launch,
            args![factors.cuda(), values.cuda(), guidance, per_image, images as i32, variance_channels],
        )
    }
}

#[allow(clippy::too_many_arguments)] // the kernel's
pub fn dynamic_threshold(
    device: &CudaDevice,
    x: &Tensor,
    output: &Output,
    steps: &StepTable,
    max: f32,
    rank: Rank,
    per_image: usize,
    thresholds: &mut Tensor,
) -> Result<()> {
    let entry = entry("dynamic_threshold", output.values.dtype());
    let launch = Launch::grid([thresholds.numel(), 1, 1]).block(REDUCE_THREADS);
    let (table, step, step_images) = (steps.tensor().cuda(), steps.index().tensor().cuda(), step_images(steps)?);
    let (guidance, factors) =
        (DevicePtr::or_null(output.guidance.map(|g| g.tensor())), DevicePtr::or_null(output.factors));
    let (below, above, images) = (rank.below as i32, rank.above as i32, thresholds.numel() as i32);
    let (thresholds, values) = (thresholds.cuda(), output.values.cuda());
    // SAFETY: as the entry has them; x has `images * per_image` elements, the output as many, twice with guidance and again with
    // a variance; guidance and factors have a row per image; the table has the step, and the ranks are below `per_image`.
    unsafe {
        let (per_image, weight) = (per_image as i32, rank.weight);
        device.launch(
            "step",
            &entry,
            launch,
            args![
                thresholds,
                x.cuda(),
                values,
                guidance,
                factors,
                table,
                step,
                step_images,
                max,
                below,
                above,
                weight,
                per_image,
                images,
                output.variance_channels as i32
            ],
        )
    }
}
