//! MegaFusion (Wu et al., WACV 2025, arXiv:2408.11001): truncate and relay, with noise re-scheduling and dilation; and
//! plain sampling, which is its case of one stage.
//!
//! All stages share one list of timesteps; stage s (from 0) takes the next `steps` of them at its own size, on its own
//! schedule abar / (gamma - (gamma - 1) abar), gamma = its area over the first stage's. Between stages the clean sample
//! of the last evaluation, x0, goes through pixel space and is noised for the next stage's first timestep t:
//! ```text
//! x0  = (x_t' - sqrt(1 - abar_t') eps) / sqrt(abar_t')      eq. (2): x and eps of one evaluation
//! x0' = E(Phi(D(x0)))                                       eq. (3): Phi the upsampler
//! x_t = sqrt(abar_t) x0' + sqrt(1 - abar_t) noise           eq. (4), at the level that t is trained for
//! ```
//! Samplers with x = x0 + sigma noise (Euler) do the same with their sigma, which is re-scheduled to sqrt(gamma) sigma.
//! MegaFusion's picture is the decoded x0 of the last evaluation; plain sampling's the decoded last x, as in diffusers.
//!
//! Draws, in order: the first stage's noise; then per step, where the sampler draws, one; per relay one (with
//! `reference_compat` two: the posterior's, then the relay's). A run from a picture: see `methods/start.rs`.

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::parts::{self, PartOptions, with_parts};
use super::{Geometry, Method, ModelFacts, RelayClamp, Run, Sampling, Size, Stage, StageParts, relay_stages};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{self, StepCoefficients, Upsampler};
use crate::runtime::Tensor;
use crate::schedulers::{Sampler, Scheduler, SchedulerConfig};

pub static MEGAFUSION: MethodSpec = MethodSpec {
    name: "megafusion",
    summary: "the first steps at the model's own size, then relays to larger ones (arXiv:2408.11001)",
    relays: true,
    choices: parts::CHOICES,
    options: OPTIONS,
    parse: |given| from_options(MegaFusion::default(), given),
};

pub static MEGAFUSION_PLUS: MethodSpec = MethodSpec {
    name: "megafusion++",
    summary: "the same, with noise re-scheduling and dilated convolutions in the later stages",
    relays: true,
    choices: parts::CHOICES,
    options: OPTIONS,
    parse: |given| from_options(MegaFusion::plus(), given),
};

/// Truncate and relay: Wu et al., WACV 2025, arXiv:2408.11001, sec. 3.2; with [`plus`](MegaFusion::plus) sec. 3.3.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MegaFusion {
    pub upsampler: Upsampler,
    pub relay_clamp: RelayClamp,
    /// Re-schedule stages 2 and later.
    pub reschedule: bool,
    /// gamma of the re-scheduled stages; `None`: each one's area over the first stage's (figure 8 of the paper varies it).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// Dilation of the middle block in stages 2 and later; 1: none.
    pub dilation: usize,
    /// The relay noises to the level of the timestep this many steps after the next one; -1 is the level of the step just
    /// done, which the paper's text has (equation 4), and which the next step does not expect.
    pub relay_noise_offset: i32,
    /// Do as the published code (SDM-MegaFusion) does where it differs from the paper:
    /// * the base schedule of SD is re-scheduled with gamma 2.25 (its default argument) in the first stage, and in all stages
    ///   without `reschedule`; with it, squares of 512, 768 and 1024 (SDXL: 1024, 1536 and 2048) get gamma 1, 2.25 and 4
    ///   whatever the first stage (other sizes get theirs by area; the published code leaves them alone);
    /// * a step's x0 is computed from the already updated latents, with the old output and timestep;
    /// * relay pictures pass through 8-bit RGB, each pass of the resize rounded (so `relay_clamp` says nothing);
    /// * the relay's encoder samples its posterior, a draw before the relay's own;
    /// * dilation holds in every stage.
    pub reference_compat: bool,
    /// Of stages with parts.
    #[serde(flatten)]
    pub parts: PartOptions,
}

const HEADING: &str = "MegaFusion";

/// Hires fix has it too.
pub(super) const UPSAMPLER: OptionSpec = OptionSpec {
    name: "upsampler",
    heading: HEADING,
    value_name: "U",
    help: "How a relay enlarges its picture (default: bicubic)\n\n\
           bilinear, bicubic: as PIL; bicubic-torch: as torch without antialias; bicubic-gaussian: then a 5x5 Gaussian; \
           bicubic-edge: then a 3x3 edge enhancement.",
    kind: OptionKind::Choice(Upsampler::NAMES),
};

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &with_parts::<7, 17>(&OWN);

const OWN: [OptionSpec; 7] = [
    UPSAMPLER,
    OptionSpec {
        name: "relay_clamp",
        heading: HEADING,
        value_name: "C",
        help: "Where a relay clamps its picture to the valid range (default: both)\n\n\
               none; decode: after the decoder; both: after the decoder and after the upsampler.",
        kind: OptionKind::Choice(RelayClamp::NAMES),
    },
    OptionSpec {
        name: "reschedule",
        heading: HEADING,
        value_name: "BOOL",
        help: "Noise re-scheduling in stages 2 and later (default: true for megafusion++)",
        kind: OptionKind::Bool,
    },
    OptionSpec {
        name: "gamma",
        heading: HEADING,
        value_name: "X",
        help: "gamma of the re-scheduling (default: a stage's area over the first stage's)",
        kind: OptionKind::Number {
            above: 0.0,
            most: 1e6,
            expected: "expected a number above 0; 4 is that of twice the side length, 1 changes nothing",
        },
    },
    OptionSpec {
        name: "dilation",
        heading: HEADING,
        value_name: "N",
        help: "Dilation of the UNet's middle block in stages 2 and later (default: 2 for megafusion++, else 1)",
        kind: OptionKind::Integer {
            least: 1,
            most: 64,
            expected: "expected a dilation from 1 (none) to 64; the paper's is 2",
        },
    },
    OptionSpec {
        name: "relay_noise_offset",
        heading: HEADING,
        value_name: "N",
        help: "How many steps less noisy a relay's noise is than the step that follows it (default: 0)\n\n\
               -1: as noisy as the step before the relay, which is the level in the paper's text.",
        kind: OptionKind::Integer { least: -1000, most: 1000, expected: "expected a number of steps, like 1 or -1" },
    },
    OptionSpec {
        name: "reference_compat",
        heading: HEADING,
        value_name: "",
        help: "Do as the published code of MegaFusion does where it differs from the paper\n\n\
               x0 from the updated latents, relay pictures through 8-bit RGB (without request.relay_clamp), a posterior \
               sample, the dilation in every stage, the first schedule re-scheduled too; with ddim only.",
        kind: OptionKind::Switch,
    },
];

/// Pixels of the longer side: the pictures of models trained below it are four times as wide by default, others' twice.
const SMALL_NATIVE_SIDE: usize = 128;

impl Default for MegaFusion {
    fn default() -> MegaFusion {
        MegaFusion {
            upsampler: Upsampler::default(),
            relay_clamp: RelayClamp::default(),
            reschedule: false,
            gamma: None,
            dilation: 1,
            relay_noise_offset: 0,
            reference_compat: false,
            parts: PartOptions::default(),
        }
    }
}

/// As `megafusion++` where it re-schedules and dilates, else as `megafusion`.
impl From<MegaFusion> for Method {
    fn from(options: MegaFusion) -> Method {
        let plus = options.reschedule && options.dilation > 1;
        Method::of(if plus { &MEGAFUSION_PLUS } else { &MEGAFUSION }, options)
    }
}

impl MegaFusion {
    /// MegaFusion++: with re-scheduling and a dilation of 2.
    pub fn plus() -> MegaFusion {
        MegaFusion { reschedule: true, dilation: 2, ..MegaFusion::default() }
    }

    /// The schedule of every stage.
    pub fn schedulers(&self, run: &Run) -> Vec<Scheduler> {
        (0..run.stages().len()).map(|stage| run.scheduler().rescheduled(self.stage_gamma(run, stage))).collect()
    }

    fn stage_gamma(&self, run: &Run, stage: usize) -> f64 {
        let rescheduled = self.reschedule && stage > 0;
        if self.reference_compat && !rescheduled {
            return run.published().base_gamma;
        }
        if !rescheduled {
            return 1.0;
        }
        if let Some(gamma) = self.gamma {
            return gamma;
        }
        let (size, first) = (run.stages()[stage].size, run.stages()[0].size);
        let published = run.published().gamma(size).filter(|_| self.reference_compat);
        published.unwrap_or(size.area() as f64 / first.area() as f64)
    }

    fn unet_options(&self, run: &Run, stage: usize) -> UnetOptions {
        let named = |stage: &Stage| stage.parts.contains(StageParts::DILATION);
        let dilated = match run.stages().iter().any(named) {
            true => named(&run.stages()[stage]),
            false => stage > 0 || self.reference_compat,
        };
        UnetOptions { mid_dilation: if dilated { self.dilation } else { 1 }, ..UnetOptions::default() }
    }

    /// From the clean samples that leave stage `to - 1` to the noised ones that enter `to`.
    fn relay(&self, sampling: &mut Sampling, to: usize, x0: Tensor) -> Result<Tensor> {
        sampling.dump(&format!("relay{to}.x0"), &x0)?;
        let enlarged = sampling.enlarged_pictures(to, &x0, |picture, size| self.upsample(picture, size))?;
        drop(x0);
        let encoded = sampling.encoded_pictures(to, &enlarged, self.reference_compat)?;
        drop(enlarged);

        let level = sampling.run().ranges()[to].start.saturating_add_signed(self.relay_noise_offset as isize);
        let noised = sampling.noised(to, &encoded, level)?;
        sampling.dump(&format!("relay{to}.noised"), &noised)?;
        Ok(noised)
    }

    fn upsample(&self, mut picture: Tensor, size: [usize; 2]) -> Result<Tensor> {
        if self.reference_compat {
            return ops::resize_u8(&picture, size, self.upsampler);
        }
        if self.relay_clamp != RelayClamp::None {
            picture = ops::clamp(&picture, -1.0, 1.0)?;
        }
        let clamp = (self.relay_clamp == RelayClamp::Both).then_some((-1.0, 1.0));
        ops::resize(&picture, size, self.upsampler, clamp, None)
    }
}

impl GenerationMethod for MegaFusion {
    /// DDIM, the paper's, whatever the model's own is; of a flow its own.
    fn sampler(&self, config: &SchedulerConfig) -> Sampler {
        if config.is_flow_matching() { config.sampler() } else { Sampler::Ddim }
    }

    fn default_size(&self, native: Size) -> Size {
        let scale = if native.width.max(native.height) < SMALL_NATIVE_SIDE { 4 } else { 2 };
        native.times(scale)
    }

    fn stages(&self, geometry: &Geometry) -> Result<Vec<Stage>> {
        relay_stages(geometry)
    }

    fn takes_pixels(&self) -> bool {
        true
    }

    fn parts(&self) -> StageParts {
        parts::OF_ANY_METHOD.and(StageParts::DILATION)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: &str| Err(Error::Request { field, value, reason: reason.into() });
        if self.dilation == 0 {
            return refuse("dilation", "0".into(), "expected 1 (none) or more");
        }
        if self.dilation > 1 && run.model().is_some_and(|model| model.unet.is_none()) {
            let reason = "the model's network is a transformer, which has no convolutions to dilate; expected 1, or \
                          request.method megafusion (request.reschedule true has the rest of megafusion++)";
            return refuse("dilation", self.dilation.to_string(), reason);
        }
        if let [first, .., last] = run.stages() {
            let (low, high) = (-(first.steps as i64), last.steps as i64 - 1);
            if !(low..=high).contains(&i64::from(self.relay_noise_offset)) {
                let reason = format!("expected {low} to {high}: a step of the first stage to one after the last relay");
                return refuse("relay_noise_offset", self.relay_noise_offset.to_string(), &reason);
            }
        }
        if let Some(gamma) = self.gamma {
            if !(gamma.is_finite() && gamma > 0.0) {
                return refuse("gamma", gamma.to_string(), "expected a number above 0; 1 changes nothing");
            }
            if !self.reschedule {
                let reason = "has no effect without re-scheduling; add request.reschedule true or choose megafusion++";
                return refuse("gamma", gamma.to_string(), reason);
            }
        }
        if self.reference_compat && run.model().is_some_and(ModelFacts::is_of_pixels) {
            return refuse(
                "reference_compat",
                "true".into(),
                "there is no published code of MegaFusion for models over pixels",
            );
        }
        if self.reference_compat && run.scheduler().sampler() != Sampler::Ddim {
            let value = format!("with request.scheduler {}", run.scheduler().sampler());
            return refuse("reference_compat", value, "the published code samples with ddim");
        }
        let parts = run.stages().iter().fold(StageParts::NONE, |all, stage| all.and(stage.parts));
        if self.reference_compat && !parts.is_empty() {
            let value = format!("with request.stages {}", run.stages_text());
            return refuse("reference_compat", value, "the published code of MegaFusion has no stages with parts");
        }
        if parts.contains(StageParts::DILATION) && self.dilation == 1 {
            let reason = "+dilation takes request.dilation, which is 1 (none); name request.dilation 2, the paper's";
            return refuse("stages", run.stages_text(), reason);
        }
        self.parts.check(run)
    }

    /// The clean samples of the last step.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let stages = sampling.run().stages();
        let x0_from_next = self.reference_compat;
        sampling.prepare(self.schedulers(sampling.run()), |step| StepCoefficients { x0_from_next, ..step })?;
        let mut composition = self.parts.begin(sampling)?;
        let mut x = sampling.first_samples()?;
        for stage in sampling.run().first_stage()..stages.len() {
            let options = self.unet_options(sampling.run(), stage);
            let (last, x0) = composition.stage(sampling, stage, x, &options)?;
            drop(last);
            x = if stage + 1 < stages.len() { self.relay(sampling, stage + 1, x0)? } else { x0 };
        }
        Ok(x)
    }
}
