//! Schedulers: the noise schedule of scheduler_config.json, and the samplers' steps as coefficients computed in f64.

mod config;
mod levels;
mod samplers;
mod schedule;

pub use config::{Prediction, SchedulerConfig, SigmaSpacing, Spacing};

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::ops::{StepCoefficients, Thresholding};
use config::{Solver, Variance};
use levels::Levels;
use schedule::{NoiseSchedule, Noising, noise_preserving, x0_preserving};

/// How one step goes from a noise level to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sampler {
    /// Song et al. 2020, arXiv:2010.02502; `eta` between 0 (deterministic) and 1.
    Ddim,
    /// Ho et al. 2020, arXiv:2006.11239.
    Ddpm,
    /// Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn and correction.
    Euler,
    /// Euler to a lower noise level, then fresh noise up to the wanted one (k-diffusion's `sample_euler_ancestral`).
    EulerAncestral,
    /// DPM-Solver++ of order 2, multistep. Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    Dpm2M,
    /// The same for the diffusion's stochastic equation: arXiv:2211.01095, appendix.
    Dpm2MSde,
    /// UniPC-2 with B(h) = e^h - 1, predicting x0. Zhao et al. 2023, arXiv:2302.04867.
    UniPc,
    /// Multistep consistency sampling of a distilled model. Luo et al. 2023, arXiv:2310.04378.
    Lcm,
    /// Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn: two evaluations per step, one in the last.
    Heun,
    /// Pseudo linear multistep of order 4. Liu et al. 2022, arXiv:2202.09778; its first step has two evaluations.
    Pndm,
    /// DEIS of order 2, multistep, in log(rho). Zhang & Chen 2022, arXiv:2204.13902.
    Deis,
    /// Euler's steps of a rectified flow, for models trained by flow matching. Esser et al. 2024, arXiv:2403.03206.
    FlowEuler,
}

impl Sampler {
    pub const ALL: [Sampler; 12] = [
        Sampler::Ddim,
        Sampler::Ddpm,
        Sampler::Euler,
        Sampler::EulerAncestral,
        Sampler::Dpm2M,
        Sampler::Dpm2MSde,
        Sampler::UniPc,
        Sampler::Lcm,
        Sampler::Heun,
        Sampler::Pndm,
        Sampler::Deis,
        Sampler::FlowEuler,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Sampler::Ddim => "ddim",
            Sampler::Ddpm => "ddpm",
            Sampler::Euler => "euler",
            Sampler::EulerAncestral => "euler-ancestral",
            Sampler::Dpm2M => "dpm++-2m",
            Sampler::Dpm2MSde => "dpm++-2m-sde",
            Sampler::UniPc => "unipc",
            Sampler::Lcm => "lcm",
            Sampler::Heun => "heun",
            Sampler::Pndm => "pndm",
            Sampler::Deis => "deis",
            Sampler::FlowEuler => "flow-euler",
        }
    }

    /// What ComfyUI, InvokeAI, diffusers or stable-diffusion.cpp call it, where that is another name.
    pub fn aliases(self) -> &'static [&'static str] {
        match self {
            Sampler::EulerAncestral => &["euler_ancestral", "euler_a"],
            Sampler::Dpm2M => &["dpmpp_2m", "dpm++2m"],
            Sampler::Dpm2MSde => &["dpmpp_2m_sde", "dpm++2m_sde"],
            Sampler::UniPc => &["uni_pc_bh2"],
            Sampler::Pndm => &["plms"],
            _ => &[],
        }
    }

    /// As the "Sampler" of webui's infotext; the spacing of the sigmas is its "Schedule type"
    /// ([`SigmaSpacing::webui_name`]).
    pub fn webui_name(self) -> &'static str {
        match self {
            Sampler::Ddim => "DDIM",
            Sampler::Ddpm => "DDPM",
            Sampler::Euler => "Euler",
            Sampler::EulerAncestral => "Euler a",
            Sampler::Dpm2M => "DPM++ 2M",
            Sampler::Dpm2MSde => "DPM++ 2M SDE",
            Sampler::UniPc => "UniPC",
            Sampler::Lcm => "LCM",
            Sampler::Heun => "Heun",
            Sampler::Pndm => "PLMS",
            Sampler::Deis => "DEIS",
            // There the kind of model decides.
            Sampler::FlowEuler => "Euler",
        }
    }

    /// Does it run on a list of sigmas, which can be spaced otherwise than the timesteps, rather than on the table?
    pub fn has_sigmas(self) -> bool {
        Noising::of(self) != Noising::Preserving || self.multistep()
    }

    /// Does it use earlier clean samples (DEIS: their noise), weighed by the steps' sizes?
    fn multistep(self) -> bool {
        matches!(self, Sampler::Dpm2M | Sampler::Dpm2MSde | Sampler::UniPc | Sampler::Deis)
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sampler {
    type Err = Error;
    fn from_str(s: &str) -> Result<Sampler> {
        Sampler::ALL.into_iter().find(|m| m.name() == s || m.aliases().contains(&s)).ok_or_else(|| {
            let names = Sampler::ALL.map(Sampler::name).join(", ");
            Error::Request { field: "scheduler", value: s.into(), reason: format!("expected one of {names}") }
        })
    }
}

/// What a network's output e at one training timestep says of samples x of variance-preserving diffusion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Readout {
    /// Signal and noise: x = signal x0 + noise eps.
    pub level: [f64; 2],
    /// x0 = of x, of e
    pub x0: [f64; 2],
    /// eps = of x, of e
    pub noise: [f64; 2],
}

/// A sampler with the timesteps of one run on one noise schedule. The stages of a run share the timesteps and differ in
/// the schedule: [`rescheduled`](Scheduler::rescheduled).
#[derive(Clone, Debug)]
pub struct Scheduler {
    sampler: Sampler,
    schedule: NoiseSchedule,
    levels: Levels,
    /// Of DDIM at timesteps that were given: the one that each step goes to.
    targets: Option<Vec<usize>>,
    prediction: Prediction,
    spacing: Spacing,
    sigma_spacing: SigmaSpacing,
    clip: Option<f64>,
    thresholding: Option<Thresholding>,
    eta: f64,
    /// DDIM's distance to the previous timestep, whatever the spacing: `num_train_timesteps / steps`, rounded down.
    stride: usize,
    /// Of the noise that DDPM adds.
    variance: Variance,
    solver: Solver,
    /// LCM's: how fast the boundary condition's share of the clean sample goes to 1.
    timestep_scaling: f64,
    /// Does a flow's step take fresh noise?
    stochastic_flow: bool,
}

/// One evaluation of the network, and what it does to the sample. Most samplers have one per step; a Heun step has two,
/// as has the first of PNDM.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// The step of the run that it belongs to, from 0.
    pub step: usize,
    /// Of which step's beginning it sees the noise level: a second evaluation that of the next step.
    pub level: usize,
    /// Is the step done after it?
    pub ends_step: bool,
    /// What the network is told.
    pub timestep: f32,
    /// The network reads the latents times this.
    pub input_scale: f32,
    pub coefficients: StepCoefficients,
    /// Does the published sampler draw noise in this step? Also true where the noise then gets the weight 0: the draw
    /// is part of the order of draws.
    pub draws_noise: bool,
}

impl Scheduler {
    /// `steps`: of the whole run, over all stages. `eta`: DDIM's, else 0.
    ///
    /// # Errors
    /// [`Error::Config`], naming the configuration's file: a key the sampler does not support, betas out of range;
    /// [`Error::Request`]: `steps`, `eta` or `sigmas` out of range or without effect.
    pub fn new(config: &SchedulerConfig, sampler: Sampler, steps: usize, eta: f64) -> Result<Scheduler> {
        config.check_for(sampler)?;
        if !(0.0..=1.0).contains(&eta) || (eta != 0.0 && sampler != Sampler::Ddim) {
            let reason = "expected 0 to 1, and 0 for samplers other than ddim".to_string();
            return Err(Error::Request { field: "eta", value: eta.to_string(), reason });
        }
        let schedule = NoiseSchedule::new(config, sampler)?;
        let levels = Levels::new(config, sampler, &schedule, steps)?;
        let scheduler = Scheduler {
            sampler,
            schedule,
            levels,
            targets: None,
            prediction: config.prediction(),
            spacing: config.spacing(sampler),
            sigma_spacing: config.sigma_spacing(sampler)?,
            clip: config.clip(sampler),
            thresholding: config.thresholding(sampler),
            eta,
            stride: config.num_train_timesteps / steps,
            variance: config.variance(sampler),
            solver: config.solver(),
            timestep_scaling: config.timestep_scaling(),
            stochastic_flow: config.stochastic_sampling(),
        };
        scheduler.check(config)?;
        Ok(scheduler)
    }

    /// DDIM at these timesteps of the training, each with the one that its step goes to. They need not descend: a stage of a run may
    /// begin noisier than the one before it ended.
    ///
    /// # Errors
    /// [`Error::Request`]: another sampler; [`Error::Argument`]: a timestep that was not trained; [`Error::Config`]: one without any
    /// signal, of a network that predicts the noise.
    pub fn at_timesteps(&self, steps: &[(usize, usize)]) -> Result<Scheduler> {
        if self.sampler != Sampler::Ddim {
            let reason = "these timesteps are for ddim".to_string();
            return Err(Error::Request { field: "scheduler", value: self.sampler.to_string(), reason });
        }
        let trained = self.schedule.abar.len();
        if let Some(beyond) = steps.iter().flat_map(|&(t, to)| [t, to]).find(|&t| t >= trained) {
            let want = format!("below {trained}, the number of trained ones");
            return Err(Error::argument("scheduler", "timestep", beyond, want));
        }
        let no_signal = steps.iter().any(|&(t, _)| self.schedule.abar[t] <= 0.0);
        if no_signal && self.prediction == Prediction::Epsilon {
            let reason = "rescale_betas_zero_snr leaves no signal at the first step, where prediction_type epsilon says nothing about \
                          the picture; expected prediction_type v_prediction";
            return Err(Error::config("scheduler", reason));
        }
        let timesteps: Vec<f32> = steps.iter().map(|&(t, _)| t as f32).collect();
        let mut sigmas: Vec<f64> = steps.iter().map(|&(t, _)| self.schedule.at(t)).collect();
        sigmas.push(0.0);
        let targets = Some(steps.iter().map(|&(_, to)| to).collect());
        Ok(Scheduler { levels: Levels { timesteps, sigmas }, targets, ..self.clone() })
    }

    fn check(&self, config: &SchedulerConfig) -> Result<()> {
        if self.noising() != Noising::Preserving {
            return Ok(()); // sigmas continue beyond the table's ends
        }
        let first = self.timesteps()[0] as usize;
        match self.schedule.abar.get(first) {
            None => Err(config.error(format!(
                "steps_offset {} puts the first of {} steps at timestep {first}, beyond the {} trained ones; use fewer request.steps",
                config.steps_offset,
                self.timesteps().len(),
                self.schedule.abar.len()
            ))),
            Some(&abar) if abar <= 0.0 && self.prediction == Prediction::Epsilon => {
                // LCM has its own spacing.
                let spacing = if self.sampler == Sampler::Lcm { "" } else { "timestep_spacing leading, " };
                Err(config.error(format!(
                    "rescale_betas_zero_snr leaves no signal at the first step, where prediction_type epsilon says nothing about the picture and its clean sample is a division by 0; expected prediction_type v_prediction, {spacing}or request.scheduler euler, dpm++-2m or unipc, which begin at sigma 4096"
                )))
            }
            Some(_) => Ok(()),
        }
    }

    /// DDIM's share of fresh noise per step.
    pub fn eta(&self) -> f64 {
        self.eta
    }

    pub fn sampler(&self) -> Sampler {
        self.sampler
    }

    pub fn sigma_spacing(&self) -> SigmaSpacing {
        self.sigma_spacing
    }

    /// For the step table of a run: the clean sample of every evaluation is thresholded so.
    pub fn thresholding(&self) -> Option<Thresholding> {
        self.thresholding
    }

    /// Does the network predict the variance of the noise, in channels of its output behind the C of the noise? Whether it has
    /// them says [`check_channels`](SchedulerConfig::check_channels).
    pub fn learns_variance(&self) -> bool {
        self.variance == Variance::LearnedRange
    }

    /// One per step, descending. The network is told those of the [`evaluations`](Scheduler::evaluations).
    pub fn timesteps(&self) -> &[f32] {
        &self.levels.timesteps
    }

    /// alphas_cumprod, one per training timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.schedule.abar
    }

    /// The noise levels of a flow, of every step's beginning and of the end; `None` for other samplers.
    pub fn flow_sigmas(&self) -> Option<&[f64]> {
        (self.noising() == Noising::Flow).then_some(&self.levels.sigmas)
    }

    /// abar after the last step.
    pub fn final_alpha_cumprod(&self) -> f64 {
        self.schedule.final_abar
    }

    /// The same timesteps on the schedule for pictures of `gamma` times the area (MegaFusion, arXiv:2408.11001, sec.
    /// 3.3); every sigma grows by sqrt(gamma), in a flow noise over signal, and with it what the network is told. `gamma` 1
    /// changes nothing.
    pub fn rescheduled(&self, gamma: f64) -> Scheduler {
        let sigmas: Vec<f64> =
            self.levels.sigmas.iter().map(|&sigma| self.noising().rescheduled(sigma, gamma)).collect();
        let timesteps = match self.noising() {
            Noising::Flow => levels::flow_timesteps(&sigmas[..self.levels.timesteps.len()], self.schedule.abar.len()),
            Noising::Preserving | Noising::Exploding => self.levels.timesteps.clone(),
        };
        let levels = Levels { timesteps, sigmas };
        Scheduler { schedule: self.schedule.rescheduled(gamma), levels, ..self.clone() }
    }

    /// Standard deviation of the noise that a run starts from.
    pub fn init_noise_sigma(&self) -> f64 {
        if self.noising() != Noising::Exploding {
            return 1.0;
        }
        let largest = self.levels.sigmas.iter().copied().fold(0.0, f64::max);
        match self.spacing {
            Spacing::Leading => largest.hypot(1.0),
            Spacing::Trailing | Spacing::Linspace => largest,
        }
    }

    /// What a clean sample and noise are multiplied by to stand where step `i` begins: (signal, noise).
    pub fn noise_level(&self, i: usize) -> (f64, f64) {
        if self.sampler.has_sigmas() {
            return self.noising().level(self.levels.sigmas[i]);
        }
        let abar = self.abar(i);
        (abar.sqrt(), (1.0 - abar).sqrt())
    }

    /// At a training timestep, whatever the run's own are; `None` beyond the table, where a level has no signal or no noise, and
    /// for a flow.
    pub fn readout(&self, timestep: usize) -> Option<Readout> {
        let abar = *self.schedule.abar.get(timestep)?;
        if self.noising() == Noising::Flow || abar <= 0.0 || abar >= 1.0 {
            return None;
        }
        let level = (abar.sqrt(), (1.0 - abar).sqrt());
        let x0 = x0_preserving(level, self.prediction).into();
        Some(Readout { level: level.into(), x0, noise: self.noise_from(abar).into() })
    }

    /// The noise in samples sqrt(abar) x0 + sqrt(1 - abar) noise, as a sum: what they, and what the network's output for them, are
    /// multiplied by. Not of a flow.
    pub fn noise_from(&self, abar: f64) -> (f64, f64) {
        noise_preserving((abar.sqrt(), (1.0 - abar).sqrt()), self.prediction)
    }

    /// The timestep of the training with the noise of step `i`; between two of them linear in the logarithm of sigma.
    pub fn training_timestep(&self, i: usize) -> f64 {
        let (signal, noise) = self.noise_level(i);
        self.schedule.timestep(noise / signal)
    }

    fn noising(&self) -> Noising {
        Noising::of(self.sampler)
    }

    /// The evaluations of `steps` of the run, from 0, in order. The first of them knows no earlier ones: a stage that
    /// begins anew, on another schedule or with another sample, is its own range, and its sample state a new one.
    pub fn evaluations(&self, steps: Range<usize>) -> Vec<Evaluation> {
        let begin = steps.start;
        steps.flat_map(|i| self.step(i, i - begin)).collect()
    }
}
