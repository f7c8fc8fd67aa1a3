//! Upsample guidance (Hwang, Park & Jo 2024, arXiv:2404.01709): sampling at the final size, where in the first steps a second
//! call of the network, on the samples' means over squares, says what the picture is at the trained size.
//! ```text
//! D, U   means over squares of m x m cells; each cell repeated over its square
//! P      = abar + (1 - abar) / m^2                         the power of D[z]: the mean of m^2 noises has an m-th of their deviation
//! tau    = argmin_k |log SNR(k) - log(m^2 SNR(t))|         SNR = abar / (1 - abar), over the trained timesteps
//! eps'   = eps(z, t) + w_t U[eps(D[z] / sqrt(P), tau) / m - D[eps(z, t)]]
//! w_t    = theta where t > (1 - share) 1000, else 0
//! ```
//! for the unconditional and the conditional rows alike, before guidance. z is x at unit power, whatever the sampler's own
//! scale. A network that predicts v or x0 is corrected in the noise that its output stands for: with eps = p v + q z
//! ```text
//! v'     = v + w_t / p U[p_tau v(D[z] / sqrt(P), tau) / m + q_tau D[z] / (m sqrt(P)) - p D[v] - q D[z]]
//! ```
//! Where abar is below 1e-4 (the first step of zero terminal SNR) there is no picture to correct, and w_t is 0. SDXL is told
//! the same sizes in both calls, those of the whole picture. theta 1.2 and share 0.6 are those of the one published program, which
//! is not the authors'; it divides by 2 in place of m in one term, where the paper's formula is taken here.

use serde::{Deserialize, Serialize};

use super::method::{GenerationMethod, MethodSpec, OptionKind, OptionSpec, from_options};
use super::{LowEvaluation, LowResolution, Method, Prediction, Run, Sampling, Size};
use crate::error::{Error, Result};
use crate::models::UnetOptions;
use crate::runtime::Tensor;
use crate::schedulers::{Evaluation, Sampler, Scheduler};

pub static UPSAMPLE_GUIDANCE: MethodSpec = MethodSpec {
    name: "upsample-guidance",
    summary: "every step at the final size, the first ones corrected by a second call at the trained size (arXiv:2404.01709)",
    relays: false,
    choices: &[],
    options: OPTIONS,
    parse: |given| from_options(UpsampleGuidance::default(), given),
};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpsampleGuidance {
    /// m: cells along a square's side; 1: there is no second call. `None`: the final sides over the native ones, to the nearest
    /// whole number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up_scale: Option<usize>,
    pub up_theta: f64,
    /// Of the trained timesteps, from the noisiest on.
    pub up_share: f64,
}

const HEADING: &str = "Upsample guidance";

/// In the order of the struct's fields.
const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "up_scale",
        heading: HEADING,
        value_name: "M",
        help: "How many times the trained sides the picture has (default: by the size, to the nearest whole number)\n\n\
               The second call sees squares of MxM latent cells as one, so the latents' sides must be multiples of M. 1: no second \
               call.",
        kind: OptionKind::Integer { least: 1, most: 64, expected: "expected a whole number from 1 to 64" },
    },
    OptionSpec {
        name: "up_theta",
        heading: HEADING,
        value_name: "X",
        help: "Weight of the correction, above 0 (default: 1.2)",
        kind: OptionKind::Number { above: 0.0, most: 100.0, expected: "expected a number above 0, at most 100" },
    },
    OptionSpec {
        name: "up_share",
        heading: HEADING,
        value_name: "X",
        help: "Share of the timesteps that are corrected, from the noisiest on (default: 0.6)",
        kind: OptionKind::Share,
    },
];

impl Default for UpsampleGuidance {
    fn default() -> UpsampleGuidance {
        UpsampleGuidance { up_scale: None, up_theta: 1.2, up_share: 0.6 }
    }
}

impl From<UpsampleGuidance> for Method {
    fn from(options: UpsampleGuidance) -> Method {
        Method::of(&UPSAMPLE_GUIDANCE, options)
    }
}

/// Below this abar a correction would be a quotient of roundings.
const SMALLEST_ABAR: f64 = 1e-4;

/// P: the mean square of means over m x m cells of samples with this abar, whose signal is as smooth as the squares.
pub fn pooled_power(abar: f64, m: usize) -> f64 {
    abar + (1.0 - abar) / (m * m) as f64
}

/// tau: the trained timestep whose ratio of signal to noise is nearest, in its logarithm, to m^2 times that of `abar`.
/// `table`: alphas_cumprod.
pub fn matched_timestep(table: &[f64], abar: f64, m: usize) -> usize {
    let log_snr = |abar: f64| (abar / (1.0 - abar)).ln();
    let wanted = log_snr(abar) + 2.0 * (m as f64).ln();
    let distance = |&k: &usize| {
        let own = log_snr(table[k]);
        // Without signal both are infinite.
        if own == wanted { 0.0 } else { (own - wanted).abs() }
    };
    let nearest = (0..table.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
    nearest.unwrap_or(0)
}

impl UpsampleGuidance {
    fn scale(&self, run: &Run) -> usize {
        let by_size = || {
            let native = run.native()?;
            Some((run.last_stage().size.area() as f64 / native.area() as f64).sqrt().round().max(1.0) as usize)
        };
        self.up_scale.or_else(by_size).unwrap_or(1)
    }

    /// Is an evaluation corrected?
    fn corrects(&self, evaluation: &Evaluation, scheduler: &Scheduler) -> bool {
        let trained = scheduler.alphas_cumprod().len() as f64;
        f64::from(evaluation.timestep) > (1.0 - self.up_share) * trained
    }

    fn second_call(&self, evaluation: &Evaluation, scheduler: &Scheduler, m: usize) -> LowEvaluation {
        let (signal, sigma) = scheduler.noise_level(evaluation.level);
        let abar = signal * signal / (signal * signal + sigma * sigma);
        let table = scheduler.alphas_cumprod();
        let tau = matched_timestep(table, abar, m);
        let (side, root_power) = (m as f64, pooled_power(abar, m).sqrt());
        let input_scale = f64::from(evaluation.input_scale);
        let factors = match abar < SMALLEST_ABAR {
            true => [0.0; 3],
            false => {
                let ((q, p), (q_tau, p_tau)) = (scheduler.noise_from(abar), scheduler.noise_from(table[tau]));
                let of_means = (q_tau / (side * root_power) - q) / p;
                [self.up_theta * p_tau / (side * p), self.up_theta * of_means * input_scale, self.up_theta]
            }
        };
        LowEvaluation {
            timestep: tau as f32,
            input_scale: (input_scale / root_power) as f32,
            factors: factors.map(|factor| factor as f32),
        }
    }
}

impl GenerationMethod for UpsampleGuidance {
    /// Twice the sides.
    fn default_size(&self, native: Size) -> Size {
        native.times(2)
    }

    fn check(&self, run: &Run) -> Result<()> {
        let refuse = |field, value: String, reason: String| Err(Error::Request { field, value, reason });
        if self.up_scale == Some(0) {
            return refuse("up_scale", "0".into(), "expected 1 (no second call) or more".into());
        }
        if !(self.up_theta > 0.0 && self.up_theta.is_finite()) {
            return refuse("up_theta", self.up_theta.to_string(), "expected a number above 0".into());
        }
        if !(0.0..=1.0).contains(&self.up_share) {
            return refuse("up_share", self.up_share.to_string(), "expected a share of the timesteps, 0 to 1".into());
        }
        let (m, size, factor) = (self.scale(run), run.last_stage().size, run.factor());
        let [w, h] = [size.width / factor, size.height / factor];
        if !w.is_multiple_of(m) || !h.is_multiple_of(m) {
            let reason = format!(
                "the {w}x{h} latent cells of {size} are not made of squares of {m}x{m}; choose sides that are multiples of {}",
                m * factor
            );
            return refuse("up_scale", m.to_string(), reason);
        }
        if m > 1 && run.scheduler().sampler() == Sampler::FlowEuler {
            let reason = "upsample guidance matches noise levels of diffusions, and this model is a flow".into();
            return refuse("method", run.method().to_string(), reason);
        }
        match run.model().and_then(|model| model.unet.as_ref()) {
            Some(unet) if m > 1 && unet.in_channels != unet.out_channels => {
                let reason = "this network reads a mask beside the samples, which has no smaller size; choose a model that \
                              reads the samples alone";
                refuse("method", run.method().to_string(), reason.into())
            }
            _ => Ok(()),
        }
    }

    /// The last latents.
    fn sample(&self, sampling: &mut Sampling) -> Result<Tensor> {
        let run = sampling.run();
        let (scheduler, m) = (run.scheduler(), self.scale(run));
        sampling.prepare(vec![scheduler.clone()], |coefficients| coefficients)?;
        let evaluations = scheduler.evaluations(run.ranges()[0].clone());
        // By step: all evaluations of a step ask for the same.
        let mut corrected = vec![false; run.ranges()[0].len()];
        if m > 1 {
            for evaluation in &evaluations {
                corrected[evaluation.step - run.ranges()[0].start] |= self.corrects(evaluation, scheduler);
            }
        }
        if corrected.contains(&true) {
            let second = |evaluation: &Evaluation| match self.corrects(evaluation, scheduler) {
                true => self.second_call(evaluation, scheduler, m),
                false => LowEvaluation { factors: [0.0; 3], ..self.second_call(evaluation, scheduler, m) },
            };
            let evaluations = evaluations.iter().map(second).collect();
            sampling.set_low_resolution(LowResolution { scale: m, evaluations });
        }
        let x = sampling.first_samples()?;
        let of_step = |step: usize| match corrected[step] {
            true => Prediction::Upsampled(UnetOptions::default()),
            false => Prediction::default(),
        };
        Ok(sampling.stage(0, x, &of_step)?.0)
    }
}
