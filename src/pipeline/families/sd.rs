//! Stable Diffusion 1.x and 2.x: one CLIP or OpenCLIP text encoder, UNet, VAE. Rombach et al. 2022, arXiv:2112.10752.

use std::sync::Arc;

use super::latent::{LatentSpace, UnetDenoiser, check_fit, native_size};
use super::prompts::TextEncoder;
use super::{Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, load_part};
use crate::error::Result;
use crate::methods::{Denoiser, Size};
use crate::models::{ClipOutput, Unet, UnetConditioning};
use crate::pipeline::{ModelFiles, SizeIds, TextOptions, WeightReport};
use crate::runtime::{DType, Device, Tensor};
use crate::text::Encoder;

pub static SD: FamilySpec = FamilySpec {
    name: "Stable Diffusion 1.x or 2.x",
    parts: &[
        Part::tokenizer("tokenizer"),
        Part::text_encoder("text_encoder", "CLIPTextModel"),
        Part::network("unet", "UNet2DConditionModel"),
        Part::network("vae", "AutoencoderKL"),
    ],
    defaults: Defaults::LATENT,
    load: |files, device, dtype| Ok(Box::new(StableDiffusion::load(files, device, dtype)?)),
};

struct StableDiffusion {
    text_encoder: TextEncoder,
    unet: Arc<Unet>,
    latents: LatentSpace,
    weights: Vec<WeightReport>,
}

/// A run's prompts. What the UNet is told is the same in every stage.
struct Conditions {
    unet: Arc<Unet>,
    embeds: Tensor,
    repeats: usize,
    /// Of the timesteps beside it, once they are known.
    made: Option<(Vec<f32>, UnetConditioning)>,
}

impl RunConditions for Conditions {
    fn prepare(&mut self, timesteps: &[f32]) -> Result<()> {
        if self.made.as_ref().is_none_or(|(made, _)| made != timesteps) {
            self.made = None;
            self.made = Some((timesteps.to_vec(), self.unet.condition(&self.embeds, timesteps)?));
        }
        Ok(())
    }

    fn begin_stage(
        &mut self,
        _size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        self.prepare(timesteps)?;
        match &self.made {
            Some((_, conditioning)) => UnetDenoiser::begin(&self.unet, conditioning.clone(), self.repeats, reuse),
            None => unreachable!("just prepared"),
        }
    }
}

impl StableDiffusion {
    fn load(files: &ModelFiles, device: &Device, dtype: DType) -> Result<StableDiffusion> {
        let (text_config, unet_config) = (files.clip_config("text_encoder")?, files.unet_config()?);
        let vae_config = files.vae_config()?;
        let text = ("text_encoder/config.json hidden_size", text_config.hidden_size);
        check_fit(files, text, &unet_config, &vae_config)?;
        let folders = ["tokenizer", "text_encoder"];
        let (text_encoder, text_report) = TextEncoder::load(files, folders, Encoder::Single, device, dtype)?;
        let store = files.weights("unet", device, dtype)?;
        let (unet, unet_report) = load_part("unet", store, |w| Unet::from_weights(w, &unet_config))?;
        let (latents, vae_report) = LatentSpace::load(files, device, dtype)?;
        let weights = vec![text_report, unet_report, vae_report];
        Ok(StableDiffusion { text_encoder, unet: Arc::new(unet), latents, weights })
    }
}

impl Family for StableDiffusion {
    fn native_size(&self) -> Option<Size> {
        native_size(self.unet.config(), self.latents.config())
    }

    fn factor(&self) -> usize {
        self.latents.config().factor()
    }

    fn channels(&self) -> usize {
        self.latents.config().latent_channels
    }

    fn chunks(&self, prompt: &PromptText, options: &TextOptions) -> Result<usize> {
        self.text_encoder.chunks(prompt, options)
    }

    fn learned(&self, prompt: &PromptText, options: &TextOptions) -> Result<Vec<String>> {
        self.text_encoder.learned(prompt, options)
    }

    fn encode_prompts(
        &self,
        prompts: &[PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds> {
        let prompts: Vec<&PromptText> = prompts.iter().collect();
        let encoded = self.text_encoder.encode(&prompts, options, ClipOutput::LAST, warn)?;
        Ok(PromptEmbeds { embeds: encoded.hidden, pooled: None })
    }

    fn conditions(&self, prompts: PromptEmbeds, repeats: usize, _sizes: &SizeIds) -> Box<dyn RunConditions> {
        Box::new(Conditions { unet: self.unet.clone(), embeds: prompts.embeds, repeats, made: None })
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
