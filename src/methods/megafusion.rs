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
//! `reference_compat` two: the posterior's, then the relay's).

use super::observer::check_finite;
use super::{DiffusionModel, Event, Method, NoiseSource, RelayClamp, Stage, StepProgress, Watch, check_size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::ops::{self, Guidance, SampleState, StepCoefficients, StepRow, StepTable, Upsampler};
use crate::runtime::{DType, Repeated, Tensor};
use crate::schedulers::{Evaluation, Sampler, Scheduler};

/// A run, fully decided.
#[derive(Clone, Debug)]
pub struct Plan {
    pub method: Method,
    /// At least one; one for [`Method::Plain`].
    pub stages: Vec<Stage>,
    /// The base schedule, with as many steps as the stages together.
    pub scheduler: Scheduler,
    /// Classifier-free guidance scale; `None`: the model has no unconditional row.
    pub guidance: Option<f32>,
    pub upsampler: Upsampler,
    pub relay_clamp: RelayClamp,
    /// Re-schedule stages 2 and later.
    pub reschedule: bool,
    /// Dilation of the middle block in stages 2 and later.
    pub dilation: usize,
    /// gamma of the re-scheduled stages; `None`: each one's area over the first stage's.
    pub gamma: Option<f64>,
    /// The relay noises to the level of the timestep this many steps after the next one; -1 is the level of the step just
    /// done, which the paper's text has (equation 4), and which the next step does not expect.
    pub relay_noise_offset: i32,
    /// Do as the published code (SDM-MegaFusion) does where it differs from the paper:
    /// * the base schedule is re-scheduled with gamma 2.25 (its default argument) in the first stage, and in all stages
    ///   without `reschedule`; with it, squares of 512, 768 and 1024 get gamma 1, 2.25 and 4 whatever the first stage
    ///   (other sizes get theirs by area; the published code leaves them alone);
    /// * a step's x0 is computed from the already updated latents, with the old output and timestep;
    /// * relay pictures pass through 8-bit RGB, each pass of the resize rounded (so `relay_clamp` says nothing);
    /// * the relay's encoder samples its posterior, a draw before the relay's own;
    /// * dilation holds in every stage.
    pub reference_compat: bool,
}

/// gamma of the published code's base schedule: `reschedule_res` 768 against 512.
const REFERENCE_BASE_GAMMA: f64 = 2.25;

impl Plan {
    /// # Errors
    /// [`Error::Request`], naming the flag: no or superfluous stages, sizes that are not multiples of `factor`, a
    /// dilation of 0, a noise offset beyond the first or last step, a `gamma` that is no positive number or is not used,
    /// `reference_compat` with what the published code does not have.
    pub fn check(&self, factor: usize) -> Result<()> {
        let refuse = |flag, value: String, reason: &str| Err(Error::Request { flag, value, reason: reason.into() });
        let listed: Vec<String> = self.stages.iter().map(Stage::to_string).collect();
        if self.stages.is_empty() || self.stages.iter().any(|stage| stage.steps == 0) {
            return refuse("--stages", listed.join(","), "expected at least one stage, and one step in each");
        }
        if self.method == Method::Plain && self.stages.len() > 1 {
            return refuse("--stages", listed.join(","), "the plain method has one stage; use --method megafusion");
        }
        for stage in &self.stages {
            check_size("--stages", stage.size, factor)?;
        }
        if self.dilation == 0 {
            return refuse("--dilation", "0".into(), "expected 1 (none) or more");
        }
        if let [first, .., last] = &self.stages[..] {
            let (low, high) = (-(first.steps as i64), last.steps as i64 - 1);
            if !(low..=high).contains(&i64::from(self.relay_noise_offset)) {
                let reason = format!("expected {low} to {high}: a step of the first stage to one after the last relay");
                return refuse("--relay-noise-offset", self.relay_noise_offset.to_string(), &reason);
            }
        }
        if let Some(gamma) = self.gamma {
            if !(gamma.is_finite() && gamma > 0.0) {
                return refuse("--gamma", gamma.to_string(), "expected a number above 0; 1 changes nothing");
            }
            if !self.reschedule {
                let reason = "has no effect without re-scheduling; add --reschedule true or choose megafusion++";
                return refuse("--gamma", gamma.to_string(), reason);
            }
        }
        if self.reference_compat && self.method == Method::Plain {
            return refuse("--reference-compat", "with --method plain".into(), "is for megafusion and megafusion++");
        }
        if self.reference_compat && self.scheduler.sampler() != Sampler::Ddim {
            let value = format!("with --scheduler {}", self.scheduler.sampler().name());
            return refuse("--reference-compat", value, "the published code samples with ddim");
        }
        Ok(())
    }

    /// The schedule of every stage.
    pub fn schedulers(&self) -> Vec<Scheduler> {
        (0..self.stages.len()).map(|stage| self.scheduler.rescheduled(self.gamma(stage))).collect()
    }

    fn gamma(&self, stage: usize) -> f64 {
        let rescheduled = self.reschedule && stage > 0;
        if self.reference_compat && !rescheduled {
            return REFERENCE_BASE_GAMMA;
        }
        if !rescheduled {
            return 1.0;
        }
        if let Some(gamma) = self.gamma {
            return gamma;
        }
        let size = self.stages[stage].size;
        match (size.width, size.height) {
            (512, 512) if self.reference_compat => 1.0,
            (768, 768) if self.reference_compat => 2.25,
            (1024, 1024) if self.reference_compat => 4.0,
            _ => size.area() as f64 / self.stages[0].size.area() as f64,
        }
    }

    /// Of every step of the run, each on its stage's schedule. A stage knows no evaluations of the one before.
    fn evaluations(&self, schedulers: &[Scheduler]) -> Vec<Evaluation> {
        let mut begin = 0;
        let stages = self.stages.iter().zip(schedulers).flat_map(|(stage, scheduler)| {
            begin += stage.steps;
            scheduler.evaluations(begin - stage.steps..begin)
        });
        stages.collect()
    }

    /// What the network is told, at every evaluation of the run.
    pub fn timesteps(&self) -> Vec<f32> {
        self.evaluations(&self.schedulers()).iter().map(|evaluation| evaluation.timestep).collect()
    }

    fn step_rows(&self, evaluations: &[Evaluation]) -> Vec<StepRow> {
        let row = |evaluation: &Evaluation| {
            let coefficients = StepCoefficients { x0_from_next: self.reference_compat, ..evaluation.coefficients };
            StepRow { input_scale: evaluation.input_scale, coefficients }
        };
        evaluations.iter().map(row).collect()
    }

    fn options(&self, stage: usize) -> UnetOptions {
        let dilated = stage > 0 || self.reference_compat;
        UnetOptions { mid_dilation: if dilated { self.dilation } else { 1 } }
    }
}

/// Runs a checked plan: the picture, f32, `[1, H, W, 3]`, not clamped.
///
/// # Errors
/// [`Error::Interrupted`]; [`Error::NonFinite`], naming the stage; those of the model.
pub fn generate<'a>(
    model: &'a dyn DiffusionModel,
    plan: &'a Plan,
    noise: &'a mut dyn NoiseSource,
    watch: Watch<'a>,
) -> Result<Tensor> {
    let schedulers = plan.schedulers();
    let evaluations = plan.evaluations(&schedulers);
    let steps = StepTable::new(model.device(), plan.step_rows(&evaluations))?;
    let steps = steps.with_thresholding(plan.scheduler.thresholding())?;
    let guidance = plan.guidance.map(|scale| Guidance::uniform(model.device(), 1, scale)).transpose()?;
    let mut run = Run { model, plan, schedulers, evaluations, steps, guidance, noise, watch, draws: 0 };
    run.dump_tables()?;
    let latent = run.denoise()?;
    run.watch.dump("latent", &latent)?;
    run.watch.begin(Event::Decode)?;
    let image = model.decode(&latent)?;
    run.watch.dump("image", &image)?;
    check_finite(&image, || "the decoded picture".into())?;
    Ok(image)
}

struct Run<'a> {
    model: &'a dyn DiffusionModel,
    plan: &'a Plan,
    /// One per stage.
    schedulers: Vec<Scheduler>,
    /// Of all stages.
    evaluations: Vec<Evaluation>,
    /// Their rows; the current one is the number of evaluations done.
    steps: StepTable,
    guidance: Option<Guidance>,
    noise: &'a mut dyn NoiseSource,
    watch: Watch<'a>,
    draws: usize,
}

impl Run<'_> {
    /// All stages: the sample to decode.
    fn denoise(&mut self) -> Result<Tensor> {
        let plan = self.plan;
        let mut x = self.initial_noise()?;
        for (stage, &Stage { size, steps }) in plan.stages.iter().enumerate() {
            self.watch.begin(Event::StageBegins { stage, stages: plan.stages.len(), size, steps })?;
            let (last, x0) = self.stage(stage, x)?.into_parts();
            let done = self.done();
            check_finite(&x0, || format!("stage {} ({size}), the clean sample after step {done}", stage + 1))?;
            x = if stage + 1 < plan.stages.len() {
                drop(last);
                self.relay(stage + 1, x0)?
            } else if plan.method != Method::Plain {
                x0
            } else {
                last
            };
        }
        Ok(x)
    }

    /// Steps done over all stages.
    fn done(&self) -> usize {
        self.evaluations[..self.steps.index().get()].iter().filter(|evaluation| evaluation.ends_step).count()
    }

    /// All steps of a stage. On a card they are one recorded step, replayed: everything that changes is read from the
    /// step table, and the noise is always in the same place.
    fn stage(&mut self, stage: usize, x: Tensor) -> Result<SampleState> {
        let Stage { size, steps } = self.plan.stages[stage];
        let (model, plan, options) = (self.model, self.plan, self.plan.options(stage));
        let shape = model.sample_shape(size);
        let mut noise = match self.steps.adds_noise() {
            true => Some(Tensor::uninit(model.device(), &shape, DType::F32)?),
            false => None,
        };
        let mut state = SampleState::with_history(x, self.steps.history())?;
        let mut step_on_device = Repeated::new(model.device());
        for step in 1..=steps {
            loop {
                self.watch.check_cancelled()?;
                let Evaluation { draws_noise, ends_step, .. } = self.evaluations[self.steps.index().get()];
                if draws_noise {
                    self.draw_for_step(shape, noise.as_mut())?;
                }
                let (table, guidance) = (&mut self.steps, self.guidance.as_ref());
                let replayed = step_on_device.run(|| {
                    let output = model.denoise(state.x(), table, &options)?;
                    ops::sampler_step(&mut state, &output, guidance, table, noise.as_ref())?;
                    table.index_mut().advance()
                })?;
                if replayed {
                    table.index_mut().replayed();
                }
                if ends_step {
                    break;
                }
            }
            let (run_step, run_steps) = (self.done(), plan.scheduler.timesteps().len());
            self.watch.dump(&format!("step{run_step}"), state.x())?;
            let progress = StepProgress { stage, step, stage_steps: steps, run_step, run_steps };
            self.watch.observer.event(&Event::Step(progress));
        }
        Ok(state)
    }

    /// A step's draw: into the place that the step reads, or, where no step of the run reads one, drawn for the order of
    /// draws alone.
    fn draw_for_step(&mut self, shape: [usize; 4], to: Option<&mut Tensor>) -> Result<()> {
        let Some(to) = to else {
            return self.draw(shape).map(drop);
        };
        self.noise.normal_into(to)?;
        self.watch.dump(&format!("noise{}", self.draws), to)?;
        self.draws += 1;
        Ok(())
    }

    fn initial_noise(&mut self) -> Result<Tensor> {
        let noise = self.draw(self.model.sample_shape(self.plan.stages[0].size))?;
        match self.schedulers[0].init_noise_sigma() {
            1.0 => Ok(noise),
            sigma => ops::scale_cast(&noise, sigma as f32, 0.0, DType::F32, 1),
        }
    }

    /// From the clean sample that leaves stage `to - 1` to the noised one that enters `to`.
    fn relay(&mut self, to: usize, x0: Tensor) -> Result<Tensor> {
        let plan = self.plan;
        let (from, size) = (plan.stages[to - 1].size, plan.stages[to].size);
        self.watch.begin(Event::Relay { stage: to, from, to: size })?;
        self.watch.dump(&format!("relay{to}.x0"), &x0)?;
        let decoded = self.model.decode(&x0)?;
        drop(x0);
        self.watch.dump(&format!("relay{to}.decoded"), &decoded)?;
        check_finite(&decoded, || format!("the decoded picture of the relay to stage {} ({size})", to + 1))?;

        self.watch.begin(Event::RelayUpsample { stage: to })?;
        let upsampled = self.upsample(decoded, [size.height, size.width])?;
        self.watch.dump(&format!("relay{to}.upsampled"), &upsampled)?;

        self.watch.begin(Event::RelayEncode { stage: to })?;
        let shape = self.model.sample_shape(size);
        let posterior_noise = if plan.reference_compat { Some(self.draw(shape)?) } else { None };
        let encoded = self.model.encode(&upsampled, posterior_noise.as_ref())?;
        drop((upsampled, posterior_noise));
        self.watch.dump(&format!("relay{to}.encoded"), &encoded)?;

        let (signal, sigma) =
            self.schedulers[to].noise_level(self.done().saturating_add_signed(plan.relay_noise_offset as isize));
        let noise = self.draw(shape)?;
        let noised = ops::add_noise(&encoded, &noise, signal as f32, sigma as f32)?;
        self.watch.dump(&format!("relay{to}.noised"), &noised)?;
        Ok(noised)
    }

    fn upsample(&self, mut picture: Tensor, size: [usize; 2]) -> Result<Tensor> {
        if self.plan.reference_compat {
            return ops::resize_u8(&picture, size, self.plan.upsampler);
        }
        if self.plan.relay_clamp != RelayClamp::None {
            picture = ops::clamp(&picture, -1.0, 1.0)?;
        }
        let clamp = (self.plan.relay_clamp == RelayClamp::Both).then_some((-1.0, 1.0));
        ops::resize(&picture, size, self.plan.upsampler, clamp, None)
    }

    fn draw(&mut self, shape: [usize; 4]) -> Result<Tensor> {
        let noise = self.noise.normal(shape)?;
        self.watch.dump(&format!("noise{}", self.draws), &noise)?;
        self.draws += 1;
        Ok(noise)
    }

    fn dump_tables(&mut self) -> Result<()> {
        let timesteps = self.schedulers[0].timesteps();
        self.watch.dump_values("timesteps", &[timesteps.len()], timesteps.iter().copied())?;
        let tables: Vec<&[f64]> = self.schedulers.iter().map(Scheduler::alphas_cumprod).collect();
        let shape = [tables.len(), tables[0].len()];
        self.watch.dump_values("alpha_bar", &shape, tables.into_iter().flatten().map(|&abar| abar as f32))
    }
}
