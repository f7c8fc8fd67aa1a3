use super::{Denoiser, LowSteps};
use crate::error::{Error, Result};
use crate::models::{AttentionMaps, ControlOptions, UnetOptions};
use crate::ops::{self, StepTable};
use crate::runtime::{DType, Tensor};

/// What a step asks of the network. Data alone: steps with equal predictions do the same work, so a recorded step is found
/// by it, and what changes from step to step without another recording stands in the step table.
#[derive(Clone, Debug, PartialEq)]
pub enum Prediction {
    /// One call with these options.
    Network(UnetOptions),
    /// A second call on the samples' means over squares of cells corrects the first ([`Sampling::set_low_resolution`](
    /// super::Sampling::set_low_resolution)); both with these options. Hwang, Park & Jo 2024, arXiv:2404.01709.
    Upsampled(UnetOptions),
    /// Noise-damped guidance, where there is guidance (He et al. 2023, arXiv:2310.07702, sec. 3.4): the unconditional rows of a call
    /// with `weak`, and from them on the differences that guidance has in a call with `strong`.
    Damped { strong: UnetOptions, weak: UnetOptions },
    /// One call in which the conditional samples stand twice ([`Denoiser::denoise_twins`]): guidance reads the unconditional rows
    /// and those of the twins, as far from them as `amplified` times what the network says. Huang et al. 2024, arXiv:2403.12963,
    /// sec. 3.4.
    Twins { options: UnetOptions, amplified: f32 },
}

impl Prediction {
    /// The rows that guidance reads of samples `x`, `[N, h, w, C]`: N of them, or with guidance 2 N, the unconditional ones
    /// first. Work that a card can record.
    ///
    /// # Errors
    /// Those of the model.
    pub(super) fn rows(
        &self,
        denoiser: &dyn Denoiser,
        x: &Tensor,
        table: &StepTable,
        low: Option<&LowSteps>,
    ) -> Result<Tensor> {
        match self {
            Prediction::Network(options) => denoiser.denoise(x, table, options),
            Prediction::Upsampled(options) => {
                let low = low.ok_or_else(|| Error::config("prediction", "the stage has no second calls"))?;
                let output = denoiser.denoise(x, table, options)?;
                let pooled = ops::pool_latents(x, low.scale)?;
                let of_pooled = denoiser.denoise(&pooled, &low.table, options)?;
                ops::upsample_guidance(&output, &of_pooled, &pooled, low.factors())
            }
            Prediction::Damped { strong, weak } => {
                let (images, strong) = (x.shape()[0], denoiser.denoise(x, table, strong)?);
                if strong.shape()[0] == images {
                    return Ok(strong); // there is no guidance
                }
                let weak = denoiser.denoise(x, table, weak)?;
                let strong = in_f32(strong)?;
                let unconditional = in_f32(weak.rows(0..images)?)?;
                let difference = ops::add_scaled(&strong.rows(images..2 * images)?, &strong.rows(0..images)?, -1.0)?;
                let conditional = ops::add(&unconditional, &difference)?;
                ops::stack(&unconditional, &conditional)
            }
            Prediction::Twins { options, amplified } => {
                let (images, output) = (x.shape()[0], denoiser.denoise_twins(x, table, options)?);
                if output.shape()[0] == 2 * images {
                    return output.rows(images..2 * images); // there is no guidance
                }
                let rows = |from: usize| in_f32(output.rows(from..from + images)?);
                let (unconditional, twins) = (rows(0)?, rows(2 * images)?);
                let conditional = match *amplified {
                    1.0 => twins,
                    factor => {
                        let difference = ops::add_scaled(&twins, &unconditional, -1.0)?;
                        ops::add_scaled(&unconditional, &difference, factor)?
                    }
                };
                ops::stack(&unconditional, &conditional)
            }
        }
    }

    /// The same with these ControlNets in each of its calls.
    pub(super) fn with_control(mut self, control: ControlOptions) -> Prediction {
        match &mut self {
            Prediction::Network(options) | Prediction::Upsampled(options) | Prediction::Twins { options, .. } => {
                options.control = control;
            }
            Prediction::Damped { strong, weak } => (strong.control, weak.control) = (control, control),
        }
        self
    }

    /// What its calls do with maps of cross-attention.
    pub(super) fn attention_maps(&self) -> AttentionMaps {
        match self {
            Prediction::Network(options) => options.attention_maps,
            _ => AttentionMaps::default(),
        }
    }
}

impl Default for Prediction {
    /// One call, as the network was trained.
    fn default() -> Prediction {
        Prediction::Network(UnetOptions::default())
    }
}

impl From<UnetOptions> for Prediction {
    fn from(options: UnetOptions) -> Prediction {
        Prediction::Network(options)
    }
}

/// The same in f32; what is f32 already is not copied.
pub(super) fn in_f32(x: Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F32 => Ok(x),
        _ => ops::scale_cast(&x, 1.0, 0.0, DType::F32, 1),
    }
}
