//! What a step does around the denoiser. All that changes from step to step stands in tables on the device, read by an
//! index on the device: so the work of one step, recorded once, is that of every step.

mod guidance;
mod index;
mod output;
mod repaint;
mod rows;
mod sampler_step;
mod scale_input;
mod state;
mod table;
mod thresholding;

pub(super) use guidance::rescale_factors;
pub use guidance::{Guidance, GuidanceScale};
pub use index::StepIndex;
pub(super) use output::{CpuOutput, Output};
pub use repaint::{Repaint, repaint};
pub use rows::{StepColumns, StepRows};
pub use sampler_step::sampler_step;
pub use scale_input::scale_input;
pub use state::SampleState;
pub use table::{HISTORY, Kept, LearnedNoise, StepCoefficients, StepRow, StepTable, history};
pub(super) use thresholding::Rank;
pub use thresholding::Thresholding;

use crate::error::{Error, Result};
use crate::runtime::Tensor;

/// The values of an image, as kernels that reduce over them count.
fn per_image(op: &'static str, x: &Tensor) -> Result<usize> {
    let count = x.shape()[1..].iter().product();
    match i32::try_from(count) {
        Ok(_) => Ok(count),
        Err(_) => Err(Error::TooLarge { op, what: "H * W * C", got: count as u128, limit: i32::MAX as u128 }),
    }
}
