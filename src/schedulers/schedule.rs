//! What a sample is at a noise level, alphas_cumprod (abar) of a configuration, and its re-scheduling for larger pictures.

use super::{Prediction, Sampler, SchedulerConfig};
use crate::error::Result;

/// How a clean sample and noise make up a sample, `x = signal x0 + noise n`, at a level sigma of a sampler's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Noising {
    /// Variance preserving: signal^2 + noise^2 = 1, sigma = noise / signal. Song et al. 2020, arXiv:2011.13456, sec. 3.4.
    Preserving,
    /// Variance exploding: signal 1, noise sigma. Karras et al. 2022, arXiv:2206.00364.
    Exploding,
    /// Rectified flow: signal 1 - sigma, noise sigma. Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024,
    /// arXiv:2403.03206, sec. 3.1.
    Flow,
}

impl Noising {
    pub fn of(sampler: Sampler) -> Noising {
        match sampler {
            Sampler::Euler | Sampler::EulerAncestral | Sampler::Heun => Noising::Exploding,
            Sampler::FlowEuler => Noising::Flow,
            _ => Noising::Preserving,
        }
    }

    /// (signal, noise)
    pub fn level(self, sigma: f64) -> (f64, f64) {
        match self {
            Noising::Preserving => {
                let signal = 1.0 / sigma.hypot(1.0);
                (signal, sigma * signal)
            }
            Noising::Exploding => (1.0, sigma),
            Noising::Flow => (1.0 - sigma, sigma),
        }
    }

    /// The clean sample as `(of x, of e)`, e being the network's output.
    pub fn x0(self, sigma: f64, prediction: Prediction) -> (f64, f64) {
        match self {
            Noising::Preserving => x0_preserving(self.level(sigma), prediction),
            Noising::Exploding => match prediction {
                Prediction::Epsilon => (1.0, -sigma),
                Prediction::Velocity => (1.0 / (sigma * sigma + 1.0), -sigma / sigma.hypot(1.0)),
                Prediction::Sample => (0.0, 1.0),
            },
            // Such a network's output is dx/dsigma = n - x0.
            Noising::Flow => (1.0, -sigma),
        }
    }

    /// The level whose signal-to-noise ratio is the one of sigma divided by `gamma`.
    pub fn rescheduled(self, sigma: f64, gamma: f64) -> f64 {
        match self {
            Noising::Preserving | Noising::Exploding => sigma * gamma.sqrt(),
            Noising::Flow => shifted(sigma, gamma.sqrt()),
        }
    }
}

/// The clean sample as `(of x, of e)` where x = signal x0 + noise n with signal^2 + noise^2 = 1.
pub(super) fn x0_preserving((signal, noise): (f64, f64), prediction: Prediction) -> (f64, f64) {
    match prediction {
        Prediction::Epsilon => (1.0 / signal, -noise / signal),
        Prediction::Velocity => (signal, -noise),
        Prediction::Sample => (0.0, 1.0),
    }
}

/// The noise in the same.
pub(super) fn noise_preserving((signal, noise): (f64, f64), prediction: Prediction) -> (f64, f64) {
    match prediction {
        Prediction::Epsilon => (0.0, 1.0),
        Prediction::Velocity => (noise, signal),
        Prediction::Sample => (1.0 / noise, -signal / noise),
    }
}

/// A flow's level with noise over signal times `shift`. Esser et al. 2024, arXiv:2403.03206, sec. 5.3.
pub(super) fn shifted(sigma: f64, shift: f64) -> f64 {
    shift * sigma / (1.0 + (shift - 1.0) * sigma)
}

/// abar_t for every training timestep: the share of signal in the variance of the noised sample.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NoiseSchedule {
    pub abar: Vec<f64>,
    /// abar after the last step.
    pub final_abar: f64,
    /// Is `final_abar` 1 whatever the table?
    set_alpha_to_one: bool,
}

impl NoiseSchedule {
    /// Of the sampler's class, which decides over defaults.
    pub fn new(config: &SchedulerConfig, sampler: Sampler) -> Result<NoiseSchedule> {
        if sampler == Sampler::FlowEuler {
            return Ok(NoiseSchedule::of_flow(config));
        }
        let set_alpha_to_one = config.set_alpha_to_one(sampler);
        let mut betas = betas(config, sampler)?;
        if config.rescales_to_zero_snr(sampler) {
            betas = with_zero_terminal_snr(&betas);
        }
        if let Some((t, beta)) = betas.iter().enumerate().find(|(_, beta)| !(0.0..=1.0).contains(*beta)) {
            return Err(config.error(format!("beta {t} is {beta}, expected 0 to 1; check beta_start and beta_end")));
        }
        let abar = alphas_cumprod(&betas);
        // An abar of 0 before the last timestep leaves nothing to sample from.
        if let Some(t) = abar[..abar.len() - 1].iter().position(|&a| a <= 0.0) {
            return Err(config.error(format!("alphas_cumprod is 0 from timestep {t} on; the betas are too large")));
        }
        let mut abar: Vec<f64> = abar.into_iter().map(f64::from).collect();
        if sampler.has_sigmas() && config.rescales_to_zero_snr(sampler) {
            // Not 0, so that the first sigma is finite: 4096.
            *abar.last_mut().expect("a checked, non-empty table") = f64::from(2f32.powi(-24));
        }
        let final_abar = if set_alpha_to_one { 1.0 } else { abar[0] };
        Ok(NoiseSchedule { abar, final_abar, set_alpha_to_one })
    }

    /// (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2) for every trained level of a flow, the last of which is all noise.
    fn of_flow(config: &SchedulerConfig) -> NoiseSchedule {
        let n = config.num_train_timesteps;
        let abar = |t: usize| {
            let (signal, noise) = Noising::Flow.level(shifted((t + 1) as f64 / n as f64, config.shift()));
            signal * signal / (signal * signal + noise * noise)
        };
        NoiseSchedule { abar: (0..n).map(abar).collect(), final_abar: 1.0, set_alpha_to_one: true }
    }

    /// abar' = abar / (gamma - (gamma - 1) abar): the signal-to-noise ratio divided by `gamma`, for pictures of gamma
    /// times the area. The final abar follows. MegaFusion, arXiv:2408.11001, eq. (8).
    pub fn rescheduled(&self, gamma: f64) -> NoiseSchedule {
        let abar: Vec<f64> = self.abar.iter().map(|a| a / (gamma - (gamma - 1.0) * a)).collect();
        let final_abar = if self.set_alpha_to_one { 1.0 } else { abar[0] };
        NoiseSchedule { abar, final_abar, set_alpha_to_one: self.set_alpha_to_one }
    }

    /// sqrt((1 - abar) / abar), between the integers linearly interpolated, outside the table its ends.
    pub fn sigma(&self, t: f64) -> f64 {
        let last = self.abar.len() - 1;
        let t = t.clamp(0.0, last as f64);
        let below = (t.floor() as usize).min(last - 1);
        let fraction = t - below as f64;
        self.at(below) + (self.at(below + 1) - self.at(below)) * fraction
    }

    /// sigma of a training timestep.
    pub fn at(&self, t: usize) -> f64 {
        ((1.0 - self.abar[t]) / self.abar[t]).sqrt()
    }

    /// The timestep of a sigma, between the integers linearly interpolated in log(sigma).
    pub fn timestep(&self, sigma: f64) -> f64 {
        let log_of = |sigma: f64| sigma.max(1e-10).ln();
        let above = self.abar.partition_point(|&abar| ((1.0 - abar) / abar).sqrt() <= sigma);
        let below = above.saturating_sub(1).min(self.abar.len() - 2);
        let (low, high) = (log_of(self.at(below)), log_of(self.at(below + 1)));
        let fraction = ((low - log_of(sigma)) / (low - high)).clamp(0.0, 1.0);
        below as f64 + fraction
    }
}

/// In f32, as the models were trained.
fn betas(config: &SchedulerConfig, sampler: Sampler) -> Result<Vec<f32>> {
    let n = config.num_train_timesteps;
    if let Some(betas) = &config.trained_betas {
        if betas.len() != n {
            let got = betas.len();
            return Err(config.error(format!("trained_betas has {got} values, num_train_timesteps is {n}")));
        }
        return Ok(betas.iter().map(|&beta| beta as f32).collect());
    }
    let (start, end) = config.beta_range(sampler);
    match config.beta_schedule(sampler) {
        "linear" => Ok(linspace(start as f32, end as f32, n)),
        "scaled_linear" => {
            let mut roots = linspace(start.sqrt() as f32, end.sqrt() as f32, n);
            roots.iter_mut().for_each(|root| *root *= *root);
            Ok(roots)
        }
        "squaredcos_cap_v2" => Ok(cosine(n)),
        "sigmoid" => {
            let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
            let (start, end) = (start as f32, end as f32);
            Ok(linspace(-6.0, 6.0, n).into_iter().map(|x| sigmoid(x) * (end - start) + start).collect())
        }
        other => Err(config.error(format!(
            "beta_schedule is {other:?}, expected \"linear\", \"scaled_linear\", \"squaredcos_cap_v2\" or \"sigmoid\""
        ))),
    }
}

/// torch.linspace in f32: from both ends to the middle.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = (end - start) / (n - 1) as f32;
    let value = |i: usize| {
        if i < n / 2 { step.mul_add(i as f32, start) } else { (-step).mul_add((n - 1 - i) as f32, end) }
    };
    (0..n).map(value).collect()
}

/// Nichol & Dhariwal 2021, arXiv:2102.09672, eq. (17): abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), beta at most 0.999.
fn cosine(n: usize) -> Vec<f32> {
    let abar = |u: f64| ((u + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let beta = |i: usize| 1.0 - abar((i + 1) as f64 / n as f64) / abar(i as f64 / n as f64);
    (0..n).map(|i| beta(i).min(0.999) as f32).collect()
}

/// Products in f64, each stored as f32: what torch.cumprod does on a CPU.
fn alphas_cumprod(betas: &[f32]) -> Vec<f32> {
    let next = |product: &mut f64, beta: &f32| {
        *product *= f64::from(1.0 - beta);
        Some(*product as f32)
    };
    betas.iter().scan(1.0f64, next).collect()
}

/// sqrt(abar) shifted and scaled so that the last is 0 and the first is kept. Lin et al. 2023, arXiv:2305.08891,
/// algorithm 1.
fn with_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = alphas_cumprod(betas).into_iter().map(f32::sqrt).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let abar: Vec<f32> = roots.iter().map(|root| ((root - last) * scale).powi(2)).collect();
    let before = |t: usize| if t == 0 { 1.0 } else { abar[t - 1] };
    (0..abar.len()).map(|t| 1.0 - abar[t] / before(t)).collect()
}
