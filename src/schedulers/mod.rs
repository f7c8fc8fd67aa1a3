//! Schedulers: the noise schedule of scheduler_config.json, and the samplers' steps as coefficients computed in f64.

mod config;
mod schedule;

pub use config::{Prediction, SchedulerConfig, Spacing};

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::ops::StepCoefficients;
use schedule::NoiseSchedule;

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
}

impl Sampler {
    pub const ALL: [Sampler; 4] = [Sampler::Ddim, Sampler::Ddpm, Sampler::Euler, Sampler::EulerAncestral];

    pub fn name(self) -> &'static str {
        match self {
            Sampler::Ddim => "ddim",
            Sampler::Ddpm => "ddpm",
            Sampler::Euler => "euler",
            Sampler::EulerAncestral => "euler-ancestral",
        }
    }

    /// Are latents `x0 + sigma noise` (variance exploding) rather than `sqrt(abar) x0 + sqrt(1 - abar) noise`?
    fn exploding(self) -> bool {
        matches!(self, Sampler::Euler | Sampler::EulerAncestral)
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
        Sampler::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| Error::Request {
            flag: "--scheduler",
            value: s.into(),
            reason: "expected ddim, ddpm, euler or euler-ancestral".into(),
        })
    }
}

/// A sampler with the timesteps of one run on one noise schedule. The stages of a run share the timesteps and differ in
/// the schedule: [`rescheduled`](Scheduler::rescheduled).
#[derive(Clone, Debug)]
pub struct Scheduler {
    sampler: Sampler,
    schedule: NoiseSchedule,
    timesteps: Vec<f32>,
    prediction: Prediction,
    spacing: Spacing,
    clip: Option<f64>,
    eta: f64,
    /// DDIM's distance to the previous timestep, whatever the spacing: `num_train_timesteps / steps`, rounded down.
    stride: usize,
    fixed_large_variance: bool,
    ends_at_smallest_sigma: bool,
}

/// One step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
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
    /// [`Error::Request`]: `--steps` or `--eta` out of range.
    pub fn new(config: &SchedulerConfig, sampler: Sampler, steps: usize, eta: f64) -> Result<Scheduler> {
        config.check_for(sampler)?;
        let n = config.num_train_timesteps;
        if !(1..=n).contains(&steps) {
            let reason = format!("expected 1 to {n}, the number of timesteps that the model was trained with");
            return Err(Error::Request { flag: "--steps", value: steps.to_string(), reason });
        }
        if !(0.0..=1.0).contains(&eta) || (eta != 0.0 && sampler != Sampler::Ddim) {
            let reason = "expected 0 to 1, and 0 for samplers other than ddim".to_string();
            return Err(Error::Request { flag: "--eta", value: eta.to_string(), reason });
        }
        let mut schedule = NoiseSchedule::new(config, config.set_alpha_to_one(sampler))?;
        if sampler.exploding() && config.rescale_betas_zero_snr {
            // Not 0, so that the first sigma is finite: 4096.
            *schedule.abar.last_mut().expect("a checked, non-empty table") = f64::from(2f32.powi(-24));
        }
        let spacing = config.spacing(sampler);
        let scheduler = Scheduler {
            sampler,
            schedule,
            timesteps: timesteps(n, steps, spacing, config.steps_offset, sampler.exploding()),
            prediction: config.prediction(),
            spacing,
            clip: config.clip(sampler),
            eta,
            stride: n / steps,
            fixed_large_variance: config.fixed_large_variance(),
            ends_at_smallest_sigma: config.ends_at_smallest_sigma(),
        };
        scheduler.check(config)?;
        Ok(scheduler)
    }

    fn check(&self, config: &SchedulerConfig) -> Result<()> {
        if self.sampler.exploding() {
            return Ok(()); // sigmas continue beyond the table's ends
        }
        let first = self.timesteps[0] as usize;
        match self.schedule.abar.get(first) {
            None => Err(config.error(format!(
                "steps_offset {} puts the first of {} steps at timestep {first}, beyond the {} trained ones; use fewer --steps",
                config.steps_offset,
                self.timesteps.len(),
                self.schedule.abar.len()
            ))),
            Some(&abar) if abar <= 0.0 && self.prediction == Prediction::Epsilon => Err(config.error(
                "rescale_betas_zero_snr leaves no signal at the first step, where prediction_type epsilon says nothing about the picture; expected v_prediction",
            )),
            Some(_) => Ok(()),
        }
    }

    pub fn sampler(&self) -> Sampler {
        self.sampler
    }

    /// One per step, descending.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// alphas_cumprod, one per training timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.schedule.abar
    }

    /// abar after the last step.
    pub fn final_alpha_cumprod(&self) -> f64 {
        self.schedule.final_abar
    }

    /// The same timesteps on the schedule for pictures of `gamma` times the area (MegaFusion, arXiv:2408.11001, sec.
    /// 3.3); every sigma grows by sqrt(gamma). `gamma` 1 changes nothing.
    pub fn rescheduled(&self, gamma: f64) -> Scheduler {
        Scheduler { schedule: self.schedule.rescheduled(gamma), ..self.clone() }
    }

    /// Standard deviation of the noise that a run starts from.
    pub fn init_noise_sigma(&self) -> f64 {
        if !self.sampler.exploding() {
            return 1.0;
        }
        let largest = (0..self.timesteps.len()).map(|i| self.sigma(i)).fold(0.0, f64::max);
        match self.spacing {
            Spacing::Leading => largest.hypot(1.0),
            Spacing::Trailing | Spacing::Linspace => largest,
        }
    }

    /// What a clean sample and noise are multiplied by to stand where step `i` begins: (signal, noise).
    pub fn noise_level(&self, i: usize) -> (f64, f64) {
        if self.sampler.exploding() {
            return (1.0, self.sigma(i));
        }
        let abar = self.abar(i);
        (abar.sqrt(), (1.0 - abar).sqrt())
    }

    /// Step `i`, from 0.
    pub fn step(&self, i: usize) -> Step {
        let (coefficients, draws_noise) = match self.sampler {
            Sampler::Ddim => (self.ddim(i), self.eta > 0.0),
            Sampler::Ddpm => (self.ddpm(i), self.timesteps[i] > 0.0),
            Sampler::Euler => (self.euler(i, 0.0), false),
            Sampler::EulerAncestral => {
                let (from, to) = (self.sigma(i), self.next_sigma(i));
                let up = to * ((from - to) * (from + to)).max(0.0).sqrt() / from;
                (self.euler(i, up), true)
            }
        };
        let input_scale = if self.sampler.exploding() { 1.0 / self.sigma(i).hypot(1.0) } else { 1.0 };
        Step {
            timestep: self.timesteps[i],
            input_scale: input_scale as f32,
            coefficients: coefficients.rounded(self.clip),
            draws_noise,
        }
    }

    fn abar(&self, i: usize) -> f64 {
        self.schedule.abar[self.timesteps[i] as usize]
    }

    fn sigma(&self, i: usize) -> f64 {
        self.schedule.sigma(f64::from(self.timesteps[i]))
    }

    fn next_sigma(&self, i: usize) -> f64 {
        match i + 1 < self.timesteps.len() {
            true => self.sigma(i + 1),
            false if self.ends_at_smallest_sigma && self.sampler == Sampler::Euler => self.schedule.sigma(0.0),
            false => 0.0,
        }
    }

    /// x0 as `(of x, of e)` where x = sqrt(abar) x0 + sqrt(1 - abar) noise.
    fn x0(&self, abar: f64) -> (f64, f64) {
        let (signal, sigma) = (abar.sqrt(), (1.0 - abar).sqrt());
        match self.prediction {
            Prediction::Epsilon => (1.0 / signal, -sigma / signal),
            Prediction::Velocity => (signal, -sigma),
            Prediction::Sample => (0.0, 1.0),
        }
    }

    /// s = t - stride; std = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s);
    /// x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) eps + std noise: arXiv:2010.02502, eqs. (12), (16). The eps is
    /// the one of the x0 before it is clipped.
    fn ddim(&self, i: usize) -> Affine {
        let t = self.timesteps[i] as usize;
        let abar = self.schedule.abar[t];
        let previous = t.checked_sub(self.stride).map_or(self.schedule.final_abar, |s| self.schedule.abar[s]);
        let variance = (1.0 - previous) / (1.0 - abar) * (1.0 - abar / previous);
        let std = self.eta * variance.max(0.0).sqrt();
        let direction = (1.0 - previous - std * std).max(0.0).sqrt();
        let (signal, sigma) = (abar.sqrt(), (1.0 - abar).sqrt());
        let (eps_from_x, eps_from_e) = match self.prediction {
            Prediction::Epsilon => (0.0, 1.0),
            Prediction::Velocity => (sigma, signal),
            Prediction::Sample => (1.0 / sigma, -signal / sigma),
        };
        let (x0_from_x, x0_from_e) = self.x0(abar);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: direction * eps_from_x,
            next_from_e: direction * eps_from_e,
            next_from_x0: previous.sqrt(),
            next_from_noise: std,
        }
    }

    /// The posterior's mean and deviation: arXiv:2006.11239, eq. (7), from this timestep to the list's next one.
    fn ddpm(&self, i: usize) -> Affine {
        let abar = self.abar(i);
        let previous = if i + 1 < self.timesteps.len() { self.abar(i + 1) } else { 1.0 };
        let alpha = abar / previous;
        let beta = 1.0 - alpha;
        let variance = match self.fixed_large_variance {
            true => beta,
            false => ((1.0 - previous) / (1.0 - abar) * beta).max(1e-20),
        };
        let (x0_from_x, x0_from_e) = self.x0(abar);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: alpha.sqrt() * (1.0 - previous) / (1.0 - abar),
            next_from_e: 0.0,
            next_from_x0: previous.sqrt() * beta / (1.0 - abar),
            next_from_noise: if self.timesteps[i] > 0.0 { variance.sqrt() } else { 0.0 },
        }
    }

    /// dx/dsigma = (x - x0) / sigma, one Euler step to sqrt(to^2 - up^2), then noise of deviation `up`.
    fn euler(&self, i: usize, up: f64) -> Affine {
        let (from, to) = (self.sigma(i), self.next_sigma(i));
        let down = (to * to - up * up).max(0.0).sqrt();
        let (x0_from_x, x0_from_e) = match self.prediction {
            Prediction::Epsilon => (1.0, -from),
            Prediction::Velocity => (1.0 / (from * from + 1.0), -from / from.hypot(1.0)),
            Prediction::Sample => (0.0, 1.0),
        };
        let keep = down / from;
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: keep,
            next_from_e: 0.0,
            next_from_x0: 1.0 - keep,
            next_from_noise: up,
        }
    }
}

/// [`StepCoefficients`] before they are rounded to f32.
struct Affine {
    x0_from_x: f64,
    x0_from_e: f64,
    next_from_x: f64,
    next_from_e: f64,
    next_from_x0: f64,
    next_from_noise: f64,
}

impl Affine {
    fn rounded(self, clip: Option<f64>) -> StepCoefficients {
        StepCoefficients {
            x0_from_x: self.x0_from_x as f32,
            x0_from_e: self.x0_from_e as f32,
            clip: clip.map(|bound| bound as f32),
            next_from_x: self.next_from_x as f32,
            next_from_e: self.next_from_e as f32,
            next_from_x0: self.next_from_x0 as f32,
            next_from_noise: self.next_from_noise as f32,
            x0_from_next: false,
        }
    }
}

/// `steps` of `n` training timesteps, descending. Fractions stay where `fractional`, for the samplers that interpolate.
fn timesteps(n: usize, steps: usize, spacing: Spacing, offset: usize, fractional: bool) -> Vec<f32> {
    let at = |i: usize| match spacing {
        Spacing::Leading => ((steps - 1 - i) * (n / steps) + offset) as f64,
        Spacing::Trailing => {
            let stride = n as f64 / steps as f64;
            let delta = (n as f64 - stride) - n as f64; // as numpy's arange rounds it
            (n as f64 + i as f64 * delta).round_ties_even() - 1.0
        }
        Spacing::Linspace => {
            let stride = if steps > 1 { (n - 1) as f64 / (steps - 1) as f64 } else { 0.0 };
            let t = if i == 0 && steps > 1 { (n - 1) as f64 } else { (steps - 1 - i) as f64 * stride };
            if fractional { t } else { t.round_ties_even() }
        }
    };
    (0..steps).map(|i| at(i).max(0.0) as f32).collect()
}
