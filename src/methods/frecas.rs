//! FreCaS (Zhang et al., ICLR 2025, arXiv:2410.18410): stages of growing sizes, each of which begins noisier than the one before
//! it ended; guidance split by frequency; maps of cross-attention handed on.
//! ```text
//! ts[k] = trunc(st + k (et - st) / (n - 1)), k = 0 .. n - 1              of a stage of n steps, from st to et; one step: st
//! st    = the last timestep of the training; of later stages the smallest t whose
//!         abar_t / (1 - abar_t) <= r^-gamma abar_et / (1 - abar_et)      et of the stage before, r the larger ratio of sides
//! x_t   = sqrt(abar_st) E(Phi(clamp(D(x0)))) + sqrt(1 - abar_st) noise   Phi nearest neighbour, x0 of the stage's last step
//! e     = u + w low(d) + w_h (d - low(d)), d = c - u                     in later stages; low: to the map before and back
//! attn  = (1 - w_c) softmax(Q K^T / sqrt(d)) V + w_c M V                 M of the stage before's last step
//! ```
//! A step goes to the list's next timestep by DDIM; the last one of the last stage gives the picture its clean sample. The network
//! is told the first stage's size in all stages. Numbers that no option gives are those of the published command lines, chosen by
//! the size that the model was trained at and by the number of stages ([`FreCaS::guidance_high`] is a request's): SDXL's for 1024x1024
//! and more, SD 2.1's for smaller ones. These are published for a guidance of 7.5 in the first stage; models trained below 128
//! pixels, whose guidance is lower, get w_h 6.
//!
//! A picture that the run begins from stands in place of clamp(D(x0)) of the first stage, which is not run; there are then no maps for
//! the second one, and the network is told the trained area in the picture's proportions.
//!
//! Draws: the first noise; per relay its noise, with `reference_compat` after the posterior's; with an eta one per step. From a picture
//! those of the relays and of the later stages' steps.

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::relay::Left;
use super::stages::doubled_sizes;
use super::{Geometry, Method, Prediction, Run, Sampling, Size, Stage, check_size};
use crate::error::{Error, Result};
use crate::models::{AttentionMaps, UnetOptions};
use crate::names::named;
use crate::ops::{self, Upsampler};
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, Scheduler, SchedulerConfig};

pub static FRECAS: MethodSpec = MethodSpec {
    name: "frecas",
    summary: "stages of doubling sizes, each begun noisier than the last one ended, with guidance split by frequency and maps of \
              cross-attention handed on (arXiv:2410.18410)",
    relays: true,
    choices: &[],
    options: OPTIONS,
    parse: |given| from_options(FreCaS::default(), given),
};

/// How FreCaS enlarges a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum FrecasUpsampler {
    #[default]
    Nearest,
    /// As torch does, without antialias.
    Bilinear,
    /// As torch does, without antialias.
    Bicubic,
}

named!(FrecasUpsampler, [Nearest => "nearest", Bilinear => "bilinear", Bicubic => "bicubic"]);

/// Frequency-aware cascaded sampling: arXiv:2410.18410.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreCaS {
    /// The timestep at which each stage but the last ends, `200,200`; `None`: as published for the model and the stages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frecas_ends: Option<String>,
    /// gamma: the signal-to-noise ratio falls by the ratio of sides to this power.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frecas_gamma: Option<f64>,
    /// w_c
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map_reuse: Option<f64>,
    pub frecas_upsampler: FrecasUpsampler,
    /// Do as the published code does where that is not what the method says:
    /// * a step goes from t to t - d, d of the stage, which is a timestep or two, or ten, off the next one;
    /// * the last step steps too, to t = 0, so that the result keeps the noise of that level;
    /// * the relay's encoder samples its posterior, a draw before the relay's own;
    /// * maps of cross-attention are resized along their tokens, which scrambles their columns.
    pub reference_compat: bool,
}

const HEADING: &str = "FreCaS";

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "frecas_ends",
        heading: HEADING,
        value_name: "T,...",
        help: "Timestep at which each stage but the last ends (default: by the model's size and the number of stages)\n\n\
               As published: 200 for one relay of a model trained at 1024x1024, 400,200 for two; of smaller ones 100, and \
               200,200. The larger, the less of a picture is decided in the small stage.",
        kind: OptionKind::Text { check: |text| timesteps(text).map(drop) },
    },
    OptionSpec {
        name: "frecas_gamma",
        heading: HEADING,
        value_name: "X",
        help: "How much noisier a stage begins: its signal-to-noise ratio is that of the end before over the ratio of sides to this \
               power (default: 1.5 for one relay of a model trained at 1024x1024, 2 for two; 3 of smaller ones)",
        kind: OptionKind::Number {
            above: 0.0,
            most: 20.0,
            expected: "expected a number above 0, at most 20; 2 is usual",
        },
    },
    OptionSpec {
        name: "map_reuse",
        heading: HEADING,
        value_name: "X",
        help: "Share of cross-attention that goes by the maps of the stage before, 0 (none) to 1 (default: 0.6; 0.4 for two relays of a \
               model trained below 1024x1024)",
        kind: OptionKind::Share,
    },
    OptionSpec {
        name: "frecas_upsampler",
        heading: HEADING,
        value_name: "U",
        help: "How FreCaS enlarges a picture: nearest, bilinear or bicubic (default: nearest)",
        kind: OptionKind::Choice(FrecasUpsampler::NAMES),
    },
    OptionSpec {
        name: "reference_compat",
        heading: HEADING,
        value_name: "",
        help: "Do as the published code does where it differs from the paper",
        kind: OptionKind::Switch,
    },
];

/// Timesteps with commas between them, as [`OptionKind::Text`] checks them.
fn timesteps(text: &str) -> std::result::Result<Vec<usize>, String> {
    let all: Option<Vec<usize>> =
        text.split(',').map(|number| number.trim().parse().ok().filter(|&t| t < 1000usize)).collect();
    all.ok_or_else(|| "expected timesteps from 0 to 999 with commas between them, like 400,200".into())
}

/// The published numbers.
struct Preset {
    /// Of every stage but the last.
    ends: Vec<usize>,
    gamma: f64,
    /// w_h
    high: f32,
    /// w_c
    reuse: f64,
}

/// From this trained side on SDXL's, below SD 2.1's; those of a guidance of 7.5 are too much below the other one.
const LARGE_NATIVE_SIDE: usize = 1024;
const SMALL_NATIVE_SIDE: usize = 128;

fn is_large(native: Size) -> bool {
    native.area() >= LARGE_NATIVE_SIDE * LARGE_NATIVE_SIDE
}

impl Preset {
    fn of(run: &Run) -> Preset {
        let relays = run.stages().len().saturating_sub(1);
        let mut preset = match (run.native().is_some_and(is_large), relays) {
            (false, 0 | 1) => Preset { ends: vec![100; relays], gamma: 3.0, high: 45.0, reuse: 0.6 },
            (false, _) => Preset { ends: vec![200; relays], gamma: 3.0, high: 35.0, reuse: 0.4 },
            (true, 0 | 1) => Preset { ends: vec![200; relays], gamma: 1.5, high: 35.0, reuse: 0.6 },
            (true, _) => Preset { ends: vec![400; relays], gamma: 2.0, high: 35.0, reuse: 0.6 },
        };
        if let (Some(last), Some(native)) = (preset.ends.last_mut(), run.native()) {
            if is_large(native) {
                *last = 200;
            }
            if native.width.max(native.height) < SMALL_NATIVE_SIDE {
                preset.high = 6.0;
            }
        }
        preset
    }
}

impl From<FreCaS> for Method {
    fn from(options: FreCaS) -> Method {
        Method::of(&FRECAS, options)
    }
}

impl FreCaS {
    /// What the network is told in every stage: the timesteps `ts`.
    ///
    /// # Errors
    /// [`Error::Request`]: ends of another number than there are relays, or not below where their stage begins; more steps in a
    /// stage than timesteps; stages that shrink.
    pub fn timesteps(&self, run: &Run, alphas_cumprod: &[f64]) -> Result<Vec<Vec<usize>>> {
        let (stages, preset) = (run.stages(), Preset::of(run));
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        let gamma = self.frecas_gamma.unwrap_or(preset.gamma);
        if !(gamma.is_finite() && gamma >= 0.0) {
            return refuse("frecas_gamma", gamma.to_string(), "expected a number from 0".into());
        }
        let mut ends = preset.ends;
        if let Some(text) = &self.frecas_ends {
            ends = match timesteps(text) {
                Ok(given) if given.len() + 1 == stages.len() => given,
                Ok(_) => {
                    let (relays, stages) = (stages.len() - 1, run.stages_text());
                    let reason = format!("expected one timestep per stage but the last, so {relays} for {stages}");
                    return refuse("frecas_ends", text.clone(), reason);
                }
                Err(reason) => return refuse("frecas_ends", text.clone(), reason),
            };
        }
        ends.push(0);
        let mut start = alphas_cumprod.len() - 1;
        let mut all = Vec::new();
        for (index, (stage, &end)) in stages.iter().zip(&ends).enumerate() {
            if let Some(before) = index.checked_sub(1) {
                let (from, to) = (stages[before].size, stage.size);
                let ratio = (to.height as f64 / from.height as f64).max(to.width as f64 / from.width as f64);
                if to.height < from.height || to.width < from.width {
                    return refuse(
                        "stages",
                        run.stages_text(),
                        "no stage may be smaller than the one before it".into(),
                    );
                }
                start = noisier(alphas_cumprod, ends[before], ratio.powf(-gamma));
            }
            let last = index + 1 == stages.len();
            if end >= start && !last {
                let reason = format!("stage {} begins at timestep {start}; expected an end below it", index + 1);
                return refuse("frecas_ends", end.to_string(), reason);
            }
            if stage.steps > start - end + 1 {
                let reason = format!(
                    "stage {} goes from timestep {start} to {end}, which has room for {} steps",
                    index + 1,
                    start - end + 1
                );
                return refuse("stages", run.stages_text(), reason);
            }
            let down = |k: usize| (k * (start - end)).div_ceil((stage.steps - 1).max(1));
            all.push((0..stage.steps).map(|k| start - down(k)).collect());
        }
        Ok(all)
    }

    /// Of every timestep the one that its step goes to.
    fn targets(&self, of_stage: &[usize], trained: usize) -> Vec<usize> {
        let (first, last, steps) = (of_stage[0], of_stage[of_stage.len() - 1], of_stage.len());
        if !self.reference_compat {
            // The last one's samples are read by nobody.
            return of_stage[1..].iter().chain(&[last]).copied().collect();
        }
        if steps == 1 {
            return vec![0];
        }
        let distance = trained / (trained * (steps - 1) / (first - last).max(1)).max(1);
        of_stage.iter().map(|t| t.saturating_sub(distance)).collect()
    }

    /// w_c
    fn reuse(&self, run: &Run) -> f32 {
        self.map_reuse.unwrap_or(Preset::of(run).reuse) as f32
    }

    /// What a step of a stage asks of the network.
    fn prediction(&self, run: &Run, stage: usize, step: usize) -> Prediction {
        let (weight, steps, last) = (self.reuse(run), run.stages()[stage].steps, stage + 1 == run.stages().len());
        let attention_maps = AttentionMaps {
            collect: weight > 0.0 && !last && step + 1 == steps,
            // The first stage that is made has no maps before it.
            reuse: if stage > run.first_stage() { weight } else { 0.0 },
            flat: self.reference_compat,
        };
        UnetOptions { attention_maps, ..UnetOptions::default() }.into()
    }

    /// From what leaves stage `to - 1` to the noised samples that enter `to`.
    fn relayed(&self, sampling: &mut Sampling, to: usize, left: &Left) -> Result<Tensor> {
        sampling.dump_left(to, left)?;
        let enlarged = sampling.enlarged_left(to, left, |picture, size| {
            let picture = ops::clamp(&picture, -1.0, 1.0)?;
            match self.frecas_upsampler {
                FrecasUpsampler::Nearest => ops::resize_nearest(&picture, size),
                FrecasUpsampler::Bilinear => ops::resize_bilinear(&picture, size),
                FrecasUpsampler::Bicubic => ops::resize(&picture, size, Upsampler::BicubicTorch, None, None),
            }
        })?;
        self.entered(sampling, to, &enlarged)
    }

    /// The noised samples that enter stage `to`, of pictures of its size.
    fn entered(&self, sampling: &mut Sampling, to: usize, pictures: &[Tensor]) -> Result<Tensor> {
        let encoded = sampling.encoded_pictures(to, pictures, self.reference_compat)?;
        let level = sampling.run().ranges()[to].start;
        let noised = sampling.noised(to, &encoded, level)?;
        sampling.dump(&format!("relay{to}.noised"), &noised)?;
        Ok(noised)
    }
}

/// The smallest timestep whose signal-to-noise ratio is at most that of `end` times `scale`.
fn noisier(alphas_cumprod: &[f64], end: usize, scale: f64) -> usize {
    let abar = alphas_cumprod[end];
    // So written that a scale of 1 gives the end itself.
    let target = if scale == 1.0 { abar } else { scale * abar / (1.0 + (scale - 1.0) * abar) };
    alphas_cumprod.iter().position(|&abar| abar <= target).unwrap_or(alphas_cumprod.len() - 1)
}

impl GenerationMethod for FreCaS {
    /// The published code's, whatever the model's own is.
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        if config.is_flow_matching() { config.sampler() } else { Sampler::Ddim }
    }

    /// Twice the sides.
    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    /// The native area in the final aspect ratio, then twice the sides each time. Of 50 steps one relay has 10; two have 10 each,
    /// or 5 and 15 for models trained at 1024x1024, which more of them share in the same way.
    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        let &Geometry { size, native, sides, steps, .. } = geometry;
        check_size("size", size, sides.multiple())?;
        let sizes = doubled_sizes(geometry);
        let relays = sizes.len() - 1;
        let share = |relay: usize| match (is_large(native), relays) {
            (_, 1) => 10.0,
            (false, _) => 20.0 / relays as f64,
            (true, _) if relay == relays => 15.0,
            (true, _) => 5.0 / (relays - 1) as f64,
        };
        let of = |relay| ((steps as f64 * share(relay) / 50.0).round() as usize).max(1);
        let later: Vec<usize> = (1..=relays).map(of).collect();
        let Some(first) = steps.checked_sub(later.iter().sum()).filter(|&first| first > 0) else {
            let reason = format!("expected a step for each of {} stages at least", relays + 1);
            return Err(Error::Request { field: "steps", value: steps.to_string(), reason });
        };
        let steps = std::iter::once(first).chain(later);
        Ok(sizes.into_iter().zip(steps).map(|(size, steps)| Stage::new(size, steps)).collect())
    }

    /// The first stage's, as published.
    fn told_size(&self, run: &Run, _stage: usize) -> Size {
        run.trained_size()
    }

    fn in_place_of_first_stage(&self) -> Option<&'static str> {
        Some("request.frecas_ends")
    }

    fn guidance_high(&self, run: &Run) -> Option<f32> {
        (run.stages().len() > 1).then(|| Preset::of(run).high)
    }

    /// In every stage but the first, however large these are.
    fn guidance_grid(&self, run: &Run, stage: usize) -> Option<[usize; 2]> {
        stage.checked_sub(1).map(|before| run.cells(run.stages()[before].size))
    }

    fn schedule(&self, scheduler: Scheduler, run: &Run) -> Result<Scheduler> {
        if scheduler.sampler() != Sampler::Ddim {
            let reason = "frecas decides the timesteps of its stages itself, and steps between them by ddim".into();
            return Err(Error::Request { field: "scheduler", value: scheduler.sampler().to_string(), reason });
        }
        let trained = scheduler.alphas_cumprod().len();
        let stages = self.timesteps(run, scheduler.alphas_cumprod())?;
        let steps = stages.iter().flat_map(|of_stage| of_stage.iter().copied().zip(self.targets(of_stage, trained)));
        scheduler.at_timesteps(&steps.collect::<Vec<_>>())
    }

    fn check(&self, run: &Run) -> Result<()> {
        match self.map_reuse.filter(|share| !(0.0..=1.0).contains(share)) {
            None => {}
            Some(share) => {
                let reason = "expected a share from 0 to 1".into();
                return Err(Error::Request { field: "map_reuse", value: share.to_string(), reason });
            }
        }
        // A schedule that was made for other timesteps makes no run of this method.
        self.timesteps(run, run.scheduler().alphas_cumprod()).map(drop)
    }

    /// The clean samples of the last step; as published the last samples.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let stages = run.stages().len();
        sampling.prepare(vec![run.scheduler().clone(); stages], |coefficients| coefficients)?;
        let of_stage = |sampling: &mut Sampling, stage: usize, x: Tensor| {
            let (last, x0) = sampling.stage(stage, x, &|step| self.prediction(run, stage, step))?;
            Ok(if self.reference_compat && stage + 1 == stages { last } else { x0 })
        };
        let mut left = sampling.first_stage(|sampling| {
            let x = sampling.initial_noise(run.stages()[0].size)?;
            of_stage(sampling, 0, x)
        })?;
        for stage in 1..stages {
            let x = self.relayed(sampling, stage, &left)?;
            drop(left);
            left = Left::Samples(of_stage(sampling, stage, x)?);
        }
        sampling.last_samples(left)
    }
}
