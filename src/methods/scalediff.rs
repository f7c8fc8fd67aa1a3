//! ScaleDiff (2025, arXiv:2510.25818): a picture at the model's own size, then stages of twice the sides each, every one of which
//! makes the last steps of the schedule again. In these, self-attention is within neighbourhoods of the size that the network was
//! trained at, the stage begins with latents whose low frequencies are those of enlarged latents and whose high ones are those of the
//! enlarged picture, and every clean sample is pulled towards the low frequencies of that beginning.
//! ```text
//! LP(X)     = up(down(X, int(f h) x int(f w)), h x w)          down, up bilinear, down with antialias; f: low_pass
//! i_0       = int(T (1 - r))                                   T steps in the first stage, r: restart_ratio
//! z_M       = z_RU + LP(z_LU) - LP(z_RU)                       z_LU = bicubic(latents), z_RU = E(bicubic(D(latents)))
//! z         = signal z_M + sigma noise                         where step i_0 begins
//! x_0'      = x_0 + s (LP(z_M) - LP(x_0))                      in each step i_0 to T - 1
//! s         = (1 - abar_t) / (1 - abar_{t of i_0})
//! ```
//! Bicubic is torch's without antialias. The latents are those after a stage's last step; the posterior's mode is encoded, and
//! pictures are not clamped. A neighbourhood is the level's own map in the first stage: the tokens of boxes of half its sides attend
//! to those of a box of its sides around them. Published for SDXL (T 50, r 0.4, f 0.125), which the defaults are; the sampler of
//! the published code for SDXL is not settled by what was read of it, DDIM is ours. SDXL is told the stage's own size. The query
//! jitter, which the authors use for FLUX alone, is not here.
//!
//! Every stage but the last has twice the sides of the one before; the last has the size of the request, which may be less than
//! twice. A picture that the run begins from stands in place of D(latents) of the first stage, which is not run; z_LU then begins with
//! the mean of its posterior, and a neighbourhood is the level's map of the trained area in its proportions.
//!
//! Draws, in order: the first noise; per step one, where the sampler draws; per further stage its noise, then its steps. From a picture
//! those of the further stages.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::relay::Left;
use super::stages::{doubled_sizes, last_steps_again};
use super::{Geometry, Method, ModelFacts, Prediction, Run, Sampling, Size, Stage, check_size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{self, Upsampler};
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, Scheduler, SchedulerConfig};

pub static SCALEDIFF: MethodSpec = MethodSpec {
    name: "scalediff",
    summary: "the model's own size, then twice the sides again and again with attention to neighbourhoods (arXiv:2510.25818)",
    relays: true,
    choices: &[],
    options: OPTIONS,
    parse: |given| from_options(ScaleDiff::default(), given),
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleDiff {
    /// Share of the steps that every stage after the first makes. `None`: what the stages say, 0.4 where they are planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_ratio: Option<f64>,
    /// Sides of the low frequencies over those of the latents.
    pub low_pass: f64,
}

/// Those of SDXL.
const RESTART_RATIO: f64 = 0.4;
const LOW_PASS: f64 = 0.125;

const HEADING: &str = "ScaleDiff";

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "restart_ratio",
        heading: HEADING,
        value_name: "X",
        help: "Share of the steps that each stage after the first makes again, above 0 to 1 (default: 0.4)\n\n\
               The larger, the more of the enlarged picture is made anew.",
        kind: OptionKind::Number { above: 0.0, most: 1.0, expected: "expected a number above 0, at most 1" },
    },
    OptionSpec {
        name: "low_pass",
        heading: HEADING,
        value_name: "X",
        help: "Which frequencies are held to the enlarged latents: the sides to which they are reduced, over their own \
               (default: 0.125)",
        kind: OptionKind::Number { above: 0.0, most: 1.0, expected: "expected a number above 0, at most 1" },
    },
];

impl Default for ScaleDiff {
    fn default() -> ScaleDiff {
        ScaleDiff { restart_ratio: None, low_pass: LOW_PASS }
    }
}

impl From<ScaleDiff> for Method {
    fn from(options: ScaleDiff) -> Method {
        Method::of(&SCALEDIFF, options)
    }
}

/// 1 - abar where step `i` begins, of samples that signal and noise share.
fn noise_share(scheduler: &Scheduler, i: usize) -> f64 {
    let (signal, sigma) = scheduler.noise_level(i);
    sigma * sigma / (signal * signal + sigma * sigma)
}

/// s of each step of a stage.
pub fn structure_guidance(scheduler: &Scheduler, steps: Range<usize>) -> Vec<f64> {
    let first = noise_share(scheduler, steps.start);
    steps.map(|step| noise_share(scheduler, step) / first).collect()
}

impl ScaleDiff {
    /// The steps of a stage after the first, of `steps`; `None`: none is left.
    fn restarted(&self, steps: usize) -> Option<usize> {
        let first = (steps as f64 * (1.0 - self.restart_ratio.unwrap_or(RESTART_RATIO))) as usize;
        (first < steps).then(|| steps - first)
    }

    /// LP: what of samples `[N, h, w, C]` is left in `low_pass` of their sides.
    fn low(&self, x: &Tensor) -> Result<Tensor> {
        let [_, h, w, _] = x.dims("scalediff", "x")?;
        let reduced = [h, w].map(|side| ((side as f64 * self.low_pass) as usize).max(1));
        let low = ops::resize(x, reduced, Upsampler::Bilinear, None, None)?;
        ops::resize(&low, [h, w], Upsampler::Bilinear, None, None)
    }

    /// From what stage `to - 1` leaves to z_M of stage `to`.
    fn mixed(&self, sampling: &mut Sampling, to: usize, left: &Left) -> Result<Tensor> {
        sampling.dump_left(to, left)?;
        let x = sampling.samples_left(to, left)?;
        let enlarge = |x: &Tensor, sides| ops::resize(x, sides, Upsampler::BicubicTorch, None, None);
        let pictures = sampling.enlarged_left(to, left, |picture, sides| enlarge(&picture, sides))?;
        let [_, h, w, _] = sampling.sample_shape(sampling.run().stages()[to].size);
        let latents = enlarge(&x, [h, w])?;
        let encoded = sampling.encoded_pictures(to, &pictures, false)?;
        drop(pictures);
        let low = ops::add_scaled(&self.low(&latents)?, &self.low(&encoded)?, -1.0)?;
        let mixed = ops::add(&encoded, &low)?;
        sampling.dump(&format!("relay{to}.mixed"), &mixed)?;
        Ok(mixed)
    }

    fn check_model(model: &ModelFacts) -> Result<()> {
        let self_attention =
            |unet: &crate::models::UnetConfig| (0..unet.down_blocks.len()).any(|level| unet.self_attentions(level) > 0);
        match &model.unet {
            Some(unet) if self_attention(unet) => Ok(()),
            _ => {
                let reason = "scalediff changes the self-attention of a UNet, which this model does not have";
                Err(Error::config(format!("model {}", model.name), reason))
            }
        }
    }
}

impl GenerationMethod for ScaleDiff {
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        if config.is_flow_matching() { config.sampler() } else { Sampler::Ddim }
    }

    /// Twice the sides.
    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    /// All steps at the native area in the final aspect ratio; then twice the sides until the final size is reached.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, sides, steps, .. } = geometry;
        check_size("size", size, sides.multiple())?;
        let sizes = doubled_sizes(geometry);
        if sizes.len() == 1 {
            return Ok(vec![Stage::new(size, steps)]);
        }
        let Some(restarted) = self.restarted(steps) else {
            let reason = format!("leaves none of the {steps} steps for a stage after the first; expected more");
            let ratio = self.restart_ratio.unwrap_or(RESTART_RATIO);
            return Err(Error::Request { field: "restart_ratio", value: ratio.to_string(), reason });
        };
        let stage = |(i, size)| Stage::new(size, if i == 0 { steps } else { restarted });
        Ok(sizes.into_iter().enumerate().map(stage).collect())
    }

    fn in_place_of_first_stage(&self) -> Option<&'static str> {
        Some("request.restart_ratio")
    }

    /// Each stage after the first makes the last of its steps again.
    fn ranges(&self, stages: &[Stage]) -> Vec<Range<usize>> {
        last_steps_again(stages)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        let share = |value: f64| value > 0.0 && value <= 1.0;
        if !share(self.low_pass) {
            return refuse("low_pass", self.low_pass.to_string(), "expected a number above 0, at most 1".into());
        }
        if let Some(ratio) = self.restart_ratio.filter(|&ratio| !share(ratio)) {
            return refuse("restart_ratio", ratio.to_string(), "expected a number above 0, at most 1".into());
        }
        let (first, later) = (run.stages()[0], &run.stages()[1..]);
        if later.iter().any(|stage| stage.steps > first.steps) {
            let reason = format!("stages after the first make the last of its {} steps again", first.steps);
            return refuse("stages", run.stages_text(), reason);
        }
        if self.restart_ratio.is_some() && later.iter().any(|stage| Some(stage.steps) != self.restarted(first.steps)) {
            let planned = self.restarted(first.steps).unwrap_or(0);
            let reason = format!("request.restart_ratio makes {planned} of the steps; leave one of the two out");
            return refuse("stages", run.stages_text(), reason);
        }
        run.check_revisable()?;
        run.model().map_or(Ok(()), ScaleDiff::check_model)
    }

    /// The last latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let stages = run.stages();
        sampling.prepare(vec![run.scheduler().clone(); stages.len()], |coefficients| coefficients)?;
        let [_, height, width, _] = sampling.sample_shape(run.trained_size());
        let options = UnetOptions { neighbourhood: Some([height, width]), ..UnetOptions::default() };
        let mut left = sampling.first_stage(|sampling| {
            let noise = sampling.initial_noise(stages[0].size)?;
            Ok(sampling.stage(0, noise, &|_| Prediction::default())?.0)
        })?;
        for stage in 1..stages.len() {
            let mixed = self.mixed(sampling, stage, &left)?;
            let low = self.low(&mixed)?;
            let range = run.ranges()[stage].clone();
            let noised = sampling.noised(stage, &mixed, range.start)?;
            drop(mixed);
            sampling.dump(&format!("relay{stage}.noised"), &noised)?;
            let strengths = structure_guidance(run.scheduler(), range);
            let mut revise = |_: &mut Sampling, step: usize, x0: &Tensor| {
                let difference = ops::add_scaled(&low, &self.low(x0)?, -1.0)?;
                ops::add_scaled(x0, &difference, strengths[step] as f32).map(Some)
            };
            left = Left::Samples(sampling.revised_stage(stage, noised, &|_| options.clone().into(), &mut revise)?.0);
        }
        sampling.last_samples(left)
    }
}
