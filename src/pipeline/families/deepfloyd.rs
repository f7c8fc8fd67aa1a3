//! DeepFloyd IF: a T5 text encoder and UNets over pixels, without a VAE. Stage I makes small pictures of a prompt, stage II larger ones
//! of these. Saharia et al. 2022, arXiv:2205.11487, whose reimplementation it is.

use std::sync::Arc;

use super::control::ControlNets;
use super::latent::unet;
use super::t5_prompts::{T5Padding, T5TextEncoder};
use super::unet_conditions::UnetConditions;
use super::{
    Defaults, Family, FamilySpec, Part, PromptEmbeds, PromptText, RunConditions, RunInputs, SampleSpace, misfit,
};
use crate::error::{Error, Result};
use crate::methods::{PublishedSchedule, Sides, Size};
use crate::models::{Partition, Unet, UnetConfig};
use crate::pipeline::memory::LoadOptions;
use crate::pipeline::resident::{Module, Resident};
use crate::pipeline::{IF_T5_LENGTH, ModelFiles, TextOptions, WeightReport};
use crate::runtime::{DType, Device, Tensor};
use crate::schedulers::{Sampler, Scheduler};

pub static DEEPFLOYD: FamilySpec = FamilySpec {
    name: "DeepFloyd IF",
    pipelines: &[
        "IFPipeline",
        "IFImg2ImgPipeline",
        "IFInpaintingPipeline",
        "IFSuperResolutionPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingSuperResolutionPipeline",
    ],
    parts: &[
        Part::tokenizer("tokenizer").optional(),
        Part::text_encoder("text_encoder", "T5EncoderModel").optional(),
        Part::network("unet", "UNet2DConditionModel"),
    ],
    defaults: STAGE_I,
    flow_matching: false,
    open: |files, options| Ok(Box::new(DeepFloyd::open(files, options)?)),
};

/// Of the published pipeline; the relay as the paper of MegaFusion has it (arXiv:2408.11001, sec. 4.1).
const STAGE_I: Defaults = Defaults {
    steps: 100,
    guidance: 7.0,
    embeds_guidance: false,
    sampler: None,
    relay_growth: 1.0,
    relayed_size: Some(2),
    relayed_share: 0.2,
    dilates: true,
    published: PublishedSchedule::SD,
};

impl Defaults {
    /// Of a DeepFloyd IF's second stage.
    pub const STAGE_II: Defaults = Defaults { steps: 50, guidance: 4.0, ..STAGE_I };
}

/// Where the noise of the picture is described that stage II enlarges.
pub const NOISING: &str = "image_noising_scheduler";

/// One stage: a UNet, and the text encoder where the folder has one.
struct DeepFloyd {
    name: String,
    /// `None`: prompts are encoded elsewhere.
    text: Option<T5TextEncoder>,
    /// Of a plan of a model whose prompts are encoded elsewhere: where rows of the text are, and in which dtype.
    planned: Option<(Device, DType)>,
    unet: Arc<Resident<Unet>>,
    config: UnetConfig,
    controls: ControlNets,
    /// Of stage II: abar of every timestep of the noise in the picture that it enlarges.
    noising: Option<Vec<f64>>,
    weights: Vec<WeightReport>,
}

impl DeepFloyd {
    fn open(files: &Arc<ModelFiles>, options: &LoadOptions) -> Result<DeepFloyd> {
        let config = files.unet_config()?;
        let (input, output) = (config.in_channels, config.out_channels);
        let enlarges = config.reads_noise_level;
        let wanted = if enlarges { 6 } else { 3 };
        if input != wanted || ![3, 6].contains(&output) {
            let stage = if enlarges { "II" } else { "I" };
            let reason = format!(
                "unet/config.json has in_channels {input} and out_channels {output}, expected {wanted} and 3 (RGB) or 6 (with its \
                 variance) of a stage {stage} (class_embed_type is {})",
                if enlarges { "\"timestep\"" } else { "null" }
            );
            return misfit(files, reason);
        }
        if let Some(control) = options.controls.first() {
            let (field, value) = ("controls", control.display().to_string());
            let reason = "DeepFloyd IF has no ControlNets; leave it out".into();
            return Err(Error::Request { field, value, reason });
        }
        let mut weights = Vec::new();
        let text = match files.has("text_encoder") && options.reads_prompts {
            false => None,
            true => {
                let (text, report) =
                    T5TextEncoder::open(files, ["tokenizer", "text_encoder"], T5Padding::Masked, options)?;
                if text.width() != config.text_dim() {
                    let (own, width) = (config.text_dim(), text.width());
                    let reason = format!(
                        "unet/config.json reads text {own} wide (encoder_hid_dim, else cross_attention_dim), and \
                         text_encoder/config.json has d_model {width}; they must be equal"
                    );
                    return misfit(files, reason);
                }
                weights.push(report);
                Some(text)
            }
        };
        let noising = match enlarges {
            true => {
                let scheduler = Scheduler::new(&files.scheduler_config_in(NOISING)?, Sampler::Ddpm, 1, 0.0)?;
                Some(scheduler.alphas_cumprod().to_vec())
            }
            false => None,
        };
        let (unet, report) = unet(files, options)?;
        weights.push(report);
        let controls = ControlNets::open(files, options, &config, 1)?;
        let planned = matches!(options.device, Device::Meta(_)) && !options.reads_prompts;
        let planned = planned.then(|| (options.device.clone(), options.dtype));
        Ok(DeepFloyd { name: files.name(), text, planned, unet, config, controls, noising, weights })
    }
}

impl Family for DeepFloyd {
    fn native_size(&self) -> Option<Size> {
        self.config.sample_size.map(|[h, w]| Size::new(w, h))
    }

    fn unet(&self) -> Option<&UnetConfig> {
        Some(&self.config)
    }

    fn space(&self) -> &dyn SampleSpace {
        &PixelSpace
    }

    fn sides(&self) -> Sides {
        Sides { factor: 1, patch: self.config.factor() }
    }

    fn reads_t5(&self) -> bool {
        true
    }

    fn reads_mask(&self) -> bool {
        false
    }

    fn lowres_noising(&self) -> Option<&[f64]> {
        self.noising.as_deref()
    }

    fn chunks(&self, _prompt: &PromptText, _options: &TextOptions) -> Result<usize> {
        Ok(1) // what is beyond the tokens is not read
    }

    fn learned(&self, _prompt: &PromptText, _options: &TextOptions) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// In lower case and without space around them, as the published pipelines read prompts.
    fn encode_prompts(
        &self,
        prompts: &[PromptText],
        options: &TextOptions,
        warn: &mut dyn FnMut(&str),
    ) -> Result<PromptEmbeds> {
        if let (None, Some((device, dtype))) = (&self.text, &self.planned) {
            let length = options.t5_length.unwrap_or(IF_T5_LENGTH);
            let embeds = Tensor::uninit(device, &[prompts.len(), length, self.config.text_dim()], *dtype)?;
            return Ok(PromptEmbeds { embeds, pooled: None });
        }
        let Some(text) = &self.text else {
            let reason = "has no text_encoder/ (T5) to read the prompt; download it, or load the model behind a first stage, whose T5 \
                          then reads it";
            return Err(Error::config(format!("model {}", self.name), reason));
        };
        let lower = |prompt: &PromptText| PromptText {
            text: prompt.text.as_ref().map(|text| text.to_lowercase().trim().to_string()),
            ..prompt.clone()
        };
        let prompts: Vec<PromptText> = prompts.iter().map(lower).collect();
        let options = TextOptions { t5_length: options.t5_length.or(Some(IF_T5_LENGTH)), ..*options };
        let embeds = text.encode(&prompts.iter().collect::<Vec<_>>(), &options, warn)?;
        Ok(PromptEmbeds { embeds, pooled: None })
    }

    fn conditions(&self, inputs: RunInputs) -> Box<dyn RunConditions> {
        Box::new(UnetConditions::new(self.unet.clone(), &self.controls, inputs))
    }

    fn modules(&self) -> Vec<&dyn Module> {
        let text = self.text.as_ref().and_then(T5TextEncoder::module);
        text.into_iter().chain([&*self.unet as &dyn Module]).collect()
    }

    fn weights(&self) -> &[WeightReport] {
        &self.weights
    }
}

/// Samples that are pictures.
struct PixelSpace;

impl SampleSpace for PixelSpace {
    fn factor(&self) -> usize {
        1
    }

    fn channels(&self) -> usize {
        3
    }

    fn has_posterior(&self) -> bool {
        false
    }

    fn decode(&self, x0: &Tensor, _partition: Partition, _warn: &mut dyn FnMut(&str)) -> Result<Tensor> {
        Ok(x0.clone())
    }

    fn encode(
        &self,
        picture: &Tensor,
        _noise: Option<&Tensor>,
        _partition: Partition,
        _warn: &mut dyn FnMut(&str),
    ) -> Result<Tensor> {
        debug_assert_eq!(picture.dtype(), DType::F32);
        Ok(picture.clone())
    }
}
