//! Stable Diffusion XL: two CLIP text encoders side by side, a UNet that is told the pooled text and the picture's sizes, VAE.
//! Podell et al. 2023, arXiv:2307.01952.

use std::sync::Arc;

use super::latent::{LatentSpace, UnetDenoiser, check_fit, native_size};
use super::prompts::TextEncoder;
use super::{Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, load_part, misfit};
use crate::error::{Error, Result};
use crate::methods::{Denoiser, PublishedSchedule, Size};
use crate::models::{AddedConditioning, ClipOutput, TIME_IDS, TextConditioning, Unet, UnetConditioning};
use crate::pipeline::{ModelFiles, SizeIds, TextOptions, WeightReport};
use crate::runtime::{DType, Device, Tensor};
use crate::text::Encoder;

pub static SDXL: FamilySpec = FamilySpec {
    name: "Stable Diffusion XL",
    parts: &[
        Part::tokenizer("tokenizer"),
        Part::tokenizer("tokenizer_2"),
        Part::text_encoder("text_encoder", "CLIPTextModel"),
        Part::text_encoder("text_encoder_2", "CLIPTextModelWithProjection"),
        Part::network("unet", "UNet2DConditionModel"),
        Part::network("vae", "AutoencoderKL"),
    ],
    defaults: Defaults { relay_growth: 1.0, published: PublishedSchedule::SDXL, ..Defaults::LATENT },
    load: |files, device, dtype| Ok(Box::new(StableDiffusionXl::load(files, device, dtype)?)),
};

struct StableDiffusionXl {
    /// In the order of the channels of the prompts' embeddings.
    encoders: [TextEncoder; 2],
    /// Is a negative prompt that was not given all zeros, rather than the encoded empty text?
    zeros_for_no_prompt: bool,
    unet: Arc<Unet>,
    latents: LatentSpace,
    weights: Vec<WeightReport>,
    device: Device,
    dtype: DType,
}

impl StableDiffusionXl {
    fn load(files: &ModelFiles, device: &Device, dtype: DType) -> Result<StableDiffusionXl> {
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
        let (first, second) = (["tokenizer", "text_encoder"], ["tokenizer_2", "text_encoder_2"]);
        let (first, first_report) = TextEncoder::load(files, first, Encoder::ClipL, device, dtype)?;
        let (second, second_report) = TextEncoder::load(files, second, Encoder::ClipG, device, dtype)?;
        if first.tokens != second.tokens {
            let reason =
                format!("tokenizer gives {} tokens, tokenizer_2 {}; they must be equal", first.tokens, second.tokens);
            return misfit(files, reason);
        }
        let store = files.weights("unet", device, dtype)?;
        let (unet, unet_report) = load_part("unet", store, |w| Unet::from_weights(w, &unet_config))?;
        let (latents, vae_report) = LatentSpace::load(files, device, dtype)?;
        Ok(StableDiffusionXl {
            encoders: [first, second],
            zeros_for_no_prompt: files.index_flag("force_zeros_for_empty_prompt", true)?,
            unet: Arc::new(unet),
            latents,
            weights: vec![first_report, second_report, unet_report, vae_report],
            device: device.clone(),
            dtype,
        })
    }

    /// Both encoders' hidden states side by side, and the second one's projection.
    fn encode(
        &self,
        prompts: &[&PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds> {
        let [first, second] = &self.encoders;
        let first = first.encode(prompts, options, ClipOutput::PENULTIMATE, warn)?;
        // What there is to say was said.
        let second = second.encode(prompts, options, ClipOutput::PENULTIMATE.with_pooled(), &mut |_| {})?;
        let pooled = second.projected.ok_or_else(|| Error::config("text_encoder_2", "has no text_projection"))?;
        let embeds = Tensor::concat_channels(&first.hidden, &second.hidden)?;
        Ok(PromptEmbeds { embeds, pooled: Some(pooled) })
    }
}

impl Family for StableDiffusionXl {
    fn native_size(&self) -> Option<Size> {
        native_size(self.unet.config(), self.latents.config())
    }

    fn factor(&self) -> usize {
        self.latents.config().factor()
    }

    fn channels(&self) -> usize {
        self.latents.config().latent_channels
    }

    fn reads_size_ids(&self) -> bool {
        true
    }

    /// The tokenizers differ in their padding alone.
    fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize> {
        let [first, second] = &self.encoders;
        Ok(first.chunks(prompt, options)?.max(second.chunks(prompt, options)?))
    }

    /// Both tokenizers find the same words.
    fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>> {
        self.encoders[0].learned(prompt, options)
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
        let pooled_dim = self.unet.config().added.map_or(0, |added| added.pooled_dim);
        let width = self.unet.config().cross_attention_dim;
        let zero = PromptEmbeds {
            embeds: Tensor::zeros(&self.device, &[1, rows.embeds.shape()[1], width], self.dtype)?,
            pooled: Some(Tensor::zeros(&self.device, &[1, pooled_dim], self.dtype)?),
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

    fn conditions(&self, prompts: PromptEmbeds, repeats: usize, sizes: &SizeIds) -> Box<dyn RunConditions> {
        Box::new(Conditions { unet: self.unet.clone(), prompts, repeats, sizes: *sizes, made: None })
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        self.latents.decode(x0)
    }

    fn encode(&self, picture: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        self.latents.encode(picture, noise)
    }

    fn weights(&self) -> &[WeightReport] {
        &self.weights
    }
}

/// A run's prompts and sizes. K and V of the text are the same in every stage, the size ids follow it.
struct Conditions {
    unet: Arc<Unet>,
    prompts: PromptEmbeds,
    repeats: usize,
    sizes: SizeIds,
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
        let conditioning = match &self.made {
            Some(made) => self.unet.recondition(made, added, timesteps)?,
            None => {
                let text = TextConditioning { text: &self.prompts.embeds, added, guidance: None };
                self.unet.condition(text, timesteps)?
            }
        };
        self.made = Some(conditioning.clone());
        UnetDenoiser::begin(&self.unet, conditioning, self.repeats, reuse)
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
