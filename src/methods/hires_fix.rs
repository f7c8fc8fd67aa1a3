//! Hires fix: a picture at the model's own size, enlarged, noised, and its last steps once more at the final size. What
//! stable-diffusion-webui calls so; SDEdit (Meng et al. 2021, arXiv:2108.01073) of the model's own enlarged picture.
//! ```text
//! x_0   = all n steps at the first size
//! y     = E(Phi(clamp(D(x_0)))), the posterior's mean; with latents Phi(x_0)     Phi the upsampler
//! x_t   = signal_t y + sigma_t noise, where the last int(n denoise) steps begin
//! x_0'  = those steps at the final size, on the same schedule
//! ```
//! The picture is the decoded last x of the second pass, as in plain sampling. A picture that the run begins from stands in place of
//! clamp(D(x_0)), at the first size, and the first pass is not run; with latents in place of x_0 the mean of its posterior.
//!
//! Draws, in order: the first noise; per step one, where the sampler draws; the second noise; per step again. From a picture the last two.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::megafusion::UPSAMPLER;
use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::parts::{self, PartOptions, with_parts};
use super::relay::Left;
use super::stages::last_steps_again;
use super::{Event, Geometry, Method, Run, Sampling, Size, Stage, StageParts, Start, base_size, check_size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::names::named;
use crate::ops::{self, Upsampler};
use crate::runtime::Tensor;

pub static HIRES_FIX: MethodSpec = MethodSpec {
    name: "hires-fix",
    summary: "every step at the model's own size, then the last ones again on the enlarged picture (arXiv:2108.01073)",
    relays: true,
    choices: parts::CHOICES,
    options: OPTIONS,
    parse: |given| from_options(HiresFix::default(), given),
};

/// What is enlarged between the passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Enlarged {
    /// The decoded picture.
    #[default]
    Picture,
    /// The clean latents, without the VAE: what webui calls Latent. Blurred, so that it takes a larger `denoise`.
    Latents,
}

named!(Enlarged, [Picture => "picture", Latents => "latents"]);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HiresFix {
    /// Share of the steps that the second pass makes. `None`: what the stages say, 0.7 where they are planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denoise: Option<f64>,
    pub enlarge: Enlarged,
    pub upsampler: Upsampler,
    /// Of stages with parts.
    #[serde(flatten)]
    pub parts: PartOptions,
}

/// webui's.
const DENOISE: f64 = 0.7;

const HEADING: &str = "Hires fix";

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &with_parts::<3, 13>(&OWN);

const OWN: [OptionSpec; 3] = [
    OptionSpec {
        name: "denoise",
        heading: HEADING,
        value_name: "X",
        help: "Share of the steps that the second pass makes, above 0 to 1 (default: 0.7)\n\n\
               The larger, the more of the enlarged picture is made anew. Rounded down to whole steps. In megafuse enlarge 0.35.",
        kind: OptionKind::Number { above: 0.0, most: 1.0, expected: "expected a number above 0, at most 1" },
    },
    OptionSpec {
        name: "enlarge",
        heading: HEADING,
        value_name: "E",
        help: "What is enlarged between the passes: picture or latents (default: picture)\n\n\
               picture: what the VAE decodes, which is encoded again; latents: without the VAE, blurred: with request.upsampler \
               bilinear it is webui's Latent, and wants a request.denoise of 0.6 or more.",
        kind: OptionKind::Choice(Enlarged::NAMES),
    },
    UPSAMPLER,
];

impl From<HiresFix> for Method {
    fn from(options: HiresFix) -> Method {
        Method::of(&HIRES_FIX, options)
    }
}

impl HiresFix {
    /// From what the first pass leaves to the noised samples of the second.
    fn enlarged(&self, sampling: &mut Sampling, left: &Left) -> Result<Tensor> {
        let run = sampling.run();
        let (from, size, level) = (run.stages()[0].size, run.stages()[1].size, run.ranges()[1].start);
        sampling.dump_left(1, left)?;
        let encoded = match self.enlarge {
            Enlarged::Latents => {
                let x = sampling.samples_left(1, left)?;
                if let Left::Samples(_) = left {
                    sampling.begin(Event::Relay { stage: 1, from, to: size })?;
                }
                sampling.begin(Event::RelayUpsample { stage: 1 })?;
                let [_, height, width, _] = sampling.sample_shape(size);
                let encoded = ops::resize(&x, [height, width], self.upsampler, None, None)?;
                sampling.begin(Event::RelayEncode { stage: 1 })?;
                sampling.dump("relay1.encoded", &encoded)?;
                encoded
            }
            Enlarged::Picture => {
                let enlarged = sampling.enlarged_left(1, left, |picture, size| {
                    let picture = ops::clamp(&picture, -1.0, 1.0)?;
                    ops::resize(&picture, size, self.upsampler, Some((-1.0, 1.0)), None)
                })?;
                sampling.encoded_pictures(1, &enlarged, false)?
            }
        };
        let noised = sampling.noised(1, &encoded, level)?;
        sampling.dump("relay1.noised", &noised)?;
        Ok(noised)
    }
}

impl GenerationMethod for HiresFix {
    /// Twice the sides.
    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    /// All steps at the native area in the final aspect ratio, then the last ones at the final size.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, native, sides, steps, .. } = geometry;
        let multiple = sides.multiple();
        check_size("size", size, multiple)?;
        let denoise = self.denoise.unwrap_or(DENOISE);
        let Some(Start { step, .. }) = Start::new(denoise, steps, false) else {
            let reason =
                format!("leaves none of the {steps} steps for the second pass; expected at least 1 / request.steps");
            return Err(Error::Request { field: "denoise", value: denoise.to_string(), reason });
        };
        Ok(vec![Stage::new(base_size(size, native, multiple), steps), Stage::new(size, steps - step)])
    }

    fn parts(&self) -> StageParts {
        parts::OF_ANY_METHOD
    }

    fn in_place_of_first_stage(&self) -> Option<&'static str> {
        Some("request.denoise")
    }

    /// As much as other methods make anew of a picture that they enlarge.
    fn enlarging_options(&self, _: &Geometry) -> Vec<(&'static str, Value)> {
        vec![("denoise", self.enlarging_strength().into())]
    }

    /// The second pass makes the last of the first one's steps again.
    fn ranges(&self, stages: &[Stage]) -> Vec<Range<usize>> {
        last_steps_again(stages)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |reason: String| Err(Error::Request { field: "stages", value: run.stages_text(), reason });
        let &[first, second] = run.stages() else {
            return refuse(
                "hires fix has two: all steps, and how many of the last ones follow at the final size".into(),
            );
        };
        if second.steps > first.steps {
            return refuse(format!("the second pass makes the last of the first one's {} steps again", first.steps));
        }
        let planned = self.denoise.map(|denoise| Start::new(denoise, first.steps, false));
        let planned = planned.map(|start| start.map_or(0, |start| first.steps - start.step));
        match planned.filter(|&planned| planned != second.steps) {
            None => self.parts.check(run),
            Some(planned) => refuse(format!("request.denoise makes {planned} of the steps; leave one of the two out")),
        }
    }

    /// The last latents, as in diffusers.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let scheduler = sampling.run().scheduler().clone();
        sampling.prepare(vec![scheduler.clone(), scheduler], |coefficients| coefficients)?;
        let (mut composition, trained) = (self.parts.begin(sampling)?, UnetOptions::default());
        let left = sampling.first_stage(|sampling| {
            let x = sampling.initial_noise(sampling.run().stages()[0].size)?;
            Ok(composition.stage(sampling, 0, x, &trained)?.0)
        })?;
        let x = self.enlarged(sampling, &left)?;
        drop(left);
        let (x, _) = composition.stage(sampling, 1, x, &trained)?;
        Ok(x)
    }
}
