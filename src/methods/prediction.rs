use super::{Denoiser, LowSteps};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{self, StepTable};
use crate::runtime::Tensor;

/// What a step asks of the network. Data alone: steps with equal predictions do the same work, so a recorded step is found
/// by it, and what changes from step to step without another recording stands in the step table.
#[derive(Clone, Debug, PartialEq)]
pub enum Prediction {
    /// One call with these options.
    Network(UnetOptions),
    /// A second call on the samples' means over squares of cells corrects the first ([`Sampling::set_low_resolution`](
    /// super::Sampling::set_low_resolution)); both with these options. Hwang, Park & Jo 2024, arXiv:2404.01709.
    Upsampled(UnetOptions),
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
