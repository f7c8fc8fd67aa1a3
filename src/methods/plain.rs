//! Plain sampling: every step at the final size, as the model's own pipeline does.

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, from_options};
use super::{Method, Prediction, Run, Sampling};
use crate::error::Result;
use crate::runtime::Tensor;

pub static PLAIN: MethodSpec = MethodSpec {
    name: "plain",
    summary: "every step at the final size",
    relays: false,
    choices: &[],
    options: &[],
    parse: |given| from_options(Plain {}, given),
};

/// Plain sampling has no options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plain {}

impl From<Plain> for Method {
    fn from(options: Plain) -> Method {
        Method::of(&PLAIN, options)
    }
}

impl GenerationMethod for Plain {
    fn check(&self, _: &Run) -> Result<()> {
        Ok(())
    }

    fn takes_pixels(&self) -> bool {
        true
    }

    /// The last latents, as in diffusers.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        sampling.prepare(vec![sampling.run().scheduler().clone()], |coefficients| coefficients)?;
        let x = sampling.first_samples()?;
        let (x, _) = sampling.stage(0, x, &|_| Prediction::default())?;
        Ok(x)
    }
}
