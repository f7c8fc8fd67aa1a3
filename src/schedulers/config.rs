use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use super::Sampler;
use crate::error::{Error, Result};
use crate::json;
use crate::ops::Thresholding;

/// What the network's output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Prediction {
    /// The noise.
    #[serde(rename = "epsilon")]
    Epsilon,
    /// `sqrt(abar) noise - sqrt(1 - abar) x0`. Salimans & Ho 2022, arXiv:2202.00512, appendix D.
    #[serde(rename = "v_prediction")]
    Velocity,
    /// The clean sample.
    #[serde(rename = "sample")]
    Sample,
}

/// Which of the training timesteps a run visits. Lin et al. 2023, arXiv:2305.08891, table 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spacing {
    Leading,
    Trailing,
    Linspace,
}

/// How the noise levels of a run lie between the largest and the smallest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum SigmaSpacing {
    /// Those of the timesteps.
    #[default]
    Uniform,
    /// Evenly in sigma^(1/7). Karras et al. 2022, arXiv:2206.00364, eq. (5).
    Karras,
    /// Evenly in log(sigma).
    Exponential,
}

impl SigmaSpacing {
    pub const ALL: [SigmaSpacing; 3] = [SigmaSpacing::Uniform, SigmaSpacing::Karras, SigmaSpacing::Exponential];

    pub fn name(self) -> &'static str {
        match self {
            SigmaSpacing::Uniform => "uniform",
            SigmaSpacing::Karras => "karras",
            SigmaSpacing::Exponential => "exponential",
        }
    }

    /// As the "Schedule type" of webui's infotext.
    pub fn webui_name(self) -> &'static str {
        match self {
            SigmaSpacing::Uniform => "Uniform",
            SigmaSpacing::Karras => "Karras",
            SigmaSpacing::Exponential => "Exponential",
        }
    }
}

impl fmt::Display for SigmaSpacing {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SigmaSpacing {
    type Err = Error;
    fn from_str(s: &str) -> Result<SigmaSpacing> {
        SigmaSpacing::ALL.into_iter().find(|spacing| spacing.name() == s).ok_or_else(|| Error::Request {
            field: "sigmas",
            value: s.into(),
            reason: "expected uniform, karras or exponential".into(),
        })
    }
}

/// scheduler_config.json of any class of the family (DDIM, PNDM, DDPM, Euler, ...). Keys that a class does not have are
/// ignored; keys that are absent take the default that diffusers gives to the class of the sampler in use.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SchedulerConfig {
    /// Stands in errors: the file's path.
    #[serde(skip)]
    pub(super) what: String,
    /// Asked for by the user, whatever the file says.
    #[serde(skip)]
    requested_sigmas: Option<SigmaSpacing>,
    #[serde(rename = "_class_name", default)]
    class_name: String,
    #[serde(default = "defaults::num_train_timesteps")]
    pub(super) num_train_timesteps: usize,
    pub(super) beta_start: Option<f64>,
    pub(super) beta_end: Option<f64>,
    pub(super) beta_schedule: Option<String>,
    pub(super) trained_betas: Option<Vec<f64>>,
    #[serde(default)]
    rescale_betas_zero_snr: bool,
    prediction_type: Option<Prediction>,
    timestep_spacing: Option<Spacing>,
    #[serde(default)]
    pub(super) steps_offset: usize,
    set_alpha_to_one: Option<bool>,
    clip_sample: Option<bool>,
    clip_sample_range: Option<f64>,
    thresholding: Option<bool>,
    dynamic_thresholding_ratio: Option<f64>,
    sample_max_value: Option<f64>,
    variance_type: Option<String>,
    interpolation_type: Option<String>,
    timestep_type: Option<String>,
    final_sigmas_type: Option<String>,
    use_karras_sigmas: Option<bool>,
    use_exponential_sigmas: Option<bool>,
    use_beta_sigmas: Option<bool>,
    use_lu_lambdas: Option<bool>,
    use_flow_sigmas: Option<bool>,
    skip_prk_steps: Option<bool>,
    solver_order: Option<usize>,
    solver_type: Option<String>,
    algorithm_type: Option<String>,
    lower_order_final: Option<bool>,
    euler_at_final: Option<bool>,
    predict_x0: Option<bool>,
    disable_corrector: Option<Vec<usize>>,
    #[serde(default, deserialize_with = "any_number")]
    lambda_min_clipped: Option<f64>,
    original_inference_steps: Option<usize>,
    timestep_scaling: Option<f64>,
    shift: Option<f64>,
    shift_terminal: Option<f64>,
    use_dynamic_shifting: Option<bool>,
    invert_sigmas: Option<bool>,
    stochastic_sampling: Option<bool>,
}

mod defaults {
    pub fn num_train_timesteps() -> usize {
        1000
    }
}

/// A number, also an infinity.
fn any_number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<f64>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    match json::number(&value) {
        Some(number) => Ok(Some(number)),
        None if value.is_null() => Ok(None),
        None => Err(serde::de::Error::custom(format!("invalid type: {value}, expected a number"))),
    }
}

/// Why a file cannot be used, with the key and its value when one key is the reason.
fn unusable(file: serde_json::Value, error: &serde_json::Error) -> String {
    let serde_json::Value::Object(keys) = file else {
        return format!("not a JSON object ({error}): expected the keys of a scheduler's configuration");
    };
    for (key, value) in keys {
        let alone = serde_json::json!({ &key: &value });
        if let Err(error) = SchedulerConfig::deserialize(alone) {
            return format!("{key} is {value}: {error}");
        }
    }
    error.to_string()
}

impl SchedulerConfig {
    /// Parses scheduler_config.json, with Python's `Infinity` and `NaN`; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`]: not JSON, a key of the wrong type, a value out of range or not supported.
    pub fn from_json(what: &str, text: &str) -> Result<SchedulerConfig> {
        let file = json::parse(text).map_err(|error| Error::config(what, format!("not JSON: {error}")))?;
        let config =
            SchedulerConfig::deserialize(&file).map_err(|error| Error::config(what, unusable(file, &error)))?;
        let config = SchedulerConfig { what: what.into(), ..config };
        if !(2..=MOST_TIMESTEPS).contains(&config.num_train_timesteps) {
            let got = config.num_train_timesteps;
            return Err(config.error(format!("num_train_timesteps is {got}, expected 2 to {MOST_TIMESTEPS}")));
        }
        for (key, value) in [
            ("clip_sample_range", config.clip_sample_range),
            ("sample_max_value", config.sample_max_value),
            ("timestep_scaling", config.timestep_scaling),
            ("shift", config.shift),
        ] {
            if let Some(value) = value.filter(|value| !(*value > 0.0 && value.is_finite())) {
                return Err(config.error(format!("{key} is {value}, expected a positive number")));
            }
        }
        if let Some(ratio) = config.dynamic_thresholding_ratio.filter(|ratio| !(0.0..=1.0).contains(ratio)) {
            return Err(config.error(format!("dynamic_thresholding_ratio is {ratio}, expected 0 to 1")));
        }
        if let Some(terminal) = config.shift_terminal.filter(|terminal| !(0.0..1.0).contains(terminal)) {
            return Err(config.error(format!("shift_terminal is {terminal}, expected 0 (none) to below 1")));
        }
        for (key, value) in [
            ("steps_offset", config.steps_offset),
            ("original_inference_steps", config.original_inference_steps.unwrap_or(1)),
        ] {
            if value > config.num_train_timesteps {
                let most = config.num_train_timesteps;
                return Err(config.error(format!("{key} is {value}, expected at most num_train_timesteps, {most}")));
            }
        }
        if config.original_inference_steps == Some(0) {
            return Err(config.error("original_inference_steps is 0, expected at least 1"));
        }
        Ok(config)
    }

    /// The class that the file was written by; empty where it does not say.
    pub fn class_name(&self) -> &str {
        &self.class_name
    }

    /// The sampler of the file's own class; where the class has none here, the nearest one:
    /// [`substitution`](SchedulerConfig::substitution) says so.
    pub fn sampler(&self) -> Sampler {
        self.class_sampler().0
    }

    /// A line for the user, when the file's class (or its algorithm) has no sampler here and another one runs instead.
    pub fn substitution(&self) -> Option<String> {
        let (sampler, exact) = self.class_sampler();
        if exact {
            return None;
        }
        let algorithm = match (self.class_name.as_str(), &self.algorithm_type) {
            ("DPMSolverMultistepScheduler", Some(algorithm)) => format!(" with algorithm_type {algorithm}"),
            _ => String::new(),
        };
        Some(format!(
            "{}: the model's sampler, {}{algorithm}, is not available here; {sampler} runs instead (request.scheduler chooses)",
            self.what, self.class_name
        ))
    }

    /// The sampler of the class, and whether it is the class's own.
    fn class_sampler(&self) -> (Sampler, bool) {
        match self.class_name.as_str() {
            "" | "DDIMScheduler" => (Sampler::Ddim, true),
            "DDPMScheduler" => (Sampler::Ddpm, true),
            "EulerDiscreteScheduler" => (Sampler::Euler, true),
            "EulerAncestralDiscreteScheduler" => (Sampler::EulerAncestral, true),
            "HeunDiscreteScheduler" => (Sampler::Heun, true),
            "LCMScheduler" => (Sampler::Lcm, true),
            "PNDMScheduler" => (Sampler::Pndm, true),
            "UniPCMultistepScheduler" => (Sampler::UniPc, true),
            "DEISMultistepScheduler" => (Sampler::Deis, true),
            "FlowMatchEulerDiscreteScheduler" => (Sampler::FlowEuler, true),
            _ if self.is_flow_matching() => (Sampler::FlowEuler, false),
            "DPMSolverMultistepScheduler" => match self.algorithm_type.as_deref() {
                None | Some("dpmsolver++" | "deis") => (Sampler::Dpm2M, true),
                Some("sde-dpmsolver++") => (Sampler::Dpm2MSde, true),
                Some("sde-dpmsolver") => (Sampler::Dpm2MSde, false),
                Some(_) => (Sampler::Dpm2M, false),
            },
            "DPMSolverSDEScheduler" => (Sampler::Dpm2MSde, false),
            "DPMSolverSinglestepScheduler" => (Sampler::Dpm2M, false),
            "LMSDiscreteScheduler" | "KDPM2DiscreteScheduler" => (Sampler::Euler, false),
            "KDPM2AncestralDiscreteScheduler" => (Sampler::EulerAncestral, false),
            _ => (Sampler::Ddim, false),
        }
    }

    /// As the published Stable Diffusion pipelines read the file, whatever it says or leaves out: `steps_offset` is 1,
    /// and `clip_sample`, which is for pictures and would cut latents at 1, is off.
    pub fn for_latents(self) -> SchedulerConfig {
        SchedulerConfig { steps_offset: 1, clip_sample: Some(false), ..self }
    }

    /// Is it of a model trained by flow matching, which has no betas?
    pub fn is_flow_matching(&self) -> bool {
        self.class_name.starts_with("FlowMatch")
    }

    /// Is it the configuration that models distilled to a few steps come with: Euler-ancestral, trailing timesteps?
    pub fn is_for_few_steps(&self) -> bool {
        self.class_name == "EulerAncestralDiscreteScheduler" && self.timestep_spacing == Some(Spacing::Trailing)
    }

    /// With the noise levels spaced as the user asks (`request.sigmas`); `None` leaves the choice to the file.
    pub fn with_sigmas(self, sigmas: Option<SigmaSpacing>) -> SchedulerConfig {
        SchedulerConfig { requested_sigmas: sigmas, ..self }
    }

    pub fn prediction(&self) -> Prediction {
        self.prediction_type.unwrap_or(Prediction::Epsilon)
    }

    pub(crate) fn error(&self, reason: impl Into<String>) -> Error {
        Error::config(&self.what, reason)
    }

    /// (first, last) beta; LCM's and Heun's classes start at Stable Diffusion's.
    pub(super) fn beta_range(&self, sampler: Sampler) -> (f64, f64) {
        let (start, end) = match sampler {
            Sampler::Lcm | Sampler::Heun => (0.00085, 0.012),
            _ => (1e-4, 0.02),
        };
        (self.beta_start.unwrap_or(start), self.beta_end.unwrap_or(end))
    }

    pub(super) fn beta_schedule(&self, sampler: Sampler) -> &str {
        let default = if sampler == Sampler::Lcm { "scaled_linear" } else { "linear" };
        self.beta_schedule.as_deref().unwrap_or(default)
    }

    /// The classes of Heun, PNDM and DEIS do not have the key.
    pub(super) fn rescales_to_zero_snr(&self, sampler: Sampler) -> bool {
        self.rescale_betas_zero_snr && !matches!(sampler, Sampler::Heun | Sampler::Pndm | Sampler::Deis)
    }

    pub(super) fn spacing(&self, sampler: Sampler) -> Spacing {
        self.timestep_spacing.unwrap_or(match sampler {
            Sampler::Ddim | Sampler::Ddpm | Sampler::Lcm | Sampler::Pndm => Spacing::Leading,
            _ => Spacing::Linspace,
        })
    }

    pub(super) fn sigma_spacing(&self, sampler: Sampler) -> Result<SigmaSpacing> {
        if let Some(requested) = self.requested_sigmas {
            if requested != SigmaSpacing::Uniform && !sampler.has_sigmas() {
                let reason = format!("has no effect with {sampler}; it is for samplers that run on a list of sigmas");
                return Err(Error::Request { field: "sigmas", value: requested.to_string(), reason });
            }
            return Ok(requested);
        }
        if !sampler.has_sigmas() || sampler == Sampler::EulerAncestral {
            return Ok(SigmaSpacing::Uniform); // the classes do not have the keys
        }
        let unsupported = [
            ("use_beta_sigmas", self.use_beta_sigmas),
            ("use_lu_lambdas", self.use_lu_lambdas),
            ("use_flow_sigmas", self.use_flow_sigmas),
        ];
        if let Some((key, _)) = unsupported.into_iter().find(|(_, value)| *value == Some(true)) {
            return Err(
                self.error(format!("{key} true is not supported; set it to false, or use request.sigmas karras"))
            );
        }
        match (self.use_karras_sigmas.unwrap_or(false), self.use_exponential_sigmas.unwrap_or(false)) {
            (true, true) => Err(self.error("use_karras_sigmas and use_exponential_sigmas are both true; choose one")),
            (true, false) => Ok(SigmaSpacing::Karras),
            (false, true) => Ok(SigmaSpacing::Exponential),
            (false, false) => Ok(SigmaSpacing::Uniform),
        }
    }

    /// Is abar taken as 1 after the last step? Else it is the table's first value.
    pub(super) fn set_alpha_to_one(&self, sampler: Sampler) -> bool {
        sampler == Sampler::Ddpm || self.set_alpha_to_one.unwrap_or(sampler != Sampler::Pndm)
    }

    /// The bound of the clean sample, for the samplers whose class clips.
    pub(super) fn clip(&self, sampler: Sampler) -> Option<f64> {
        let clips = match sampler {
            Sampler::Ddim | Sampler::Ddpm => self.clip_sample.unwrap_or(true),
            Sampler::Lcm | Sampler::Heun => self.clip_sample.unwrap_or(false),
            _ => false,
        };
        (clips && self.thresholding(sampler).is_none()).then(|| self.clip_sample_range.unwrap_or(1.0))
    }

    /// Dynamic thresholding, for the samplers whose class has it.
    pub(super) fn thresholding(&self, sampler: Sampler) -> Option<Thresholding> {
        use Sampler::{Ddim, Ddpm, Deis, Dpm2M, Dpm2MSde, Lcm, UniPc};
        let thresholds = matches!(sampler, Ddim | Ddpm | Lcm | Dpm2M | Dpm2MSde | UniPc | Deis);
        (thresholds && self.thresholding == Some(true)).then(|| Thresholding {
            ratio: self.dynamic_thresholding_ratio.unwrap_or(0.995) as f32,
            max: self.sample_max_value.unwrap_or(1.0) as f32,
        })
    }

    /// Of the noise that DDPM adds; the other samplers' classes do not have the key.
    pub(super) fn variance(&self, sampler: Sampler) -> Variance {
        match self.variance_type.as_deref() {
            Some("fixed_large") if sampler == Sampler::Ddpm => Variance::Largest,
            Some("learned_range") if sampler == Sampler::Ddpm => Variance::LearnedRange,
            _ => Variance::Smallest,
        }
    }

    /// Can this sampler step samples of `channels` channels by a network whose output has `output_channels`? It has as many,
    /// or twice as many where it also predicts a variance: that is needed by DDPM with variance_type learned_range, and left
    /// alone otherwise.
    ///
    /// # Errors
    /// [`Error::Config`], naming the configuration's file: the channels of the variance are missing; the output has another
    /// number of channels.
    pub fn check_channels(&self, sampler: Sampler, channels: usize, output_channels: usize) -> Result<()> {
        let learned = self.variance(sampler) == Variance::LearnedRange;
        if output_channels == 2 * channels || (output_channels == channels && !learned) {
            return Ok(());
        }
        let twice = 2 * channels;
        Err(self.error(match learned {
            true => format!(
                "variance_type is learned_range, so the denoiser's output must have {twice} channels, \
                 {channels} of them of the variance; it has {output_channels}: \
                 set variance_type to fixed_small, or use request.scheduler ddim"
            ),
            false => format!(
                "the denoiser's output has {output_channels} channels, expected {channels} as the samples have, \
                 or {twice} with a variance"
            ),
        }))
    }

    pub(super) fn ends_at_smallest_sigma(&self) -> bool {
        self.final_sigmas_type.as_deref() == Some("sigma_min")
    }

    /// Are the sigmas of Euler's steps spaced evenly in their logarithm, whatever the timesteps?
    pub(super) fn log_linear(&self, sampler: Sampler) -> bool {
        sampler == Sampler::Euler && self.interpolation_type.as_deref() == Some("log_linear")
    }

    pub(super) fn solver(&self) -> Solver {
        Solver {
            order: self.solver_order.unwrap_or(2),
            lower_order_final: self.lower_order_final.unwrap_or(true),
            euler_at_final: self.euler_at_final.unwrap_or(false),
            disable_corrector: self.disable_corrector.clone().unwrap_or_default(),
        }
    }

    /// Log signal-to-noise ratios (half of them) below this are left out by DPM-Solver.
    pub(super) fn lambda_min_clipped(&self, sampler: Sampler) -> f64 {
        match sampler {
            Sampler::Dpm2M | Sampler::Dpm2MSde => self.lambda_min_clipped.unwrap_or(f64::NEG_INFINITY),
            _ => f64::NEG_INFINITY,
        }
    }

    pub(super) fn original_inference_steps(&self) -> usize {
        self.original_inference_steps.unwrap_or(50)
    }

    pub(super) fn timestep_scaling(&self) -> f64 {
        self.timestep_scaling.unwrap_or(10.0)
    }

    /// How many times a flow's noise over signal is larger than that of the timestep.
    pub(super) fn shift(&self) -> f64 {
        self.shift.unwrap_or(1.0)
    }

    /// The level before a flow's last step; `None`: as it comes.
    pub(super) fn shift_terminal(&self) -> Option<f64> {
        self.shift_terminal.filter(|&terminal| terminal != 0.0)
    }

    pub(super) fn stochastic_sampling(&self) -> bool {
        self.stochastic_sampling == Some(true)
    }

    /// Is there a key that would change the sampler's numbers and is not supported?
    pub(super) fn check_for(&self, sampler: Sampler) -> Result<()> {
        let unsupported = |key: &str, value: &str, instead: &str| {
            Err(self.error(format!("{key} {value} is not supported by the {sampler} sampler; {instead}")))
        };
        let text = |key: &str, value: &Option<String>, wanted: &[&str]| match value {
            Some(value) if !wanted.contains(&value.as_str()) => {
                unsupported(key, value, &format!("use {}", wanted.join(" or ")))
            }
            _ => Ok(()),
        };
        if self.is_flow_matching() != (sampler == Sampler::FlowEuler) {
            let (class, of) = (&self.class_name, "a model trained by flow matching (SD3, Flux)");
            return Err(self.error(match self.is_flow_matching() {
                true => format!("{class} is of {of}, which {sampler} does not sample; use flow-euler"),
                false => format!("flow-euler samples {of}; this one has a table of betas, use ddim or euler"),
            }));
        }
        match sampler {
            Sampler::FlowEuler => {
                for (key, value) in
                    [("use_dynamic_shifting", self.use_dynamic_shifting), ("invert_sigmas", self.invert_sigmas)]
                {
                    if value == Some(true) {
                        return unsupported(key, "true", "set it to false");
                    }
                }
                Ok(())
            }
            Sampler::Deis if self.solver_order.is_some_and(|order| !(1..=2).contains(&order)) => {
                unsupported("solver_order", &self.solver_order.unwrap_or(2).to_string(), "use 2 or 1")
            }
            Sampler::Deis => Ok(()),
            Sampler::Ddpm => match self.variance_type.as_deref() {
                None | Some("fixed_small" | "fixed_small_log" | "fixed_large" | "learned_range") => Ok(()),
                Some(other) => unsupported("variance_type", other, "use request.scheduler ddim"),
            },
            Sampler::Ddim | Sampler::Heun | Sampler::Lcm => Ok(()),
            Sampler::EulerAncestral | Sampler::Pndm if self.prediction() == Prediction::Sample => {
                unsupported("prediction_type", "sample", "use request.scheduler ddim or euler")
            }
            Sampler::EulerAncestral => Ok(()),
            Sampler::Pndm if self.class_name == "PNDMScheduler" && self.skip_prk_steps != Some(true) => {
                unsupported("skip_prk_steps", "false", "set it to true, as Stable Diffusion's files do")
            }
            Sampler::Pndm => Ok(()),
            Sampler::Euler => {
                text("interpolation_type", &self.interpolation_type, &["linear", "log_linear"])?;
                text("timestep_type", &self.timestep_type, &["discrete"])?;
                text("final_sigmas_type", &self.final_sigmas_type, &["zero", "sigma_min"])
            }
            Sampler::Dpm2M | Sampler::Dpm2MSde | Sampler::UniPc => {
                text("final_sigmas_type", &self.final_sigmas_type, &["zero", "sigma_min"])?;
                if let Some(order) = self.solver_order.filter(|order| !(1..=2).contains(order)) {
                    return unsupported("solver_order", &order.to_string(), "use 2 or 1");
                }
                let own = match sampler {
                    Sampler::UniPc => self.class_name == "UniPCMultistepScheduler",
                    _ => self.class_name == "DPMSolverMultistepScheduler",
                };
                // Another class's file may hold its own solver types, which the published classes replace too.
                match (sampler, self.solver_type.as_deref()) {
                    (Sampler::UniPc, Some("bh1")) if own => unsupported("solver_type", "bh1", "use bh2"),
                    (Sampler::Dpm2M | Sampler::Dpm2MSde, Some("heun")) if own => {
                        unsupported("solver_type", "heun", "use midpoint")
                    }
                    (Sampler::UniPc, _) if own && self.predict_x0 == Some(false) => {
                        unsupported("predict_x0", "false", "set it to true")
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

/// The variance of the noise that a step of DDPM adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variance {
    /// The posterior's. Ho et al. 2020, arXiv:2006.11239, sec. 3.2.
    Smallest,
    /// beta. The same.
    Largest,
    /// Between the two, where the network says for each value. Nichol & Dhariwal 2021, arXiv:2102.09672, eq. (15).
    LearnedRange,
}

/// The keys of the multistep solvers.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Solver {
    pub order: usize,
    /// The last steps of a short run are of lower order.
    pub lower_order_final: bool,
    pub euler_at_final: bool,
    /// Steps after which UniPC does not correct.
    pub disable_corrector: Vec<usize>,
}

/// No published model has more than 1000; the bound keeps a typing error from asking for gigabytes.
const MOST_TIMESTEPS: usize = 1_000_000;
