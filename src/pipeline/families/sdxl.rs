//! Stable Diffusion XL: two CLIP text encoders side by side, a UNet that is told the pooled text and the picture's sizes, VAE.
//! Podell et al. 2023, arXiv:2307.01952.

use std::sync::Arc;

use super::conditioning::{Crops, StageConditioning};
use super::control::{ControlConditions, ControlNets};
use super::latent::{LatentSpace, UnetDenoiser, check_fit, native_size, reads_mask, unet};
use super::prompts::{ClipPair, EncodedPair};
use super::{
    Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, RunInputs, SampleSpace, misfit,
};
use crate::error::{Error, Result};
use crate::methods::{Denoiser, PublishedSchedule, Size};
use crate::models::{AddedConditioning, ClipOutput, TIME_IDS, TextConditioning, Unet};
use crate::models::{UnetConditioning, UnetConfig};
use crate::pipeline::ip_adapter::ImagePrompts;
use crate::pipeline::memory::LoadOptions;
use crate::pipeline::resident::{Module, Resident};
use crate::pipeline::{ModelFiles, SizeIds, TextOptions, WeightReport};
use crate::runtime::{DType, Device, Tensor};

pub static SDXL: FamilySpec = FamilySpec {
    name: "Stable Diffusion XL",
    pipelines: &[],
    parts: &[
        Part::tokenizer("tokenizer"),
        Part::tokenizer("tokenizer_2"),
        Part::text_encoder("text_encoder", "CLIPTextModel"),
        Part::text_encoder("text_encoder_2", "CLIPTextModelWithProjection"),
        Part::network("unet", "UNet2DConditionModel"),
        Part::network("vae", "AutoencoderKL"),
    ],
    defaults: Defaults { relay_growth: 1.0, published: PublishedSchedule::SDXL, ..Defaults::LATENT },
    flow_matching: false,
    open: |files, options| Ok(Box::new(StableDiffusionXl::open(files, options)?)),
};

struct StableDiffusionXl {
    /// In the order of the channels of the prompts' embeddings.
    encoders: ClipPair,
    /// Is a negative prompt that was not given all zeros, rather than the encoded empty text?
    zeros_for_no_prompt: bool,
    unet: Arc<Resident<Unet>>,
    unet_config: UnetConfig,
    controls: ControlNets,
    latents: LatentSpace,
    weights: Vec<WeightReport>,
    text_device: Device,
    dtype: DType,
}

impl StableDiffusionXl {
    fn open(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<StableDiffusionXl> {
        let configs = [files.clip_config("text_encoder")?, files.clip_config("text_encoder_2")?];
        let (unet_config, vae_config) = (files.unet_config()?, files.vae_config()?);
        let width = configs[0].hidden_size + configs[1].hidden_size;
        let text = ("text_encoder/config.json and text_encoder_2/config.json hidden_size together", width);
        check_fit(files, text, &unet_config, &vae_config)?;
        let Some(added) = unet_config.added else {
            let reason = "unet/config.json has no addition_embed_type, expected \"text_time\" beside a text_encoder_2";
            return misfit(files, reason.into());
        };
        match configs[1].projection_dim {
            Some(dim) if dim == added.pooled_dim => {}
            found => {
                let found = found.map_or("none".into(), |dim| dim.to_string());
                let reason = format!(
                    "unet/config.json reads pooled text of {} channels (projection_class_embeddings_input_dim less the \
                     size ids), text_encoder_2/config.json has projection_dim {found}; they must be equal",
                    added.pooled_dim
                );
                return misfit(files, reason);
            }
        }
        let (encoders, text_reports) = ClipPair::open(files, options)?;
        let (unet, unet_report) = unet(files, options)?;
        let (latents, vae_report) = LatentSpace::new(files, options, true)?;
        let controls = ControlNets::open(files, options, &unet_config, latents.factor())?;
        let weights = [&text_reports[..], &[unet_report], controls.weights(), &[vae_report]].concat();
        Ok(StableDiffusionXl {
            encoders,
            zeros_for_no_prompt: files.index_flag("force_zeros_for_empty_prompt", true)?,
            unet,
            unet_config,
            controls,
            latents,
            weights,
            text_device: options.text_device().clone(),
            dtype: options.dtype,
        })
    }

    /// Both encoders' hidden states side by side, and the second one's projection.
    fn encode(
        &self,
        prompts: &[&PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds> {
        let outputs = [ClipOutput::PENULTIMATE, ClipOutput::PENULTIMATE.with_pooled()];
        let EncodedPair { hidden: embeds, projected: [_, pooled] } =
            self.encoders.encode(prompts, options, outputs, warn)?;
        let pooled = pooled.ok_or_else(|| Error::config("text_encoder_2", "has no text_projection"))?;
        Ok(PromptEmbeds { embeds, pooled: Some(pooled) })
    }
}

impl Family for StableDiffusionXl {
    fn native_size(&self) -> Option<Size> {
        native_size(&self.unet_config, self.latents.config())
    }

    fn unet(&self) -> Option<&UnetConfig> {
        Some(&self.unet_config)
    }

    fn space(&self) -> &dyn SampleSpace {
        &self.latents
    }

    fn reads_size_ids(&self) -> bool {
        true
    }

    fn reads_mask(&self) -> bool {
        reads_mask(&self.unet_config, self.latents.config())
    }

    fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize> {
        self.encoders.chunks(prompt, options)
    }

    fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>> {
        self.encoders.learned(prompt, options)
    }

    fn encode_prompts(
        &self,
        prompts: &[PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds> {
        let is_zero = |prompt: &&PromptText| prompt.negative && prompt.text.is_none() && self.zeros_for_no_prompt;
        let encoded: Vec<&PromptText> = prompts.iter().filter(|prompt| !is_zero(prompt)).collect();
        let rows = self.encode(&encoded, options, warn)?;
        if encoded.len() == prompts.len() {
            return Ok(rows);
        }
        let pooled_dim = self.unet_config.added.map_or(0, |added| added.pooled_dim);
        let width = self.unet_config.cross_attention_dim;
        let zero = PromptEmbeds {
            embeds: Tensor::zeros(&self.text_device, &[1, rows.embeds.shape()[1], width], self.dtype)?,
            pooled: Some(Tensor::zeros(&self.text_device, &[1, pooled_dim], self.dtype)?),
        };
        let mut next = 0;
        let parts: Vec<PromptEmbeds> = prompts
            .iter()
            .map(|prompt| match is_zero(&prompt) {
                true => Ok(zero.clone()),
                false => {
                    next += 1;
                    rows.rows(&[next - 1])
                }
            })
            .collect::<Result<_>>()?;
        PromptEmbeds::concat(&parts)
    }

    fn conditions(&self, inputs: RunInputs) -> Box<dyn RunConditions> {
        let RunInputs { prompts, images, repeats, sizes, guidance, controls, noise_level: _ } = inputs;
        let (unet, controls) = (self.unet.clone(), self.controls.conditions(controls, repeats));
        Box::new(Conditions { unet, controls, prompts, images, repeats, sizes, guidance, made: None })
    }

    fn modules(&self) -> Vec<&dyn Module> {
        let unet = [&*self.unet as &dyn Module];
        self.encoders.modules().chain(unet).chain(self.controls.modules()).chain([self.latents.module()]).collect()
    }

    fn weights(&self) -> &[WeightReport] {
        &self.weights
    }
}

/// A run's prompts and sizes. K and V of the text are the same in every stage, the size ids follow it.
struct Conditions {
    unet: Arc<Resident<Unet>>,
    controls: ControlConditions,
    prompts: PromptEmbeds,
    images: ImagePrompts,
    repeats: usize,
    sizes: SizeIds,
    /// What a UNet that reads its guidance scale is told.
    guidance: Option<f32>,
    /// Of the latest stage, whose K and V the next one has too.
    made: Option<UnetConditioning>,
}

impl RunConditions for Conditions {
    fn prepare(&mut self, _timesteps: &[f32]) -> Result<()> {
        Ok(()) // nothing is known before the first stage's size
    }

    fn begin_stage(
        &mut self,
        size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let time_ids = [self.sizes.of(size)];
        let pooled = self.prompts.pooled.as_ref();
        let pooled = pooled.ok_or_else(|| Error::config("prompts", "SDXL reads pooled text, and there is none"))?;
        let added = Some(AddedConditioning { pooled, time_ids: &time_ids });
        let unet = self.unet.get()?;
        let conditioning = match &self.made {
            Some(made) => unet.recondition(made, added, timesteps)?,
            None => {
                let text =
                    TextConditioning { text: &self.prompts.embeds, added, guidance: self.guidance, noise_level: None };
                unet.condition(text, timesteps)?.with_images(&unet, self.images.prompts.clone())?
            }
        };
        self.made = Some(conditioning.clone());
        let controls = self.controls.begin_stage(&self.prompts, Some(time_ids[0]), timesteps)?;
        let crops = Crops { pooled: pooled.clone(), time_ids: time_ids[0], timesteps: timesteps.to_vec() };
        let masks = self.images.masks(size, unet.device())?;
        let conditioning = StageConditioning::new(conditioning, self.repeats, Some(crops));
        UnetDenoiser::begin(unet, conditioning, controls, masks, reuse)
    }
}

impl SizeIds {
    /// Height and width of the original, top and left of the crop, height and width of the target, for a stage of `size`.
    fn of(&self, size: Size) -> [f32; TIME_IDS] {
        let (original, target) = (self.original.unwrap_or(size), self.target.unwrap_or(size));
        let (left, top) = self.crop.unwrap_or((0, 0));
        [original.height, original.width, top, left, target.height, target.width].map(|side| side as f32)
    }
}
