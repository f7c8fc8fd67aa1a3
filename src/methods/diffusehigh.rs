//! DiffuseHigh (Kim et al., AAAI 2025, arXiv:2406.18459): a picture at the model's own size, enlarged and sharpened, then the
//! last steps again at each larger size, where the low frequencies of the first of them are held to the enlarged picture.
//! ```text
//! g     = 2 u - blur(u), u = Phi(clamp(D(x)))                   the guide: Phi bicubic, blur a 3x3 Gaussian of drawn sigma
//! x_t   = signal_t E(g) + sigma_t noise                         where the stage's steps of the first stage's schedule begin
//! x0'   = E(W^-1(LL of W(g), the rest of W(clamp(D(x0)))))      in the stage's first steps; W one level of db4
//! x_s   = as for a network that predicted x0'                   the other steps: as they are
//! ```
//! The published code runs 50 steps at 1024x1024, then the last 15 at each further size, the first 5 of them held, by Euler; its
//! sizes are 2048, 3072 and 4096. Pictures are clamped where they are decoded, the sharpened one is not; E gives the
//! posterior's mean. The network is told the first stage's size in all stages.
//!
//! A picture that the run begins from stands in place of clamp(D(x)) of the first stage, which is not run; it may have any size, and the
//! network is told the trained area in its proportions.
//!
//! Draws, in order: the first noise; per step one, where the sampler draws; per further stage its noise, which is all of them from a picture.
//! The code also draws noise in every step of Euler, which it multiplies by 0; here it does not.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::relay::Left;
use super::stages::{grown_sizes, last_steps_again};
use super::{Geometry, Method, Prediction, Run, Sampling, Size, Stage, check_size};
use crate::error::{Error, Result};
use crate::ops::{self, Upsampler};
use crate::rng::TorchUniform;
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, SchedulerConfig};

pub static DIFFUSEHIGH: MethodSpec = MethodSpec {
    name: "diffusehigh",
    summary: "every step at the model's own size, then the last ones again on the enlarged, sharpened picture, whose low \
              frequencies lead (arXiv:2406.18459)",
    relays: true,
    choices: &[BLUR],
    options: OPTIONS,
    parse: |given| from_options(DiffuseHigh::default(), given),
};

/// `[stages - 1]`, F32: standard deviation of the Gaussian that sharpens, in pixels.
const BLUR: &str = "blur";
const BLUR_RANGE: [f32; 2] = [0.1, 2.0];
/// Of the published code: the steps of the first stage, of each later one, and how many of these are held.
const PUBLISHED_STEPS: [usize; 3] = [50, 15, 5];

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffuseHigh {
    /// Of the stages after the first.
    pub refine_guidance: f32,
    /// Steps of each later stage that are held to the guide; `None`: a third of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wavelet_steps: Option<usize>,
    /// Is the enlarged picture sharpened?
    pub sharpen: bool,
}

const HEADING: &str = "DiffuseHigh";

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "refine_guidance",
        heading: HEADING,
        value_name: "X",
        help: "Guidance scale of the stages after the first (default: 10)\n\n\
               Without guidance in the first stage (request.guidance 1) there is none in the others.",
        kind: OptionKind::Number { above: 1.0, most: 1000.0, expected: "expected a number above 1, at most 1000" },
    },
    OptionSpec {
        name: "wavelet_steps",
        heading: HEADING,
        value_name: "N",
        help: "Steps of each later stage that take the low frequencies of the enlarged picture (default: a third of them)\n\n\
               5 of 15, as published. Each of them decodes and encodes the picture. 0: none.",
        kind: OptionKind::Integer { least: 0, most: 100_000, expected: "expected a number of steps from 0" },
    },
    OptionSpec {
        name: "sharpen",
        heading: HEADING,
        value_name: "BOOL",
        help: "Sharpen the enlarged picture, by a Gaussian of drawn width (default: true)",
        kind: OptionKind::Bool,
    },
];

impl Default for DiffuseHigh {
    fn default() -> DiffuseHigh {
        DiffuseHigh { refine_guidance: 10.0, wavelet_steps: None, sharpen: true }
    }
}

impl From<DiffuseHigh> for Method {
    fn from(options: DiffuseHigh) -> Method {
        Method::of(&DIFFUSEHIGH, options)
    }
}

impl DiffuseHigh {
    /// How many steps of a later stage are held, of `steps`.
    fn held(&self, steps: usize) -> usize {
        let [_, published, held] = PUBLISHED_STEPS;
        self.wavelet_steps.unwrap_or((steps * held).div_ceil(published)).min(steps)
    }

    /// The pictures that lead stage `stage`, from what the one before leaves: enlarged, and sharpened by `blur` of each.
    fn guides(&self, sampling: &mut Sampling, stage: usize, left: &Left, blur: &[Option<f32>]) -> Result<Vec<Tensor>> {
        let mut blur = blur.iter();
        sampling.enlarged_left(stage, left, |picture, size| {
            let picture = ops::clamp(&picture, -1.0, 1.0)?;
            let enlarged = ops::resize(&picture, size, Upsampler::BicubicTorch, None, None)?;
            match blur.next().copied().flatten() {
                Some(sigma) => ops::sharpen(&enlarged, sigma),
                None => Ok(enlarged),
            }
        })
    }

    /// The samples that stage `stage` begins with.
    fn noised(sampling: &mut Sampling, stage: usize, guides: &[Tensor]) -> Result<Tensor> {
        let level = sampling.run().ranges()[stage].start;
        let encoded = sampling.encoded_pictures(stage, guides, false)?;
        let noised = sampling.noised(stage, &encoded, level)?;
        sampling.dump(&format!("relay{stage}.noised"), &noised)?;
        Ok(noised)
    }
}

/// Clean samples whose pictures have the low frequencies of the guides.
fn led(sampling: &mut Sampling, x0: &Tensor, guides: &[Tensor]) -> Result<Tensor> {
    // Picture by picture: a batch needs no more memory for it than one.
    let lead = |(x0, guide): (Tensor, &Tensor)| {
        let decoded = sampling.decode(&x0)?.remove(0);
        let picture = ops::exchange_low_band(&ops::clamp(&decoded, -1.0, 1.0)?, guide)?;
        sampling.encode(&[picture], None)
    };
    Tensor::concat(&super::images(x0)?.into_iter().zip(guides).map(lead).collect::<Result<Vec<_>>>()?)
}

impl GenerationMethod for DiffuseHigh {
    /// The model's own where a step is one evaluation that knows no earlier ones, else Euler, the published code's.
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        match config.sampler() {
            own @ (Sampler::Ddim | Sampler::Euler | Sampler::FlowEuler) => own,
            _ => Sampler::Euler,
        }
    }

    /// Twice the sides.
    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    /// All steps at the native area in the final aspect ratio, then 15 of 50 at each further size; from one to the next the
    /// sides grow by at most the native ones. Sizes up to 1.1 times the native sides: one stage.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, steps, sides, .. } = geometry;
        check_size("size", size, sides.multiple())?;
        let [of, repeated, _] = PUBLISHED_STEPS;
        let later = (steps * repeated).div_ceil(of);
        let stage = |(i, size)| Stage::new(size, if i == 0 { steps } else { later });
        Ok(grown_sizes(geometry, 1.0).into_iter().enumerate().map(stage).collect())
    }

    /// Each stage makes the last of the first one's steps again.
    fn ranges(&self, stages: &[Stage]) -> Vec<Range<usize>> {
        last_steps_again(stages)
    }

    /// The first stage's, as published.
    fn told_size(&self, run: &Run, _stage: usize) -> Size {
        run.trained_size()
    }

    fn in_place_of_first_stage(&self) -> Option<&'static str> {
        Some("the number of steps of the later request.stages")
    }

    fn step_name(&self, stage: usize, step: usize, run_step: usize) -> String {
        if stage == 0 { format!("step{run_step}") } else { format!("stage{}.step{step}", stage + 1) }
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        let (first, later) = (run.stages()[0].steps, &run.stages()[1..]);
        if later.iter().any(|stage| stage.steps > first) {
            let reason = format!("each later stage makes the last of the first one's {first} steps again");
            return refuse("stages", run.stages_text(), reason);
        }
        if !(self.refine_guidance > 1.0 && self.refine_guidance.is_finite()) {
            return refuse("refine_guidance", self.refine_guidance.to_string(), "expected a number above 1".into());
        }
        match later.iter().any(|stage| self.held(stage.steps) > 0) {
            true => run.check_revisable(),
            false => Ok(()),
        }
    }

    /// The last stage's latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let stages = sampling.run().stages();
        sampling.prepare(vec![sampling.run().scheduler().clone(); stages.len()], |coefficients| coefficients)?;
        let later = stages.len() - 1;
        let images = sampling.sample_shape(stages[0].size)[0];
        // Of each picture, one per later stage.
        let mut blur = vec![vec![None; later]; images];
        if self.sharpen && later > 0 {
            let [low, high] = BLUR_RANGE;
            let drawn = sampling.choose_f32(BLUR, &[later], low..=high, &mut |seed| {
                let mut rng = TorchUniform::new(seed);
                (0..later).map(|_| rng.uniform(low, high)).collect()
            })?;
            blur = drawn.into_iter().map(|of_picture| of_picture.into_iter().map(Some).collect()).collect();
        }
        let mut left = sampling.first_stage(|sampling| {
            let x = sampling.initial_noise(stages[0].size)?;
            let (x, _) = sampling.stage(0, x, &|_| Prediction::default())?;
            sampling.dump("stage1.latent", &x)?;
            Ok(x)
        })?;
        sampling.set_guidance_scale(self.refine_guidance);
        for stage in 1..stages.len() {
            let of_stage: Vec<Option<f32>> = blur.iter().map(|of_picture| of_picture[stage - 1]).collect();
            let guides = self.guides(sampling, stage, &left, &of_stage)?;
            drop(left);
            let held = self.held(stages[stage].steps);
            let noised = DiffuseHigh::noised(sampling, stage, &guides)?;
            let (x, _) =
                sampling.revised_stage(stage, noised, &|_| Prediction::default(), &mut |sampling, step, x0| {
                    if step < held { led(sampling, x0, &guides).map(Some) } else { Ok(None) }
                })?;
            sampling.dump(&format!("stage{}.latent", stage + 1), &x)?;
            left = Left::Samples(x);
        }
        sampling.last_samples(left)
    }
}
