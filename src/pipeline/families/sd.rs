//! Stable Diffusion 1.x and 2.x: one CLIP or OpenCLIP text encoder, UNet, VAE. Rombach et al. 2022, arXiv:2112.10752.

use std::sync::Arc;

use super::conditioning::{OfTimesteps, StageConditioning};
use super::control::{ControlConditions, ControlNets};
use super::latent::{LatentSpace, UnetDenoiser, check_fit, native_size, reads_mask, unet};
use super::prompts::TextEncoder;
use super::{Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, RunInputs, SampleSpace};
use crate::error::Result;
use crate::methods::{Denoiser, Size};
use crate::models::{ClipOutput, TextConditioning, Unet, UnetConditioning, UnetConfig};
use crate::pipeline::ip_adapter::ImagePrompts;
use crate::pipeline::memory::LoadOptions;
use crate::pipeline::resident::{Module, Resident};
use crate::pipeline::{ModelFiles, TextOptions, WeightReport};
use crate::text::Encoder;

pub static SD: FamilySpec = FamilySpec {
    name: "Stable Diffusion 1.x or 2.x",
    pipeline: None,
    parts: &[
        Part::tokenizer("tokenizer"),
        Part::text_encoder("text_encoder", "CLIPTextModel"),
        Part::network("unet", "UNet2DConditionModel"),
        Part::network("vae", "AutoencoderKL"),
    ],
    defaults: Defaults::LATENT,
    flow_matching: false,
    open: |files, options| Ok(Box::new(StableDiffusion::open(files, options)?)),
};

struct StableDiffusion {
    text_encoder: TextEncoder,
    unet: Arc<Resident<Unet>>,
    unet_config: UnetConfig,
    controls: ControlNets,
    latents: LatentSpace,
    weights: Vec<WeightReport>,
}

/// A run's prompts. What the UNet is told is the same in every stage.
struct Conditions {
    unet: Arc<Resident<Unet>>,
    controls: ControlConditions,
    prompts: PromptEmbeds,
    images: ImagePrompts,
    repeats: usize,
    /// What a UNet that reads its guidance scale is told.
    guidance: Option<f32>,
    made: OfTimesteps<UnetConditioning>,
}

impl Conditions {
    fn conditioning(&mut self, timesteps: &[f32]) -> Result<&UnetConditioning> {
        let Conditions { unet, prompts, images, guidance, made, .. } = self;
        made.get(timesteps, || {
            let text = TextConditioning { text: &prompts.embeds, added: None, guidance: *guidance };
            let unet = unet.get()?;
            unet.condition(text, timesteps)?.with_images(&unet, images.prompts.clone())
        })
    }
}

impl RunConditions for Conditions {
    fn prepare(&mut self, timesteps: &[f32]) -> Result<()> {
        self.conditioning(timesteps).map(drop)
    }

    fn begin_stage(
        &mut self,
        size: Size,
        timesteps: &[f32],
        reuse: Option<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let conditioning = self.conditioning(timesteps)?.clone();
        let controls = self.controls.begin_stage(&self.prompts, None, timesteps)?;
        let unet = self.unet.get()?;
        let masks = self.images.masks(size, unet.device())?;
        UnetDenoiser::begin(unet, StageConditioning::new(conditioning, self.repeats, None), controls, masks, reuse)
    }
}

impl StableDiffusion {
    fn open(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<StableDiffusion> {
        let (text_config, unet_config) = (files.clip_config("text_encoder")?, files.unet_config()?);
        let text = ("text_encoder/config.json hidden_size", text_config.hidden_size);
        check_fit(files, text, &unet_config, &files.vae_config()?)?;
        let folders = ["tokenizer", "text_encoder"];
        let (text_encoder, text_report) = TextEncoder::open(files, folders, Encoder::Single, options)?;
        let (unet, unet_report) = unet(files, options)?;
        let (latents, vae_report) = LatentSpace::new(files, options, false)?;
        let controls = ControlNets::open(files, options, &unet_config, latents.factor())?;
        let weights = [&[text_report, unet_report][..], controls.weights(), &[vae_report]].concat();
        Ok(StableDiffusion { text_encoder, unet, unet_config, controls, latents, weights })
    }
}

impl Family for StableDiffusion {
    fn native_size(&self) -> Option<Size> {
        native_size(&self.unet_config, self.latents.config())
    }

    fn unet(&self) -> Option<&UnetConfig> {
        Some(&self.unet_config)
    }

    fn space(&self) -> &dyn SampleSpace {
        &self.latents
    }

    fn reads_mask(&self) -> bool {
        reads_mask(&self.unet_config, self.latents.config())
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

    fn conditions(&self, inputs: RunInputs) -> Box<dyn RunConditions> {
        let RunInputs { prompts, images, repeats, guidance, controls, sizes: _ } = inputs;
        let (unet, controls) = (self.unet.clone(), self.controls.conditions(controls, repeats));
        Box::new(Conditions { unet, controls, prompts, images, repeats, guidance, made: OfTimesteps::nothing() })
    }

    fn modules(&self) -> Vec<&dyn Module> {
        let before: [&dyn Module; 2] = [&self.text_encoder.model, &*self.unet];
        before.into_iter().chain(self.controls.modules()).chain([self.latents.module()]).collect()
    }

    fn weights(&self) -> &[WeightReport] {
        &self.weights
    }
}
