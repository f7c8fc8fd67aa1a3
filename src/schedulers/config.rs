use serde::Deserialize;

use super::Sampler;
use crate::error::{Error, Result};

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

/// scheduler_config.json of any class of the family (DDIM, PNDM, DDPM, Euler, ...). Keys that a class does not have are
/// ignored; keys that are absent take the default that diffusers gives to the class of the sampler in use.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct SchedulerConfig {
    /// Stands in errors: the file's path.
    #[serde(skip)]
    pub(super) what: String,
    #[serde(rename = "_class_name", default)]
    class_name: String,
    #[serde(default = "defaults::num_train_timesteps")]
    pub(super) num_train_timesteps: usize,
    #[serde(default = "defaults::beta_start")]
    pub(super) beta_start: f64,
    #[serde(default = "defaults::beta_end")]
    pub(super) beta_end: f64,
    #[serde(default = "defaults::beta_schedule")]
    pub(super) beta_schedule: String,
    pub(super) trained_betas: Option<Vec<f64>>,
    #[serde(default)]
    pub(super) rescale_betas_zero_snr: bool,
    prediction_type: Option<Prediction>,
    timestep_spacing: Option<Spacing>,
    #[serde(default)]
    pub(super) steps_offset: usize,
    set_alpha_to_one: Option<bool>,
    clip_sample: Option<bool>,
    clip_sample_range: Option<f64>,
    #[serde(default)]
    thresholding: bool,
    variance_type: Option<String>,
    interpolation_type: Option<String>,
    timestep_type: Option<String>,
    final_sigmas_type: Option<String>,
    use_karras_sigmas: Option<bool>,
    use_exponential_sigmas: Option<bool>,
    use_beta_sigmas: Option<bool>,
}

mod defaults {
    pub fn num_train_timesteps() -> usize {
        1000
    }
    pub fn beta_start() -> f64 {
        1e-4
    }
    pub fn beta_end() -> f64 {
        0.02
    }
    pub fn beta_schedule() -> String {
        "linear".into()
    }
}

/// Why a file cannot be used, with the key and its value when one key is the reason.
fn unusable(json: &str, error: &serde_json::Error) -> String {
    let Ok(keys) = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(json) else {
        return format!("not a JSON object ({error}): download the file again");
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
    /// Parses scheduler_config.json; `what` (its path) stands in errors.
    ///
    /// # Errors
    /// [`Error::Config`]: not JSON, a key of the wrong type, a value out of range or not supported.
    pub fn from_json(what: &str, json: &str) -> Result<SchedulerConfig> {
        let config: SchedulerConfig =
            serde_json::from_str(json).map_err(|error| Error::config(what, unusable(json, &error)))?;
        let config = SchedulerConfig { what: what.into(), ..config };
        if config.class_name.starts_with("FlowMatch") {
            return Err(config.error(format!(
                "{} is a flow-matching scheduler (SD3, Flux), this is for the noise schedules of SD 1.x and 2.x",
                config.class_name
            )));
        }
        if !(2..=MOST_TIMESTEPS).contains(&config.num_train_timesteps) {
            let got = config.num_train_timesteps;
            return Err(config.error(format!("num_train_timesteps is {got}, expected 2 to {MOST_TIMESTEPS}")));
        }
        if let Some(range) = config.clip_sample_range.filter(|range| !(*range > 0.0 && range.is_finite())) {
            return Err(config.error(format!("clip_sample_range is {range}, expected a positive number")));
        }
        Ok(config)
    }

    /// The sampler of the file's own class; DDIM, which continues their idea, for classes without one here (PNDM, LMS,
    /// DPM-Solver).
    pub fn sampler(&self) -> Sampler {
        self.own_sampler().unwrap_or(Sampler::Ddim)
    }

    fn own_sampler(&self) -> Option<Sampler> {
        match self.class_name.as_str() {
            "DDIMScheduler" => Some(Sampler::Ddim),
            "DDPMScheduler" => Some(Sampler::Ddpm),
            "EulerDiscreteScheduler" => Some(Sampler::Euler),
            "EulerAncestralDiscreteScheduler" => Some(Sampler::EulerAncestral),
            _ => None,
        }
    }

    /// The file's class, if [`sampler`](SchedulerConfig::sampler) is not that class's own; its pictures will differ from
    /// those of the class.
    pub fn class_without_sampler(&self) -> Option<&str> {
        Some(self.class_name.as_str()).filter(|name| !name.is_empty() && self.own_sampler().is_none())
    }

    /// As the published Stable Diffusion pipelines read the file, whatever it says or leaves out: `steps_offset` is 1,
    /// and `clip_sample`, which is for pictures and would cut latents at 1, is off.
    pub fn for_latents(self) -> SchedulerConfig {
        SchedulerConfig { steps_offset: 1, clip_sample: Some(false), ..self }
    }

    /// Is it the configuration that models distilled to a few steps come with: Euler-ancestral, trailing timesteps?
    pub fn is_for_few_steps(&self) -> bool {
        self.class_name == "EulerAncestralDiscreteScheduler" && self.timestep_spacing == Some(Spacing::Trailing)
    }

    pub fn prediction(&self) -> Prediction {
        self.prediction_type.unwrap_or(Prediction::Epsilon)
    }

    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::config(&self.what, reason)
    }

    pub(super) fn spacing(&self, sampler: Sampler) -> Spacing {
        self.timestep_spacing.unwrap_or(match sampler {
            Sampler::Ddim | Sampler::Ddpm => Spacing::Leading,
            Sampler::Euler | Sampler::EulerAncestral => Spacing::Linspace,
        })
    }

    /// Is abar taken as 1 after the last step? Else it is the table's first value.
    pub(super) fn set_alpha_to_one(&self, sampler: Sampler) -> bool {
        sampler == Sampler::Ddpm || self.set_alpha_to_one.unwrap_or(true)
    }

    /// The bound of the clean sample, for the samplers whose class clips.
    pub(super) fn clip(&self, sampler: Sampler) -> Option<f64> {
        let clips = matches!(sampler, Sampler::Ddim | Sampler::Ddpm) && self.clip_sample.unwrap_or(true);
        clips.then(|| self.clip_sample_range.unwrap_or(1.0))
    }

    pub(super) fn fixed_large_variance(&self) -> bool {
        self.variance_type.as_deref() == Some("fixed_large")
    }

    pub(super) fn ends_at_smallest_sigma(&self) -> bool {
        self.final_sigmas_type.as_deref() == Some("sigma_min")
    }

    /// Is there a key that would change the sampler's numbers and is not supported?
    pub(super) fn check_for(&self, sampler: Sampler) -> Result<()> {
        let unsupported = |key: &str, value: &str, instead: &str| {
            Err(self.error(format!("{key} {value} is not supported by the {sampler} sampler; {instead}")))
        };
        match sampler {
            Sampler::Ddim | Sampler::Ddpm if self.thresholding => {
                unsupported("thresholding", "true", "it is for pixel models; set it to false")
            }
            Sampler::Ddpm => match self.variance_type.as_deref() {
                None | Some("fixed_small" | "fixed_small_log" | "fixed_large") => Ok(()),
                Some(other) => unsupported("variance_type", other, "use --scheduler ddim"),
            },
            Sampler::Ddim => Ok(()),
            Sampler::EulerAncestral if self.prediction() == Prediction::Sample => {
                unsupported("prediction_type", "sample", "use --scheduler ddim or euler")
            }
            Sampler::EulerAncestral => Ok(()),
            Sampler::Euler => {
                let set = [
                    ("use_karras_sigmas", self.use_karras_sigmas),
                    ("use_exponential_sigmas", self.use_exponential_sigmas),
                    ("use_beta_sigmas", self.use_beta_sigmas),
                ];
                if let Some((key, _)) = set.iter().find(|(_, value)| *value == Some(true)) {
                    return unsupported(key, "true", "set it to false, or use --scheduler ddim");
                }
                for (key, value, wanted) in [
                    ("interpolation_type", &self.interpolation_type, &["linear"] as &[&str]),
                    ("timestep_type", &self.timestep_type, &["discrete"]),
                    ("final_sigmas_type", &self.final_sigmas_type, &["zero", "sigma_min"]),
                ] {
                    if let Some(value) = value
                        && !wanted.contains(&value.as_str())
                    {
                        return unsupported(key, value, &format!("use {}", wanted.join(" or ")));
                    }
                }
                Ok(())
            }
        }
    }
}

/// No published model has more than 1000; the bound keeps a typing error from asking for gigabytes.
const MOST_TIMESTEPS: usize = 1_000_000;
