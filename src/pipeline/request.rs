use super::ModelSource;
use crate::error::{Error, Result};
use crate::methods::{self, Method, Plan, RelayClamp, Size, Stage};
use crate::ops::Upsampler;
use crate::rng::RngKind;
use crate::schedulers::{Sampler, Scheduler, SchedulerConfig};

/// Everything that decides a picture, beside the model. `None` and an empty list mean: chosen from the model and the
/// method. The other defaults are for Stable Diffusion; [`Request::suited_to`] has those of any model.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub prompt: String,
    /// What guidance steers away from; the empty prompt by default.
    pub negative_prompt: String,
    pub method: Method,
    /// Size of the final picture. Default: the last of `stages`; without those the model's native size (plain) or twice
    /// its sides (MegaFusion; four times for models below 128 pixels).
    pub size: Option<Size>,
    /// Sizes and steps, smallest first; empty: planned from `size` by [`methods::default_stages`].
    pub stages: Vec<Stage>,
    pub upsampler: Upsampler,
    pub relay_clamp: RelayClamp,
    /// Noise re-scheduling in stages 2 and later. Default: true for `megafusion++`.
    pub reschedule: Option<bool>,
    /// Dilation of the UNet's middle block in stages 2 and later. Default: 2 for `megafusion++`, else 1.
    pub dilation: Option<usize>,
    /// gamma of the re-scheduling, in place of the stage's area over the first stage's (figure 8 of the paper).
    pub gamma: Option<f64>,
    /// How many steps less noisy a relay's noise is than the step that follows it; -1: the level in the paper's text.
    pub relay_noise_offset: i32,
    /// Do as the published code of MegaFusion does where it differs from the paper.
    pub reference_compat: bool,
    /// Default: the sampler of the model's own scheduler class; `ddim` where that has none here (PNDM, as in SD 1.5's
    /// files, DPM-Solver) and for `reference_compat`.
    pub scheduler: Option<Sampler>,
    /// DDIM's share of fresh noise per step, 0 to 1.
    pub eta: f64,
    /// Steps over all stages. Default: the sum of `stages`, else 50.
    pub steps: Option<usize>,
    /// Classifier-free guidance scale; up to 1: no guidance.
    pub guidance: f32,
    /// Picture i of `count` uses seed + i.
    pub seed: u64,
    pub count: usize,
    pub rng: RngKind,
}

impl Default for Request {
    fn default() -> Request {
        Request {
            prompt: String::new(),
            negative_prompt: String::new(),
            method: Method::default(),
            size: None,
            stages: Vec::new(),
            upsampler: Upsampler::default(),
            relay_clamp: RelayClamp::default(),
            reschedule: None,
            dilation: None,
            gamma: None,
            relay_noise_offset: 0,
            reference_compat: false,
            scheduler: None,
            eta: 0.0,
            steps: None,
            guidance: 7.0,
            seed: 0,
            count: 1,
            rng: RngKind::default(),
        }
    }
}

/// Steps of a run when nothing says otherwise; the paper's and diffusers'.
const DEFAULT_STEPS: usize = 50;
/// Pixels of the longer side: the pictures of models trained below it are four times as wide by default, others' twice.
const SMALL_NATIVE_SIDE: usize = 128;

impl Request {
    /// The defaults with the method and the guidance that suit a model: plain `megafusion` and 2 for the one inside the
    /// program (docs/ablations.md, models/pocket/README.md), `megafusion++` and 7 for any other.
    pub fn suited_to(source: &ModelSource) -> Request {
        match source {
            ModelSource::Embedded => Request { method: Method::MegaFusion, guidance: 2.0, ..Request::default() },
            ModelSource::Directory(_) => Request { method: Method::MegaFusionPlus, ..Request::default() },
        }
    }

    /// The plan for a model with this scheduler configuration, native size and pixels per latent cell.
    ///
    /// # Errors
    /// [`Error::Request`]: an option and what it would accept; [`Error::Config`] for the scheduler's configuration.
    pub fn resolve(&self, config: &SchedulerConfig, native: Option<Size>, factor: usize) -> Result<Plan> {
        if self.count == 0 {
            return Err(refused("--count", self.count, "expected at least 1"));
        }
        if !self.guidance.is_finite() || self.guidance < 0.0 {
            return Err(refused("--guidance", self.guidance, "expected a number from 0; up to 1 means no guidance"));
        }
        let stages = self.resolve_stages(native, factor)?;
        let steps = stages.iter().map(|stage| stage.steps).sum();
        if let Some(asked) = self.steps.filter(|&asked| asked != steps) {
            return Err(refused(
                "--steps",
                asked,
                format!("the --stages have {steps} steps; leave one of the two out"),
            ));
        }
        let sampler = match self.scheduler {
            Some(sampler) => sampler,
            None if self.reference_compat => Sampler::Ddim,
            None => config.sampler(),
        };
        let plan = Plan {
            method: self.method,
            scheduler: Scheduler::new(config, sampler, steps, self.eta)?,
            stages,
            guidance: (self.guidance > 1.0).then_some(self.guidance),
            upsampler: self.upsampler,
            relay_clamp: self.relay_clamp,
            reschedule: self.reschedule.unwrap_or(self.method.reschedules()),
            dilation: self.dilation.unwrap_or(self.method.dilation()),
            gamma: self.gamma,
            relay_noise_offset: self.relay_noise_offset,
            reference_compat: self.reference_compat,
        };
        plan.check(factor)?;
        Ok(plan)
    }

    fn resolve_stages(&self, native: Option<Size>, factor: usize) -> Result<Vec<Stage>> {
        if let Some(last) = self.stages.last() {
            if let Some(size) = self.size.filter(|&size| size != last.size) {
                return Err(refused(
                    "--size",
                    size,
                    format!("the last of --stages is {}; leave one of the two out", last.size),
                ));
            }
            return Ok(self.stages.clone());
        }
        let steps = self.steps.unwrap_or(DEFAULT_STEPS);
        if steps == 0 {
            return Err(refused("--steps", steps, "expected at least 1"));
        }
        let (size, native) = match (self.size, native) {
            (Some(size), Some(native)) => (size, native),
            (None, Some(native)) => (self.default_size(native), native),
            (Some(size), None) if self.method == Method::Plain => (size, size),
            (Some(size), None) => {
                let reason = "the model's configuration has no sample_size to plan stages from; name --stages";
                return Err(refused("--size", size, reason));
            }
            (None, None) => {
                let reason = "the model's configuration has no sample_size; name the size, or --stages";
                return Err(refused("--size", "(none)", reason));
            }
        };
        methods::default_stages(self.method, size, native, factor, steps)
    }

    fn default_size(&self, native: Size) -> Size {
        let scale = match self.method {
            Method::Plain => 1,
            _ if native.width.max(native.height) < SMALL_NATIVE_SIDE => 4,
            _ => 2,
        };
        Size::new(scale * native.width, scale * native.height)
    }
}

fn refused(flag: &'static str, value: impl ToString, reason: impl Into<String>) -> Error {
    Error::Request { flag, value: value.to_string(), reason: reason.into() }
}
