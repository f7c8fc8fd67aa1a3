use super::Denoiser;
use crate::error::Result;
use crate::models::UnetOptions;
use crate::ops::StepTable;
use crate::runtime::Tensor;

/// What a step asks of the network. Data alone: steps with equal predictions do the same work, so a recorded step is found
/// by it, and what changes from step to step without another recording stands in the step table.
#[derive(Clone, Debug, PartialEq)]
pub enum Prediction {
    /// One call with these options.
    Network(UnetOptions),
}

impl Prediction {
    /// The rows that guidance reads of samples `x`, `[N, h, w, C]`: N of them, or with guidance 2 N, the unconditional ones
    /// first. Work that a card can record.
    ///
    /// # Errors
    /// Those of the model.
    pub(super) fn rows(&self, denoiser: &dyn Denoiser, x: &Tensor, table: &StepTable) -> Result<Tensor> {
        match self {
            Prediction::Network(options) => denoiser.denoise(x, table, options),
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
