//! Stable Diffusion 3 and 3.5: two CLIP text encoders and, where it is there, T5; a transformer over latents of 16 channels, trained
//! by flow matching. Esser et al. 2024, arXiv:2403.03206.

use std::any::Any;
use std::sync::Arc;

use super::conditioning::OfTimesteps;
use super::latent::LatentSpace;
use super::prompts::{ClipPair, EncodedPair};
use super::t5_prompts::{T5Padding, T5TextEncoder};
use super::{
    Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, RunInputs, SampleSpace, misfit,
};
use crate::error::{Error, Result};
use crate::methods::{Denoiser, PatchInput, PublishedSchedule, Sides, Size};
use crate::models::{ClipOutput, Mmdit, MmditConditioning, MmditConfig, UnetOptions};
use crate::ops::{self, StepTable};
use crate::pipeline::memory::{LoadOptions, Role};
use crate::pipeline::resident::{Module, Resident};
use crate::pipeline::{ModelFiles, TextOptions, WeightReport};
use crate::runtime::{DType, Device, Tensor};

pub static SD3: FamilySpec = FamilySpec {
    name: "Stable Diffusion 3",
    pipelines: &["StableDiffusion3Pipeline"],
    parts: &[
        Part::tokenizer("tokenizer"),
        Part::tokenizer("tokenizer_2"),
        Part::tokenizer("tokenizer_3").optional(),
        Part::text_encoder("text_encoder", "CLIPTextModelWithProjection"),
        Part::text_encoder("text_encoder_2", "CLIPTextModelWithProjection"),
        Part::text_encoder("text_encoder_3", "T5EncoderModel").optional(),
        Part::network("transformer", "SD3Transformer2DModel"),
        Part::network("vae", "AutoencoderKL"),
    ],
    // MegaFusion goes to twice the sides by 20 and 8 steps.
    defaults: Defaults {
        steps: 28,
        relay_growth: 1.0,
        relayed_share: 2.0 / 7.0,
        dilates: false,
        published: PublishedSchedule::SDXL,
        ..Defaults::LATENT
    },
    flow_matching: true,
    open: |files, options| Ok(Box::new(StableDiffusion3::open(files, options)?)),
};

struct StableDiffusion3 {
    /// In the order of the channels of the prompts' embeddings.
    clip: ClipPair,
    /// Of a model without it, zeros stand for what it would say.
    t5: T5TextEncoder,
    transformer: Arc<Resident<Mmdit>>,
    config: MmditConfig,
    latents: LatentSpace,
    weights: Vec<WeightReport>,
    text_device: Device,
    dtype: DType,
}

impl StableDiffusion3 {
    fn open(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<StableDiffusion3> {
        let clip_configs = [files.clip_config("text_encoder")?, files.clip_config("text_encoder_2")?];
        let (config, vae_config) = (files.transformer_config()?, files.vae_config()?);
        let width: usize = clip_configs.iter().map(|config| config.hidden_size).sum();
        if width > config.joint_attention_dim {
            let reason = format!(
                "transformer/config.json has joint_attention_dim {}, and the hidden_size of text_encoder/config.json and \
                 text_encoder_2/config.json together is {width}; it must not be larger",
                config.joint_attention_dim
            );
            return misfit(files, reason);
        }
        // An encoder without a projection is projected by the identity.
        let pooled: usize = clip_configs.iter().map(|config| config.projection_dim.unwrap_or(config.hidden_size)).sum();
        if pooled != config.pooled_projection_dim {
            let reason = format!(
                "transformer/config.json has pooled_projection_dim {}, and the projection_dim of text_encoder/config.json and \
                 text_encoder_2/config.json together is {pooled}; they must be equal",
                config.pooled_projection_dim
            );
            return misfit(files, reason);
        }
        if config.in_channels != vae_config.latent_channels || config.out_channels != vae_config.latent_channels {
            let reason = format!(
                "transformer/config.json has in_channels {} and out_channels {}, vae/config.json latent_channels {}; they must \
                 be equal",
                config.in_channels, config.out_channels, vae_config.latent_channels
            );
            return misfit(files, reason);
        }
        let (clip, text_reports) = ClipPair::open(files, options)?;
        let mut weights = text_reports.to_vec();
        let t5 = match files.has("text_encoder_3") {
            false => T5TextEncoder::missing(config.joint_attention_dim, options),
            true => {
                let folders = ["tokenizer_3", "text_encoder_3"];
                let (t5, report) = T5TextEncoder::open(files, folders, T5Padding::Read, options)?;
                if t5.width() != config.joint_attention_dim {
                    let reason = format!(
                        "transformer/config.json has joint_attention_dim {}, text_encoder_3/config.json d_model {}; they must be \
                         equal",
                        config.joint_attention_dim,
                        t5.width()
                    );
                    return misfit(files, reason);
                }
                weights.push(report);
                t5
            }
        };
        let (transformer, transformer_report) = transformer(files, options)?;
        let (latents, vae_report) = LatentSpace::new(files, options, false)?;
        weights.extend([transformer_report, vae_report]);
        let (text_device, dtype) = (options.text_device().clone(), options.dtype);
        Ok(StableDiffusion3 { clip, t5, transformer, config, latents, weights, text_device, dtype })
    }
}

/// The transformer as a module, and its weights.
///
/// # Errors
/// Those of the configuration.
fn transformer(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<(Arc<Resident<Mmdit>>, WeightReport)> {
    let format = options.weights;
    let outline = files.outline("transformer", &options.device, options.dtype)?;
    let (_, report) = files.transformer_of(outline.with_format(format))?;
    let (files, device, dtype) = (files.clone(), options.device.clone(), options.dtype);
    let load = move || {
        let weights = files.weights("transformer", &device, dtype)?;
        Ok(files.transformer_of(weights.with_format(format))?.0)
    };
    Ok((Arc::new(Resident::new(Role::Network, load)), report))
}

impl Family for StableDiffusion3 {
    fn native_size(&self) -> Option<Size> {
        let factor = self.latents.factor();
        self.config.sample_size.map(|[h, w]| Size::new(w * factor, h * factor))
    }

    fn space(&self) -> &dyn SampleSpace {
        &self.latents
    }

    /// The transformer sees patches of cells.
    fn sides(&self) -> Sides {
        Sides { factor: self.latents.factor(), patch: self.config.patch_size }
    }

    fn reads_t5(&self) -> bool {
        true
    }

    fn reads_mask(&self) -> bool {
        false
    }

    fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize> {
        self.clip.chunks(prompt, options)
    }

    fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>> {
        self.clip.learned(prompt, options)
    }

    /// Both CLIP encoders' hidden states side by side, padded to the width of T5's, whose tokens follow theirs; and both pooled
    /// outputs side by side.
    fn encode_prompts(
        &self,
        prompts: &[PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds> {
        let prompts: Vec<&PromptText> = prompts.iter().collect();
        let outputs = [ClipOutput::PENULTIMATE.with_pooled(); 2];
        let EncodedPair { hidden: short, projected } = self.clip.encode(&prompts, options, outputs, warn)?;
        let [Some(first), Some(second)] = projected else {
            return Err(Error::config("text_encoder", "has no pooled output"));
        };
        let [rows, tokens, own] = short.dims("prompts", "hidden")?;
        let width = self.config.joint_attention_dim;
        let short = match width - own {
            0 => short,
            rest => {
                let zeros = Tensor::zeros(&self.text_device, &[rows, tokens, rest], self.dtype)?;
                Tensor::concat_channels(&short, &zeros)?
            }
        };
        let long = self.t5.encode(&prompts, options, warn)?;
        let more = long.shape()[1];
        // The tokens of a row follow each other in memory.
        let flat = |x: &Tensor, tokens: usize| x.reshape(&[rows, tokens * width]);
        let embeds = Tensor::concat_channels(&flat(&short, tokens)?, &flat(&long, more)?)?;
        let pooled = Tensor::concat_channels(&first, &second)?;
        Ok(PromptEmbeds { embeds: embeds.reshape(&[rows, tokens + more, width])?, pooled: Some(pooled) })
    }

    fn conditions(&self, inputs: RunInputs) -> Box<dyn RunConditions> {
        let RunInputs { prompts, repeats, .. } = inputs;
        Box::new(Conditions { transformer: self.transformer.clone(), prompts, repeats, made: OfTimesteps::nothing() })
    }

    fn modules(&self) -> Vec<&dyn Module> {
        let networks = [&*self.transformer as &dyn Module, self.latents.module()];
        self.clip.modules().chain(self.t5.module()).chain(networks).collect()
    }

    fn weights(&self) -> &[WeightReport] {
        &self.weights
    }
}

/// A run's prompts. What the transformer is told is the same in every stage.
struct Conditions {
    transformer: Arc<Resident<Mmdit>>,
    prompts: PromptEmbeds,
    repeats: usize,
    made: OfTimesteps<MmditConditioning>,
}

impl Conditions {
    fn conditioning(&mut self, timesteps: &[f32]) -> Result<&MmditConditioning> {
        let Conditions { transformer, prompts: PromptEmbeds { embeds, pooled }, made, .. } = self;
        made.get(timesteps, || {
            let pooled = pooled.as_ref();
            let pooled = pooled.ok_or_else(|| Error::config("prompts", "SD3 reads pooled text, and there is none"))?;
            transformer.get()?.condition(embeds, pooled, timesteps)
        })
    }
}

impl RunConditions for Conditions {
    fn prepare(&mut self, timesteps: &[f32]) -> Result<()> {
        self.conditioning(timesteps).map(drop)
    }

    fn begin_stage(
        &mut self,
        _size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let conditioning = self.conditioning(timesteps)?.clone();
        MmditDenoiser::begin(self.transformer.get()?, conditioning, self.repeats, reuse)
    }
}

/// A transformer in a stage.
struct MmditDenoiser {
    transformer: Arc<Mmdit>,
    conditioning: MmditConditioning,
    repeats: usize,
}

impl MmditDenoiser {
    /// In the memory of `reuse`, where that is given; on a card else in memory of its own, which a recorded step may read.
    ///
    /// # Errors
    /// Those of the device; [`Error::Config`]: `reuse` is of another kind.
    fn begin(
        transformer: Arc<Mmdit>,
        conditioning: MmditConditioning,
        repeats: usize,
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let Some(reuse) = reuse else {
            let conditioning = match transformer.device() {
                Device::Cpu(_) => conditioning,
                Device::Cuda(_) | Device::Meta(_) => conditioning.duplicate()?,
            };
            return Ok(Box::new(MmditDenoiser { transformer, conditioning, repeats }));
        };
        let reuse: Box<dyn Any> = reuse;
        let mut reuse = reuse
            .downcast::<MmditDenoiser>()
            .map_err(|_| Error::config("recorded steps", "the denoiser to use again is of another family"))?;
        reuse.conditioning.copy_from(&conditioning)?;
        Ok(reuse)
    }

    /// # Errors
    /// [`Error::Config`]: an option of a UNet.
    fn check(options: &UnetOptions) -> Result<()> {
        match *options == UnetOptions::default() {
            true => Ok(()),
            false => Err(Error::config(
                "transformer",
                "the method changes layers of a UNet, and this model's network is a transformer; choose plain, megafusion, \
                 hires-fix, multidiffusion, demofusion or diffusehigh",
            )),
        }
    }
}

impl Denoiser for MmditDenoiser {
    fn denoise(&self, x: &Tensor, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        MmditDenoiser::check(options)?;
        let input = ops::scale_input(x, steps, self.transformer.dtype(), self.repeats)?;
        self.transformer.forward(&input, steps.index(), &self.conditioning)
    }

    fn denoise_patches(&self, patches: &PatchInput, steps: &StepTable, options: &UnetOptions) -> Result<Tensor> {
        MmditDenoiser::check(options)?;
        let &PatchInput { x, patches, restandardised, scales, crops: _ } = patches;
        let dtype = self.transformer.dtype();
        let input = ops::gather_patches(x, patches, restandardised, scales, dtype, self.repeats)?;
        self.transformer.forward(&input, steps.index(), &self.conditioning)
    }
}
