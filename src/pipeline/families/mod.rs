//! What a model family is to the pipeline: its parts and files, how prompts are encoded, what its network is told in a
//! stage, and how samples become pictures. A family is one file, listed in [`FAMILIES`].

mod conditioning;
mod control;
mod deepfloyd;
mod latent;
mod prompts;
mod sd;
mod sd3;
mod sdxl;
mod t5_prompts;
mod unet_conditions;

use std::sync::Arc;

use super::ip_adapter::ImagePrompts;
use super::memory::LoadOptions;
use super::resident::Module;
use super::{ModelFiles, Size, SizeIds, TextOptions, WeightReport};
use crate::error::{Error, Result};
use crate::methods::{Denoiser, PublishedSchedule, Sides};
use crate::models::{Partition, UnetConfig, WeightStore, Weights};
use crate::runtime::{Device, Tensor};
use crate::schedulers::{Sampler, SchedulerConfig};

pub(super) use control::ControlStrength;

/// Every family over latents. A model is of the last one whose parts it has.
static FAMILIES: &[&FamilySpec] = &[&sd::SD, &sdxl::SDXL, &sd3::SD3];

/// The family over pixels, by its UNet ([`UnetConfig::is_of_pixels`]).
pub(super) static OF_PIXELS: &FamilySpec = &deepfloyd::DEEPFLOYD;

/// Folders of schedulers: the samples', and of the noise in a picture that is enlarged.
pub(super) const SCHEDULERS: [&str; 2] = ["scheduler", deepfloyd::NOISING];

/// A family as it is listed.
pub(super) struct FamilySpec {
    /// `Stable Diffusion 1.x or 2.x`, for messages.
    pub name: &'static str,
    /// The classes of its model_index.json that no other family has.
    pub pipelines: &'static [&'static str],
    /// Beside the scheduler, which every family has.
    pub parts: &'static [Part],
    pub defaults: Defaults,
    /// Are the models trained by flow matching, rather than on a table of betas?
    pub flow_matching: bool,
    /// Reads the configurations and checks that the parts fit together; weights are loaded when a module is asked for.
    pub open: Open,
}

type Open = fn(&Arc<ModelFiles>, &LoadOptions) -> Result<Box<dyn Family>>;

/// What a request gets that does not say it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    pub steps: usize,
    /// Classifier-free guidance scale; where `embeds_guidance`, the scale that the network is told.
    pub guidance: f32,
    /// Was the network distilled to read the guidance scale, in place of classifier-free guidance? Meng et al. 2023,
    /// arXiv:2210.03142.
    pub embeds_guidance: bool,
    /// `None`: the method's choice.
    pub sampler: Option<Sampler>,
    /// By how much of the native sides a relay enlarges a picture, at most.
    pub relay_growth: f64,
    /// How many times the native sides a relay's picture has that names no size; `None`: as the method has it.
    pub relayed_size: Option<usize>,
    /// The share of a relay's steps that all stages after the first have together.
    pub relayed_share: f64,
    /// Has the network convolutions that MegaFusion++ dilates? Else plain MegaFusion is the method.
    pub dilates: bool,
    /// Of MegaFusion's published code, for `reference_compat`.
    pub published: PublishedSchedule,
}

impl Defaults {
    /// Of the latent families (MegaFusion, arXiv:2408.11001, sec. 4.1).
    pub const LATENT: Defaults = Defaults {
        steps: 50,
        guidance: 7.0,
        embeds_guidance: false,
        sampler: None,
        relay_growth: 0.5,
        relayed_size: None,
        relayed_share: 0.2,
        dilates: true,
        published: PublishedSchedule::SD,
    };

    /// The same for a model distilled to a few steps without guidance (SDXL-Turbo; Sauer et al. 2023, arXiv:2311.17042).
    pub fn distilled(self) -> Defaults {
        Defaults { steps: 4, guidance: 1.0, ..self }
    }

    /// The same for a latent consistency model, which is told the guidance scale (Luo et al. 2023, arXiv:2310.04378): those
    /// of the published pipeline.
    pub fn latent_consistency(self) -> Defaults {
        Defaults { steps: 4, guidance: 8.5, embeds_guidance: true, sampler: Some(Sampler::Lcm), ..self }
    }

    /// Is there classifier-free guidance at this scale, and so a negative prompt?
    pub fn guides(&self, scale: f32) -> bool {
        scale > 1.0 && !self.embeds_guidance
    }

    /// Was the model distilled to a few steps?
    pub fn is_distilled(&self) -> bool {
        self.embeds_guidance || self.guidance <= 1.0
    }
}

/// A part of a model: a folder of its directory.
pub(super) struct Part {
    pub folder: &'static str,
    /// Its class in model_index.json, for parts with weights.
    pub class: &'static str,
    /// How the names of its weight files begin; `None`: it has no weights (a tokenizer).
    pub weights: Option<&'static str>,
    /// Models of the family may lack it.
    pub is_optional: bool,
}

impl Part {
    const fn tokenizer(folder: &'static str) -> Part {
        Part { folder, class: "", weights: None, is_optional: false }
    }

    const fn text_encoder(folder: &'static str, class: &'static str) -> Part {
        Part { folder, class, weights: Some("model"), is_optional: false }
    }

    const fn network(folder: &'static str, class: &'static str) -> Part {
        Part { folder, class, weights: Some("diffusion_pytorch_model"), is_optional: false }
    }

    /// The same of a part that not every model of the family has.
    const fn optional(self) -> Part {
        Part { is_optional: true, ..self }
    }
}

impl FamilySpec {
    /// The family of a model, by the parts that `has` says it has.
    pub fn of(has: impl Fn(&str) -> bool) -> &'static FamilySpec {
        let fits = |family: &&&FamilySpec| family.parts.iter().all(|part| part.is_optional || has(part.folder));
        FAMILIES.iter().rev().find(fits).copied().unwrap_or(FAMILIES[0])
    }

    /// # Errors
    /// [`Error::Config`], naming the scheduler's file: it is not of such models.
    pub fn check_scheduler(&self, scheduler: &SchedulerConfig) -> Result<()> {
        if scheduler.is_flow_matching() == self.flow_matching {
            return Ok(());
        }
        let class = if scheduler.class_name().is_empty() { "a file without a class" } else { scheduler.class_name() };
        let (is, trained) = match self.flow_matching {
            true => ("is not for flow matching", "by flow matching"),
            false => ("is for models trained by flow matching (SD3, Flux)", "on a table of betas"),
        };
        Err(scheduler.error(format!("{class} {is}, and {} is trained {trained}", self.name)))
    }

    /// The family that model_index.json says a model is of, where its class says it.
    pub fn of_class(class: &str) -> Option<&'static FamilySpec> {
        FamilySpec::all().find(|family| family.pipelines.contains(&class))
    }

    fn all() -> impl Iterator<Item = &'static FamilySpec> {
        FAMILIES.iter().copied().chain([OF_PIXELS])
    }

    pub fn part(&self, folder: &str) -> Option<&'static Part> {
        self.parts.iter().find(|part| part.folder == folder)
    }

    /// The names of all families, for messages.
    pub fn names() -> String {
        let names: Vec<&str> = FamilySpec::all().map(|family| family.name).collect();
        crate::names::one_of(&names)
    }
}

/// A model whose modules come into memory when they are asked for.
pub(super) trait Family: Send + Sync {
    /// The size that the model was trained at, if its configuration says so.
    fn native_size(&self) -> Option<Size>;

    /// The network's configuration, where it is a UNet.
    fn unet(&self) -> Option<&UnetConfig> {
        None
    }

    /// Where its samples are.
    fn space(&self) -> &dyn SampleSpace;

    /// What sides of pictures are made of.
    fn sides(&self) -> Sides {
        self.space().factor().into()
    }

    /// Is the network told sizes of the original picture, the crop and the target ([`SizeIds`])?
    fn reads_size_ids(&self) -> bool {
        false
    }

    /// Is T5 among its text encoders, so that a prompt has a number of its tokens ([`TextOptions::t5_length`])?
    fn reads_t5(&self) -> bool {
        false
    }

    /// Is the network an inpainting one, which reads a mask and the masked picture's latents beside the latents?
    fn reads_mask(&self) -> bool;

    /// Does the network enlarge a picture, which it reads with noise beside the samples? Then abar of every timestep that the noise
    /// may have.
    fn lowres_noising(&self) -> Option<&[f64]> {
        None
    }

    /// How many chunks of the text encoder's context a prompt fills; 1 where long prompts are cut off.
    ///
    /// # Errors
    /// Those of the tokenizer.
    fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize>;

    /// The words of textual inversion that stand in a prompt, each once.
    ///
    /// # Errors
    /// Those of the tokenizer.
    fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>>;

    /// Encodes prompts, each once; all are padded to the chunks of the longest.
    ///
    /// # Errors
    /// Those of the tokenizer and the text encoder.
    fn encode_prompts(
        &self,
        prompts: &[PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds>;

    /// What the network is told in a run.
    fn conditions(&self, inputs: RunInputs) -> Box<dyn RunConditions>;

    /// What has weights, in the order of a run.
    fn modules(&self) -> Vec<&dyn Module>;

    /// The weights of every module, in the same order.
    fn weights(&self) -> &[WeightReport];
}

/// What samples are to pictures: the latents of a VAE, or the pictures themselves.
pub(super) trait SampleSpace: Send + Sync {
    /// Pixels per cell of a sample, along a side.
    fn factor(&self) -> usize;

    /// Channels of a sample.
    fn channels(&self) -> usize;

    /// Has a picture a distribution of clean samples, of which one is drawn?
    fn has_posterior(&self) -> bool {
        true
    }

    /// The picture of a clean sample: f32, `[1, h, w, C]` to `[1, H, W, 3]`, not clamped. `warn` is told what had to be
    /// done otherwise than asked.
    ///
    /// # Errors
    /// Those of the decoder.
    fn decode(&self, x0: &Tensor, partition: Partition, warn: &mut dyn FnMut(&str)) -> Result<Tensor>;

    /// The clean sample of a picture: the posterior's mode, or with `noise`, `[N, h, w, C]`, N samples of it.
    ///
    /// # Errors
    /// Those of the encoder.
    fn encode(
        &self,
        picture: &Tensor,
        noise: Option<&Tensor>,
        partition: Partition,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Tensor>;
}

/// What a run tells the network beside the samples and the timesteps.
pub(super) struct RunInputs {
    /// Rows in the order of the network's batch, unconditional ones first; each row serves as many consecutive images.
    pub prompts: PromptEmbeds,
    /// Pictures beside them; none for a network that is no UNet.
    pub images: ImagePrompts,
    /// How often every sample stands in the network's batch: twice under guidance.
    pub repeats: usize,
    pub sizes: SizeIds,
    /// What a network is told that reads its guidance scale, less 1.
    pub guidance: Option<f32>,
    /// The timestep of the noise in the picture that the network enlarges, where it does.
    pub noise_level: Option<f32>,
    /// Of each ControlNet beside the network.
    pub controls: Vec<ControlStrength>,
}

/// A prompt to encode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PromptText {
    /// `None`: nothing was given, which is not for every family the empty text.
    pub text: Option<String>,
    /// Is it what guidance steers away from?
    pub negative: bool,
}

impl PromptText {
    /// What messages call it.
    pub fn kind(&self) -> &'static str {
        if self.negative { "negative prompt" } else { "prompt" }
    }
}

/// Encoded prompts, a row each.
#[derive(Clone, Debug)]
pub(super) struct PromptEmbeds {
    /// What attention reads: `[R, L, D]`.
    pub embeds: Tensor,
    /// What is added to the time embedding, for families that do so: `[R, P]`.
    pub pooled: Option<Tensor>,
}

impl PromptEmbeds {
    /// The rows of all, in this order.
    ///
    /// # Errors
    /// Those of the device; [`Error::Argument`]: no parts.
    pub fn concat(parts: &[PromptEmbeds]) -> Result<PromptEmbeds> {
        let embeds: Vec<Tensor> = parts.iter().map(|part| part.embeds.clone()).collect();
        let pooled: Vec<Tensor> = parts.iter().filter_map(|part| part.pooled.clone()).collect();
        let pooled = if pooled.is_empty() { None } else { Some(Tensor::concat(&pooled)?) };
        Ok(PromptEmbeds { embeds: Tensor::concat(&embeds)?, pooled })
    }

    /// The same on another device.
    ///
    /// # Errors
    /// As [`Tensor::to_device`].
    pub fn to_device(&self, device: &Device) -> Result<PromptEmbeds> {
        let pooled = self.pooled.as_ref().map(|pooled| pooled.to_device(device)).transpose()?;
        Ok(PromptEmbeds { embeds: self.embeds.to_device(device)?, pooled })
    }

    /// Rows of these, in this order.
    ///
    /// # Errors
    /// Those of the device.
    pub fn rows(&self, rows: &[usize]) -> Result<PromptEmbeds> {
        if rows.iter().copied().eq(0..self.embeds.shape()[0]) {
            return Ok(self.clone());
        }
        let part = |&row: &usize| -> Result<PromptEmbeds> {
            let pooled = self.pooled.as_ref().map(|pooled| pooled.rows(row..row + 1)).transpose()?;
            Ok(PromptEmbeds { embeds: self.embeds.rows(row..row + 1)?, pooled })
        };
        PromptEmbeds::concat(&rows.iter().map(part).collect::<Result<Vec<_>>>()?)
    }
}

/// What a family's network is told in a run.
pub(super) trait RunConditions {
    /// Computes what the stages have in common, for a run of these timesteps.
    ///
    /// # Errors
    /// Those of the network.
    fn prepare(&mut self, timesteps: &[f32]) -> Result<()>;

    /// The network with its conditioning for a stage; `reuse` as in
    /// [`DiffusionModel::begin_stage`](crate::methods::DiffusionModel::begin_stage).
    ///
    /// # Errors
    /// Those of the network.
    fn begin_stage(
        &mut self,
        size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>>;
}

/// Loads one part: its layers from its store. The report comes from what the layers asked for, and names what none did.
///
/// # Errors
/// Those of `load`; a missing tensor with all that are missing and with the one that looks like it.
pub(super) fn load_part<T>(
    module: &'static str,
    store: WeightStore,
    load: impl Fn(&Weights) -> Result<T>,
) -> Result<(T, WeightReport)> {
    let part = load(&store.root()).map_err(|error| store.explained(error, &load))?;
    let parameters = store.manifest().iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    let bytes = store.bytes();
    let (variant, unused) = (store.variant().map(String::from), store.unused());
    Ok((part, WeightReport { module, parameters, bytes, variant, unused }))
}

/// # Errors
/// [`Error::Config`] naming the model.
fn misfit<T>(files: &ModelFiles, reason: String) -> Result<T> {
    Err(Error::config(format!("model {}", files.name()), reason))
}
