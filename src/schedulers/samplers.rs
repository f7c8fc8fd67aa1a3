//! The steps of every sampler, in the notation of their papers: abar_t, sigma = sqrt((1 - abar) / abar), and for those
//! of variance-preserving latents x = signal x0 + noise_level n with signal = sqrt(abar).

use super::config::Variance;
use super::schedule::{Noising, noise_preserving, x0_preserving};
use super::{Evaluation, Prediction, Sampler, Scheduler};
use crate::ops::{HISTORY, Kept, LearnedNoise, StepCoefficients};

/// [`StepCoefficients`] before they are rounded to f32.
#[derive(Clone, Copy, Default)]
struct Affine {
    x0_from_x: f64,
    x0_from_e: f64,
    next_from_x: f64,
    next_from_e: f64,
    next_from_x0: f64,
    next_from_noise: f64,
    /// Variances, the smallest and the largest.
    learned: Option<[f64; 2]>,
    next_from_history: [f64; HISTORY],
    /// (from x, from e, from x0)
    kept: Option<[f64; 3]>,
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
            learned: self.learned.map(|variances| {
                let [log_smallest, log_largest] = variances.map(|variance| variance.ln() as f32);
                LearnedNoise { log_smallest, log_largest }
            }),
            next_from_history: self.next_from_history.map(|weight| weight as f32),
            kept: self.kept.map(|[x, e, x0]| Kept { from_x: x as f32, from_e: e as f32, from_x0: x0 as f32 }),
            x0_from_next: false,
        }
    }
}

/// The clean sample is kept for later steps.
const KEEP_X0: Option<[f64; 3]> = Some([0.0, 0.0, 1.0]);
/// The network's output is.
const KEEP_E: Option<[f64; 3]> = Some([0.0, 1.0, 0.0]);

impl Scheduler {
    /// The evaluations of step `i`, `done` steps after the run or its stage began.
    pub(super) fn step(&self, i: usize, done: usize) -> Vec<Evaluation> {
        let last = i + 1 == self.timesteps().len();
        let (affines, draws_noise) = match self.sampler {
            Sampler::Ddim => (vec![self.ddim(i)], self.eta > 0.0),
            Sampler::Ddpm => (vec![self.ddpm(i)], self.timesteps()[i] > 0.0),
            Sampler::Euler => (vec![self.euler(i, 0.0)], false),
            Sampler::EulerAncestral => {
                let (from, to) = (self.sigma(i), self.sigma(i + 1));
                let up = to * ((from - to) * (from + to)).max(0.0).sqrt() / from;
                (vec![self.euler(i, up)], true)
            }
            Sampler::Heun => (self.heun(i), false),
            Sampler::Dpm2M => (vec![self.dpm_solver(i, done, false)], false),
            Sampler::Dpm2MSde => (vec![self.dpm_solver(i, done, true)], true),
            Sampler::UniPc => (vec![self.unipc(i, done)], false),
            Sampler::Lcm => (vec![self.lcm(i)], !last),
            Sampler::Pndm => (self.pndm(i, done), false),
            Sampler::Deis => (vec![self.deis(i, done)], false),
            Sampler::FlowEuler => (vec![self.flow_euler(i)], self.stochastic_flow),
        };
        let count = affines.len();
        let evaluation = |(k, affine): (usize, Affine)| {
            // A second evaluation is made where the step ends.
            let level = i + k;
            let input_scale = match self.noising() {
                Noising::Exploding => 1.0 / self.sigma(level).hypot(1.0),
                Noising::Preserving | Noising::Flow => 1.0,
            };
            Evaluation {
                step: i,
                level,
                ends_step: k + 1 == count,
                timestep: self.timesteps()[level],
                input_scale: input_scale as f32,
                coefficients: affine.rounded(self.clip),
                draws_noise,
            }
        };
        affines.into_iter().enumerate().map(evaluation).collect()
    }

    pub(super) fn abar(&self, i: usize) -> f64 {
        self.schedule.abar[self.timesteps()[i] as usize]
    }

    fn level(&self, sigma: f64) -> (f64, f64) {
        self.noising().level(sigma)
    }

    /// Where step `i` begins; of the number of steps: where the last ends.
    fn sigma(&self, i: usize) -> f64 {
        self.levels.sigmas[i]
    }

    /// abar one stride before timestep `t`.
    fn abar_before(&self, t: usize) -> f64 {
        t.checked_sub(self.stride).map_or(self.schedule.final_abar, |s| self.schedule.abar[s])
    }

    /// x0 as `(of x, of e)` where step `i` begins, for the samplers with a list of sigmas.
    fn x0(&self, i: usize) -> (f64, f64) {
        self.noising().x0(self.sigma(i), self.prediction)
    }

    /// x0 as `(of x, of e)` at a timestep of this abar.
    fn x0_at(&self, abar: f64) -> (f64, f64) {
        x0_preserving((abar.sqrt(), (1.0 - abar).sqrt()), self.prediction)
    }

    /// s = t - stride; std = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s);
    /// x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s - std^2) eps + std noise: arXiv:2010.02502, eqs. (12), (16). The eps is
    /// the one of the x0 before it is clipped.
    fn ddim(&self, i: usize) -> Affine {
        let t = self.timesteps()[i] as usize;
        let abar = self.schedule.abar[t];
        let previous = match &self.targets {
            Some(targets) => self.schedule.abar[targets[i]],
            None => self.abar_before(t),
        };
        let variance = (1.0 - previous) / (1.0 - abar) * (1.0 - abar / previous);
        let std = self.eta * variance.max(0.0).sqrt();
        let direction = (1.0 - previous - std * std).max(0.0).sqrt();
        let (signal, sigma) = (abar.sqrt(), (1.0 - abar).sqrt());
        let (eps_from_x, eps_from_e) = noise_preserving((signal, sigma), self.prediction);
        let (x0_from_x, x0_from_e) = self.x0_at(abar);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: direction * eps_from_x,
            next_from_e: direction * eps_from_e,
            next_from_x0: previous.sqrt(),
            next_from_noise: std,
            ..Affine::default()
        }
    }

    /// The posterior's mean and deviation: arXiv:2006.11239, eq. (7), from this timestep to the list's next one. The variance
    /// lies between the posterior's and beta: it is one of the two, or learned, arXiv:2102.09672, eq. (15).
    fn ddpm(&self, i: usize) -> Affine {
        const LEAST: f64 = 1e-20; // its logarithm is taken
        let abar = self.abar(i);
        let previous = if i + 1 < self.timesteps().len() { self.abar(i + 1) } else { 1.0 };
        let alpha = abar / previous;
        let beta = 1.0 - alpha;
        let posterior = ((1.0 - previous) / (1.0 - abar) * beta).max(LEAST);
        let (noise, learned) = match self.variance {
            _ if self.timesteps()[i] <= 0.0 => (0.0, None),
            Variance::Smallest => (posterior.sqrt(), None),
            Variance::Largest => (beta.sqrt(), None),
            Variance::LearnedRange => (1.0, Some([posterior, beta.max(LEAST)])),
        };
        let (x0_from_x, x0_from_e) = self.x0_at(abar);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: alpha.sqrt() * (1.0 - previous) / (1.0 - abar),
            next_from_x0: previous.sqrt() * beta / (1.0 - abar),
            next_from_noise: noise,
            learned,
            ..Affine::default()
        }
    }

    /// dx/dsigma = (x - x0) / sigma, one Euler step to sqrt(to^2 - up^2), then noise of deviation `up`.
    fn euler(&self, i: usize, up: f64) -> Affine {
        let (from, to) = (self.sigma(i), self.sigma(i + 1));
        let down = (to * to - up * up).max(0.0).sqrt();
        let (x0_from_x, x0_from_e) = self.x0(i);
        let keep = down / from;
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: keep,
            next_from_x0: 1.0 - keep,
            next_from_noise: up,
            ..Affine::default()
        }
    }

    /// Euler from x to x', then half of both slopes: x + (to - from) ((x - x0) / from + (x' - x0') / to) / 2. The part
    /// that x and x0 have in it is kept for the second evaluation. The last step, to sigma 0, is Euler's.
    fn heun(&self, i: usize) -> Vec<Affine> {
        let first = self.euler(i, 0.0);
        let (from, to) = (self.sigma(i), self.sigma(i + 1));
        if to == 0.0 {
            return vec![first];
        }
        let half = (to - from) / 2.0;
        let kept = Some([1.0 + half / from, 0.0, -half / from]);
        let (x0_from_x, x0_from_e) = self.x0(i + 1);
        let second = Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: half / to,
            next_from_x0: -half / to,
            next_from_history: [1.0, 0.0, 0.0],
            ..Affine::default()
        };
        vec![Affine { kept, ..first }, second]
    }

    /// With lambda = -log(sigma), h = lambda_t - lambda_s, r = (lambda_s - lambda_s1) / h and the clean samples m0 of this
    /// step and m1 of the one before: D = m0 + (m0 - m1) / (2 r), or m0 at order 1;
    /// x_t = (sigma_t / sigma_s) x + alpha_t (1 - e^-h) D: arXiv:2211.01095, algorithm 2. Stochastic:
    /// x_t = (sigma_t / sigma_s) e^-h x + alpha_t (1 - e^-2h) D + sigma_t sqrt(1 - e^-2h) noise.
    fn dpm_solver(&self, i: usize, done: usize, stochastic: bool) -> Affine {
        let steps = self.timesteps().len();
        let (from, to) = (self.sigma(i), self.sigma(i + 1));
        let ((_, noise_s), (signal_t, noise_t)) = (self.level(from), self.level(to));
        let decay = to / from; // e^-h
        let (x0_from_x, x0_from_e) = self.x0(i);
        let short = self.solver.lower_order_final && steps < 15;
        let lower = i + 1 == steps && (self.solver.euler_at_final || short || to == 0.0);
        let second_order = self.solver.order > 1 && done > 0 && !lower;
        let ratio = (self.sigma(i.saturating_sub(1)) / from).ln() / (from / to).ln();
        let before = if second_order { 0.5 / ratio } else { 0.0 };
        let (keep, gain, noise) = match stochastic {
            false => (noise_t / noise_s, signal_t * (1.0 - decay), 0.0),
            true => (
                noise_t / noise_s * decay,
                signal_t * (1.0 - decay * decay),
                noise_t * (1.0 - decay * decay).max(0.0).sqrt(),
            ),
        };
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: keep,
            next_from_x0: gain * (1.0 + before),
            next_from_noise: noise,
            next_from_history: [-gain * before, 0.0, 0.0],
            kept: KEEP_X0,
            ..Affine::default()
        }
    }

    /// Adams-Bashforth in rho = noise / signal along the noise eps, of order 2 with eps between its last two values taken
    /// linearly in log(rho): x_t = alpha_t (x / alpha_s + w0 eps_0 + w1 eps_1). Zhang & Chen 2022, arXiv:2204.13902, sec.
    /// 3.
    fn deis(&self, i: usize, done: usize) -> Affine {
        let steps = self.timesteps().len();
        let (from, to) = (self.sigma(i), self.sigma(i + 1));
        let ((signal_s, noise_s), (signal_t, _)) = (self.level(from), self.level(to));
        let lower = i + 1 == steps && self.solver.lower_order_final && steps < 15;
        let [now, before] = match self.solver.order > 1 && done > 0 && !lower {
            false => [to - from, 0.0],
            true => {
                let earlier = self.sigma(i - 1);
                // The integral of (log rho - log b) / (log a - log b) from `from` to `to`.
                let weight = |a: f64, b: f64| {
                    let integral = |rho: f64| rho * (rho.ln() - b.ln() - 1.0) / (a / b).ln();
                    integral(to) - integral(from)
                };
                [weight(from, earlier), weight(earlier, from)]
            }
        };
        let (x0_from_x, x0_from_e) = self.x0(i);
        // eps as (of x, of e, of x0), which thresholding changes with x0.
        let eps = match self.thresholding {
            Some(_) => [1.0 / noise_s, 0.0, -signal_s / noise_s],
            None => {
                let (of_x, of_e) = noise_preserving((signal_s, noise_s), self.prediction);
                [of_x, of_e, 0.0]
            }
        };
        let [of_x, of_e, of_x0] = eps.map(|weight| signal_t * now * weight);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: signal_t / signal_s + of_x,
            next_from_e: of_e,
            next_from_x0: of_x0,
            next_from_history: [signal_t * before, 0.0, 0.0],
            kept: Some(eps),
            ..Affine::default()
        }
    }

    /// dx/dsigma = e: x + (sigma' - sigma) e. Stochastic: the clean sample with fresh noise, (1 - sigma') x0 + sigma' noise.
    fn flow_euler(&self, i: usize) -> Affine {
        let (from, to) = (self.sigma(i), self.sigma(i + 1));
        let (x0_from_x, x0_from_e) = self.x0(i);
        let step = Affine { x0_from_x, x0_from_e, ..Affine::default() };
        match self.stochastic_flow {
            false => Affine { next_from_x: 1.0, next_from_e: to - from, ..step },
            true => Affine { next_from_x0: 1.0 - to, next_from_noise: to, ..step },
        }
    }

    /// The order of UniPC's step `i`.
    fn unipc_order(&self, i: usize, done: usize) -> usize {
        let left = self.timesteps().len() - i;
        let order = if self.solver.lower_order_final { self.solver.order.min(left) } else { self.solver.order };
        if self.sigma(i + 1) == 0.0 { 1 } else { order.min(done + 1) }
    }

    /// The corrector of the step before, then the predictor: arXiv:2302.04867, algorithms 1 and 2, with
    /// B = e^-h - 1 and m0, m1, m2 the clean samples of this step and the two before. The corrector replaces x by
    /// x - alpha B ((rho_1 - 1/2) (m2 - m1) / r + rho_2 (m0 - m1)), as x is the predictor's.
    fn unipc(&self, i: usize, done: usize) -> Affine {
        let sigma = |i: usize| self.sigma(i);
        // The corrected x is x + c0 m0 + c1 m1 + c2 m2.
        let [mut c0, mut c1, mut c2] = [0.0; 3];
        if done > 0 && !self.solver.disable_corrector.contains(&(i - 1)) {
            let h = (sigma(i - 1) / sigma(i)).ln();
            let b = (-h).exp_m1();
            let gain = -self.level(sigma(i)).0 * b;
            if self.unipc_order(i - 1, done - 1) == 1 {
                (c0, c1) = (0.5 * gain, -0.5 * gain);
            } else {
                let ratio = -(sigma(i - 2) / sigma(i - 1)).ln() / h;
                let phi_2 = b / -h - 1.0;
                let phi_3 = phi_2 / -h - 0.5;
                let (b1, b2) = (phi_2 / b, 2.0 * phi_3 / b);
                let rho_1 = (b1 - b2) / (1.0 - ratio);
                let rho_2 = b1 - rho_1;
                c0 = gain * rho_2;
                c2 = gain * (rho_1 - 0.5) / ratio;
                c1 = -c0 - c2;
            }
        }
        let (from, to) = (sigma(i), sigma(i + 1));
        let ((_, noise_s), (signal_t, noise_t)) = (self.level(from), self.level(to));
        let (keep, gain) = (noise_t / noise_s, signal_t * (1.0 - to / from));
        let before = match self.unipc_order(i, done) {
            1 => 0.0,
            // 1 / 2 of (m1 - m0) / r, r < 0
            _ => 0.5 / (-(sigma(i - 1) / from).ln() / (from / to).ln()),
        };
        let (x0_from_x, x0_from_e) = self.x0(i);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: keep,
            next_from_x0: keep * c0 + gain * (1.0 - before),
            next_from_history: [keep * c1 + gain * before, keep * c2, 0.0],
            kept: KEEP_X0,
            ..Affine::default()
        }
    }

    /// The consistency function f = c_skip x + c_out x0 of arXiv:2310.04378, sec. 4.2, with sigma_data 1/2, then noised
    /// to the next timestep's level; the last step's f is the sample.
    fn lcm(&self, i: usize) -> Affine {
        let abar = self.abar(i);
        let scaled = f64::from(self.timesteps()[i]) * self.timestep_scaling;
        let (skip, out) = (0.25 / (scaled * scaled + 0.25), scaled / scaled.hypot(0.5));
        let (signal, noise) = match i + 1 < self.timesteps().len() {
            true => (self.abar(i + 1).sqrt(), (1.0 - self.abar(i + 1)).sqrt()),
            false => (1.0, 0.0),
        };
        let (x0_from_x, x0_from_e) = self.x0_at(abar);
        Affine {
            x0_from_x,
            x0_from_e,
            next_from_x: signal * skip,
            next_from_x0: signal * out,
            next_from_noise: noise,
            ..Affine::default()
        }
    }

    /// x at abar `to` as `(of x, of e)` at `from`, along the output e: arXiv:2202.09778, eq. (11).
    fn transfer(&self, from: f64, to: f64) -> (f64, f64) {
        let keep = (to / from).sqrt();
        let along_eps = -(to - from) / (from * (1.0 - to).sqrt() + (from * (1.0 - from) * to).sqrt());
        match self.prediction {
            Prediction::Velocity => (keep + along_eps * (1.0 - from).sqrt(), along_eps * from.sqrt()),
            _ => (keep, along_eps),
        }
    }

    /// Adams-Bashforth along the outputs of up to four steps: arXiv:2202.09778, eqs. (9), (12). The first step goes along
    /// the mean of the outputs at its two ends, so it has two evaluations, and it is the first output that is kept.
    fn pndm(&self, i: usize, done: usize) -> Vec<Affine> {
        let at = |t: usize| {
            let abar = self.schedule.abar[t.min(self.schedule.abar.len() - 1)];
            let (x0_from_x, x0_from_e) = self.x0_at(abar);
            (abar, Affine { x0_from_x, x0_from_e, ..Affine::default() })
        };
        let t = self.timesteps()[i] as usize;
        let (abar, clean) = at(t);
        let (of_x, of_e) = self.transfer(abar, self.abar_before(t));
        let weights: [f64; 4] = match done {
            0 => [1.0, 0.0, 0.0, 0.0],
            1 => [3.0 / 2.0, -1.0 / 2.0, 0.0, 0.0],
            2 => [23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0, 0.0],
            _ => [55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
        };
        let [now, before @ ..] = weights.map(|weight| of_e * weight);
        let step = Affine { next_from_x: of_x, next_from_e: now, next_from_history: before, kept: KEEP_E, ..clean };
        if done > 0 || i + 1 == self.timesteps().len() {
            return vec![step];
        }
        // Back to the x before the first evaluation, (x - of_e e_1) / of_x, and again to where it went.
        let t = self.timesteps()[i + 1] as usize;
        let (abar, clean) = at(t);
        let (again_of_x, again_of_e) = self.transfer(at(t + self.stride).0, abar);
        let second = Affine {
            next_from_x: again_of_x / of_x,
            next_from_e: again_of_e / 2.0,
            next_from_history: [again_of_e / 2.0 - again_of_x * of_e / of_x, 0.0, 0.0],
            ..clean
        };
        vec![step, second]
    }
}
