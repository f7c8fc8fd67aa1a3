//! Stable Diffusion 1.x and 2.x: one CLIP or OpenCLIP text encoder, UNet, VAE. Rombach et al. 2022, arXiv:2112.10752.

use std::sync::Arc;

use super::control::ControlNets;
use super::latent::{LatentSpace, check_fit, native_size, reads_mask, unet};
use super::prompts::TextEncoder;
use super::unet_conditions::UnetConditions;
use super::{Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, RunInputs, SampleSpace};
use crate::error::Result;
use crate::methods::Size;
use crate::models::{ClipOutput, Unet, UnetConfig};
use crate::pipeline::memory::LoadOptions;
use crate::pipeline::resident::{Module, Resident};
use crate::pipeline::{ModelFiles, TextOptions, WeightReport};
use crate::text::Encoder;

pub static SD: FamilySpec = FamilySpec {
    name: "Stable Diffusion 1.x or 2.x",
    pipelines: &[],
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
        Box::new(UnetConditions::new(self.unet.clone(), &self.controls, inputs))
    }

    fn modules(&self) -> Vec<&dyn Module> {
        let before: [&dyn Module; 2] = [&self.text_encoder.model, &*self.unet];
        before.into_iter().chain(self.controls.modules()).chain([self.latents.module()]).collect()
    }

    fn weights(&self) -> &[WeightReport] {
        &self.weights
    }
}
