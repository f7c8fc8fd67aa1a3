//! A whole model in one file, safetensors or PyTorch's `.ckpt`, as the first Stable Diffusion code and the programs after it write it: Stable
//! Diffusion 1.x, 2.x, XL and 3, and models distilled from these for latent consistency (LCM). The family is read off the keys;
//! configurations are the published ones.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype as FileDtype;
use serde_json::{Value, json};

use super::foreign::Foreign;
use super::weights::{Entry, MappedFile, Part, WeightStore, attach_scales, unwrapped_names};
use super::{ldm, ldm_mmdit};
use crate::error::{Error, Result};
use crate::runtime::{DType, Device};

const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const CLIP: &str = "cond_stage_model.transformer.";
const OPENCLIP: &str = "cond_stage_model.model.";
const SDXL_CLIP: &str = "conditioner.embedders.0.transformer.";
const SDXL_OPENCLIP: &str = "conditioner.embedders.1.model.";
/// SD3's text encoders, under the keys of transformers.
const SD3_ENCODERS: [(&str, Part); 3] = [
    ("text_encoders.clip_l.transformer.", Part::TextEncoder),
    ("text_encoders.clip_g.transformer.", Part::TextEncoder2),
    ("text_encoders.t5xxl.transformer.", Part::TextEncoder3),
];

/// What a single file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x: CLIP-L.
    Sd1,
    /// Stable Diffusion 2.x: OpenCLIP-H.
    Sd2,
    /// Stable Diffusion XL: CLIP-L and OpenCLIP bigG.
    Sdxl,
    /// Stable Diffusion 3: CLIP-L, OpenCLIP bigG and perhaps T5 XXL; a transformer.
    Sd3,
    /// Stable Diffusion 3.5.
    Sd35,
}

impl Family {
    /// Is the denoiser a transformer, over latents of 16 channels?
    fn is_sd3(self) -> bool {
        matches!(self, Family::Sd3 | Family::Sd35)
    }
}

/// What models of one family differ in, as far as their configurations go.
#[derive(Clone, Copy, Debug, Default)]
struct Traits {
    /// The UNet predicts v, not the noise.
    v_prediction: bool,
    /// Trained with betas rescaled to zero terminal SNR.
    zero_snr: bool,
    /// `time_cond_proj_dim`: width of the guidance scale's embedding, of models distilled for latent consistency.
    guidance_embedding: Option<usize>,
    /// The UNet reads a mask and the masked picture's latents beside the latents.
    inpainting: bool,
    /// SD3's CLIP-L has no projection in the file: the identity stands for it.
    clip_is_plain: bool,
}

/// A mapped single file and where each part's tensors are in it.
#[derive(Debug)]
pub struct SingleFile {
    file: Arc<MappedFile>,
    family: Family,
    parts: BTreeMap<Part, BTreeMap<String, Entry>>,
    metadata: HashMap<String, String>,
    traits: Traits,
    /// `transformer/config.json`, as the tensors' shapes say it.
    transformer: Option<Value>,
    unused: Vec<String>,
}

impl SingleFile {
    /// Maps the file, recognises its family and finds its parts; reads no weights.
    ///
    /// Keys do not tell whether a Stable Diffusion 2.x predicts v at 768 pixels or noise at 512 (base). In this order:
    /// `modelspec.prediction_type` of the file's metadata (`v`, `epsilon`), the marker tensor `v_pred` (`ztsnr`: zero
    /// terminal SNR), for 2.x a `global_step` of 875000, a tensor or a number of a `.ckpt`, which is that of base, and else v for 2.x and noise for the others,
    /// all as diffusers assumes. The web UI runs the UNet once to find out; a caller who knows better overrides the
    /// scheduler's `prediction_type`.
    ///
    /// A UNet with `time_embed.cond_proj.weight` is distilled for latent consistency (Luo et al. 2023, arXiv:2310.04378): it
    /// gets `time_cond_proj_dim`, and the model an `LCMScheduler`.
    ///
    /// # Errors
    /// [`Error::File`]: not safetensors nor PyTorch's (and what to do), not a checkpoint of these families (and what it seems to be), a
    /// part missing.
    pub fn open(path: &Path) -> Result<SingleFile> {
        let file = Arc::new(MappedFile::open(path.to_path_buf())?);
        let entries = unwrapped_names(attach_scales(file.entries()?));
        let refuse = |reason: &str| Err(Error::file(path, reason));
        let has = |prefix: &str| entries.keys().any(|key| key.starts_with(prefix));
        let conv_in = entries.get("model.diffusion_model.input_blocks.0.0.weight");
        let keys = entries.keys().map(String::as_str);
        if has("model.diffusion_model.joint_blocks.") {
            return SingleFile::open_sd3(path, file.clone(), entries);
        }
        if let Some(foreign) = Foreign::of_keys(keys, conv_in.is_some()) {
            return refuse(&foreign.to_string());
        }
        let Some(conv_in) = conv_in else {
            return refuse(
                "is no Stable Diffusion checkpoint: no tensor model.diffusion_model.input_blocks.0.0.weight",
            );
        };
        let refiner = has("conditioner.embedders.0.model.") && !has(SDXL_OPENCLIP);
        if refiner || conv_in.shape.first() == Some(&384) {
            return refuse(&Foreign::Refiner.to_string());
        }
        if let Some(&channels) = conv_in.shape.get(1)
            && let Some(foreign) = Foreign::of_channels(channels)
        {
            return refuse(&format!("{foreign} (its UNet takes {channels} channels, not 4 or 9)"));
        }
        let family = if has(SDXL_OPENCLIP) {
            Family::Sdxl
        } else if has(OPENCLIP) {
            if has("model.diffusion_model.label_emb.") {
                return refuse(&Foreign::Family("Stable unCLIP").to_string());
            }
            Family::Sd2
        } else if has(CLIP) {
            Family::Sd1
        } else {
            return refuse("is a UNet alone, or with a VAE; it has no text encoder: download the full checkpoint");
        };
        let flag = |name: &str| entries.contains_key(name);
        let (v_marker, zero_snr) = (flag("v_pred"), flag("ztsnr"));
        let metadata = file.metadata();
        let v_prediction = match metadata.get("modelspec.prediction_type").map(String::as_str) {
            Some("v") => true,
            Some("epsilon") => false,
            _ => v_marker || (family == Family::Sd2 && global_step(&entries, &metadata) != Some(875_000)),
        };
        let cond_proj = entries.get("model.diffusion_model.time_embed.cond_proj.weight");
        let guidance_embedding = cond_proj.and_then(|weight| weight.shape.get(1).copied());
        let inpainting = conv_in.shape.get(1) == Some(&INPAINTING_CHANNELS);
        let traits = Traits { v_prediction, zero_snr, guidance_embedding, inpainting, clip_is_plain: false };
        let (parts, unused) = split(family, entries);
        SingleFile { file, family, parts, metadata, traits, transformer: None, unused }.complete()
    }

    fn open_sd3(path: &Path, file: Arc<MappedFile>, entries: Entries) -> Result<SingleFile> {
        if !entries.keys().any(|key| key.starts_with(SD3_ENCODERS[0].0)) {
            let reason = "is the transformer and the VAE of a Stable Diffusion 3, without text encoders: download the file whose name \
                          has incl_clips";
            return Err(Error::file(path, reason));
        }
        let of_transformer = |key: &String| key.starts_with(UNET);
        let own = entries.iter().filter(|(key, _)| of_transformer(key));
        let own: Entries = own.map(|(key, entry)| (key[UNET.len()..].to_string(), entry.clone())).collect();
        let transformer = ldm_mmdit::config(&own);
        let family = if transformer["qk_norm"].is_null() { Family::Sd3 } else { Family::Sd35 };
        let others = entries.into_iter().filter(|(key, _)| !of_transformer(key));
        let (mut parts, mut unused) = split(family, others.collect());
        let has_projection =
            parts.get(&Part::TextEncoder).is_some_and(|clip| clip.contains_key("text_projection.weight"));
        let (metadata, traits) = (file.metadata(), Traits { clip_is_plain: !has_projection, ..Traits::default() });
        let (named, left) = ldm_mmdit::entries(own);
        parts.insert(Part::Transformer, named);
        unused.extend(left.into_iter().map(|key| format!("{UNET}{key}")));
        SingleFile { file, family, parts, metadata, traits, transformer: Some(transformer), unused }.complete()
    }

    /// # Errors
    /// [`Error::File`]: a part is missing.
    fn complete(self) -> Result<SingleFile> {
        match self.part_list().into_iter().find(|part| !self.parts.contains_key(part)) {
            None => Ok(self),
            Some(part) => {
                let reason = format!("holds no {}: download the full checkpoint", part.folder());
                Err(Error::file(&self.file.path, reason))
            }
        }
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The parts that this family has; T5 of SD3 where the file holds it.
    pub fn part_list(&self) -> Vec<Part> {
        let t5 = self.parts.contains_key(&Part::TextEncoder3).then_some(Part::TextEncoder3);
        let (text, network): (&[Part], _) = match self.family {
            Family::Sd1 | Family::Sd2 => (&[Part::TextEncoder], Part::Unet),
            Family::Sdxl => (&[Part::TextEncoder, Part::TextEncoder2], Part::Unet),
            Family::Sd3 | Family::Sd35 => (&[Part::TextEncoder, Part::TextEncoder2], Part::Transformer),
        };
        text.iter().copied().chain(t5).chain([network, Part::Vae]).collect()
    }

    /// Tensors that belong to no part (optimiser states, EMA copies), for one warning.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// The file's bytes, for a digest.
    pub fn file_bytes(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(self.file.as_bytes())
    }

    /// The weights of a part under the keys of diffusers, from the one mapping.
    ///
    /// # Errors
    /// [`Error::File`]: the family has no such part.
    pub fn store(&self, part: Part, device: &Device, dtype: DType) -> Result<WeightStore> {
        let Some(entries) = self.parts.get(&part) else {
            return Err(Error::file(&self.file.path, format!("holds no {}", part.folder())));
        };
        Ok(WeightStore::view(&self.file, entries.clone(), device, dtype))
    }

    /// The configuration that a directory in the layout of diffusers would hold as `name` (`unet/config.json`,
    /// `scheduler/scheduler_config.json`, `tokenizer/tokenizer_config.json`, ...): from the file's metadata if that has an
    /// entry of this name, else the published one of the family. The vocabulary is not among them.
    pub fn config(&self, name: &str) -> Option<String> {
        if let Some(text) = self.metadata.get(name) {
            return Some(text.clone());
        }
        if let Some(config) = self.transformer.as_ref().filter(|_| name == "transformer/config.json") {
            return Some(config.to_string());
        }
        if name.starts_with("text_encoder_3/") && !self.parts.contains_key(&Part::TextEncoder3) {
            return None;
        }
        published(self.family, name, self.traits).map(|config| config.to_string())
    }
}

/// A VAE from a file of its own: keys of diffusers, or those of LDM with or without `first_stage_model.`.
///
/// # Errors
/// [`Error::File`]: not safetensors nor PyTorch's, or no tensor of a VAE in it.
pub fn open_vae(path: &Path, device: &Device, dtype: DType) -> Result<WeightStore> {
    let file = Arc::new(MappedFile::open(path.to_path_buf())?);
    let mut entries = unwrapped_names(attach_scales(file.entries()?));
    if entries.keys().any(|key| key.starts_with(VAE)) {
        entries.retain(|key, _| key.starts_with(VAE));
    }
    let entries = entries.into_iter().map(|(key, entry)| (String::from(key.strip_prefix(VAE).unwrap_or(&key)), entry));
    let (vae, _) = vae_entries(entries.collect());
    if !vae.keys().any(|key| key.starts_with("decoder.")) {
        return Err(Error::file(path, "is no VAE: no tensor decoder.*, with or without first_stage_model. before it"));
    }
    Ok(WeightStore::view(&file, vae, device, dtype))
}

type Entries = BTreeMap<String, Entry>;

/// How long the model was trained, if the file says so.
fn global_step(entries: &Entries, metadata: &HashMap<String, String>) -> Option<i64> {
    match entries.get("global_step").filter(|entry| entry.dtype == FileDtype::I64) {
        Some(entry) => Some(i64::from_le_bytes(*entry.bytes().first_chunk()?)),
        None => metadata.get("global_step")?.parse().ok(),
    }
}

/// The parts' tensors under the keys of diffusers, and the keys that belong to none.
fn split(family: Family, entries: Entries) -> (BTreeMap<Part, Entries>, Vec<String>) {
    let level = ldm::unet_level(entries.keys().filter_map(|key| key.strip_prefix(UNET)));
    let (encoders, others): (&[(&str, Part)], _) = match family {
        Family::Sd1 => (&[(CLIP, Part::TextEncoder)], None),
        Family::Sd2 => (&[], Some((OPENCLIP, Part::TextEncoder))),
        Family::Sdxl => (&[(SDXL_CLIP, Part::TextEncoder)], Some((SDXL_OPENCLIP, Part::TextEncoder2))),
        Family::Sd3 | Family::Sd35 => (&SD3_ENCODERS, None),
    };
    let mut parts: BTreeMap<Part, Entries> = BTreeMap::new();
    let (mut vae, mut openclip, mut unused) = (Entries::new(), Entries::new(), Vec::new());
    for (key, entry) in entries {
        if let Some(rest) = key.strip_prefix(UNET) {
            match ldm::unet_key(rest, level) {
                Some(name) => drop(parts.entry(Part::Unet).or_default().insert(name, entry)),
                None => unused.push(key),
            }
        } else if let Some(rest) = key.strip_prefix(VAE) {
            vae.insert(rest.to_string(), entry);
        } else if let Some((rest, part)) = encoders.iter().find_map(|(at, part)| Some((key.strip_prefix(at)?, *part))) {
            parts.entry(part).or_default().insert(rest.to_string(), entry);
        } else if let Some(rest) = others.and_then(|(at, _)| key.strip_prefix(at)) {
            openclip.insert(rest.to_string(), entry);
        } else if !matches!(key.as_str(), "v_pred" | "ztsnr") && !is_schedule(&key) && !key.ends_with(".logit_scale") {
            unused.push(key);
        }
    }
    let (vae, left) = vae_entries(vae);
    unused.extend(left.into_iter().map(|key| format!("{VAE}{key}")));
    if !vae.is_empty() {
        parts.insert(Part::Vae, vae);
    }
    if let Some((_, part)) = others {
        // Stable Diffusion 2.x was trained on the output of the last layer but one; its directory form lacks the last.
        parts.insert(part, openclip_entries(openclip, family == Family::Sd2, &mut unused));
    }
    (parts, unused)
}

/// Tables of the noise schedule, which the scheduler computes itself.
fn is_schedule(key: &str) -> bool {
    let name = key.strip_prefix("denoiser.").unwrap_or(key);
    matches!(
        name,
        "betas" | "sigmas" | "alphas_cumprod" | "alphas_cumprod_prev" | "logvar" | "scale_factor" | "global_step"
    ) || ["sqrt_", "log_one_minus_", "posterior_", "model_ema.decay", "model_ema.num_updates", "lvlb_weights"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// LDM keys renamed, keys of diffusers as they are; and keys that are neither.
fn vae_entries(entries: Entries) -> (Entries, Vec<String>) {
    let levels = ldm::vae_levels(entries.keys().map(String::as_str));
    if levels == 0 {
        return (entries, Vec::new());
    }
    let (mut vae, mut unused) = (Entries::new(), Vec::new());
    for (key, entry) in entries {
        match ldm::vae_key(&key, levels) {
            Some(name) => drop(vae.insert(name, entry)),
            None if key.starts_with("loss.") || key.starts_with("model_ema.") => {} // of the VAE's training
            None => unused.push(key),
        }
    }
    (vae, unused)
}

fn openclip_entries(entries: Entries, without_last_layer: bool, unused: &mut Vec<String>) -> Entries {
    let layers = ldm::openclip_layers(entries.keys().map(String::as_str));
    let last = format!("transformer.resblocks.{}.", layers.saturating_sub(1));
    let mut named = Entries::new();
    for (key, entry) in entries {
        let of_2 = key.starts_with(&last) || key == "text_projection";
        if without_last_layer && of_2
            || matches!(key.as_str(), "logit_scale" | "attn_mask" | "transformer.text_model.embeddings.position_ids")
        {
            continue;
        }
        let Some(name) = ldm::openclip_key(&key) else {
            unused.push(key);
            continue;
        };
        match ldm::thirds(&name) {
            Some(names) => {
                for (i, name) in names.into_iter().enumerate() {
                    match entry.part(i, 3) {
                        Some(third) => drop(named.insert(name, third)),
                        None => unused.push(key.clone()), // the layers will miss it
                    }
                }
            }
            None if key == "text_projection" => drop(named.insert(name, entry.transpose())),
            None => drop(named.insert(name, entry)),
        }
    }
    named
}

/// Of an inpainting UNet's input: the latents, the mask, and the latents of the masked picture.
const INPAINTING_CHANNELS: usize = 9;

/// The published configurations: runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 and -2-1-base,
/// stabilityai/stable-diffusion-xl-base-1.0.
fn published(family: Family, name: &str, traits: Traits) -> Option<Value> {
    let Traits { v_prediction, zero_snr, guidance_embedding, inpainting, clip_is_plain } = traits;
    let blocks = |attention: &[bool], cross: &str, plain: &str| -> Vec<String> {
        attention.iter().map(|&has| if has { cross } else { plain }.to_string()).collect()
    };
    let value = match (name, family) {
        ("transformer/config.json", Family::Sd3) => ldm_mmdit::Shape::medium().config(),
        ("transformer/config.json", Family::Sd35) => ldm_mmdit::Shape::medium_3_5().config(),
        ("unet/config.json", Family::Sd1 | Family::Sd2 | Family::Sdxl) => {
            let (channels, down, up): (&[usize], &[bool], &[bool]) = match family {
                Family::Sdxl => (&[320, 640, 1280], &[false, true, true], &[true, true, false]),
                _ => (&[320, 640, 1280, 1280], &[true, true, true, false], &[false, true, true, true]),
            };
            let mut config = json!({
                "_class_name": "UNet2DConditionModel", "act_fn": "silu", "out_channels": 4,
                "in_channels": if inpainting { INPAINTING_CHANNELS } else { 4 },
                "block_out_channels": channels, "layers_per_block": 2, "center_input_sample": false,
                "down_block_types": blocks(down, "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": blocks(up, "CrossAttnUpBlock2D", "UpBlock2D"),
                "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "mid_block_scale_factor": 1,
                "norm_eps": 1e-05, "norm_num_groups": 32,
            });
            let special = match family {
                Family::Sd1 => json!({ "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64 }),
                Family::Sd2 => json!({
                    "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": true,
                    "sample_size": if v_prediction { 96 } else { 64 }, "upcast_attention": v_prediction,
                }),
                Family::Sdxl => json!({
                    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": true,
                    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
                }),
                Family::Sd3 | Family::Sd35 => return None,
            };
            if let (Value::Object(config), Value::Object(special)) = (&mut config, special) {
                config.extend(special);
                config.extend(guidance_embedding.map(|dim| ("time_cond_proj_dim".to_string(), dim.into())));
            }
            config
        }
        ("vae/config.json", _) => {
            let (size, scaling) = match family {
                Family::Sd1 => (512, 0.18215),
                Family::Sd2 => (if v_prediction { 768 } else { 512 }, 0.18215),
                Family::Sdxl => (1024, 0.13025),
                Family::Sd3 | Family::Sd35 => (1024, 1.5305),
            };
            json!({
                "_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
                "latent_channels": if family.is_sd3() { 16 } else { 4 }, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
                "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
                "norm_num_groups": 32, "sample_size": size, "scaling_factor": scaling,
                "force_upcast": family == Family::Sdxl,
                "shift_factor": if family.is_sd3() { 0.0609 } else { 0.0 },
                "use_quant_conv": !family.is_sd3(), "use_post_quant_conv": !family.is_sd3(),
            })
        }
        ("text_encoder/config.json", Family::Sd2) => text_config("CLIPTextModel", [1024, 4096, 23, 16], "gelu", 512),
        ("text_encoder/config.json", Family::Sd3 | Family::Sd35) if !clip_is_plain => {
            text_config("CLIPTextModelWithProjection", [768, 3072, 12, 12], "quick_gelu", 768)
        }
        ("text_encoder/config.json", _) => text_config("CLIPTextModel", [768, 3072, 12, 12], "quick_gelu", 768),
        ("text_encoder_2/config.json", Family::Sdxl | Family::Sd3 | Family::Sd35) => {
            text_config("CLIPTextModelWithProjection", [1280, 5120, 32, 20], "gelu", 1280)
        }
        ("text_encoder_3/config.json", Family::Sd3 | Family::Sd35) => json!({
            "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240,
            "num_layers": 24, "num_heads": 64, "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-06, "feed_forward_proj": "gated-gelu",
            "vocab_size": 32128, "eos_token_id": 1, "pad_token_id": 0,
        }),
        ("scheduler/scheduler_config.json", Family::Sd3 | Family::Sd35) => {
            json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0})
        }
        ("scheduler/scheduler_config.json", _) => {
            let class = match family {
                _ if guidance_embedding.is_some() => "LCMScheduler",
                Family::Sd1 => "PNDMScheduler",
                Family::Sd2 => "DDIMScheduler",
                Family::Sdxl | Family::Sd3 | Family::Sd35 => "EulerDiscreteScheduler",
            };
            let mut config = json!({
                "_class_name": class, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": false, "clip_sample": false,
                "prediction_type": if v_prediction { "v_prediction" } else { "epsilon" },
                "timestep_spacing": "leading",
            });
            if class == "PNDMScheduler" {
                config["skip_prk_steps"] = true.into();
            }
            if class == "LCMScheduler" {
                config["original_inference_steps"] = 50.into();
                config["set_alpha_to_one"] = true.into();
            }
            if zero_snr {
                config["rescale_betas_zero_snr"] = true.into();
                config["timestep_spacing"] = "trailing".into();
            }
            config
        }
        ("tokenizer/tokenizer_config.json", Family::Sd2) => tokenizer_config("!"),
        ("tokenizer/tokenizer_config.json", _) => tokenizer_config("<|endoftext|>"),
        ("tokenizer_2/tokenizer_config.json", Family::Sdxl | Family::Sd3 | Family::Sd35) => tokenizer_config("!"),
        _ => return None,
    };
    Some(value)
}

fn text_config(class: &str, [width, ff, layers, heads]: [usize; 4], act: &str, projection: usize) -> Value {
    json!({
        "architectures": [class], "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": width,
        "intermediate_size": ff, "num_hidden_layers": layers, "num_attention_heads": heads,
        "max_position_embeddings": 77, "hidden_act": act, "layer_norm_eps": 1e-05, "projection_dim": projection,
        "bos_token_id": 49406, "eos_token_id": 49407,
    })
}

fn tokenizer_config(pad: &str) -> Value {
    json!({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": true,
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
    })
}

/// The published configuration of a family, without a file: `None` where it has none of this name.
pub fn published_config(family: Family, name: &str) -> Option<String> {
    let traits = Traits { v_prediction: family == Family::Sd2, ..Traits::default() };
    published(family, name, traits).map(|config| config.to_string())
}

/// Is this a file that could be a model (rather than a directory), and if it is of a kind that cannot be read, why?
///
/// # Errors
/// [`Error::File`]: `.gguf`, with the way out.
pub fn check_extension(path: &Path) -> Result<PathBuf> {
    match path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) {
        true => Err(Error::file(path, "is a GGUF file, not supported: download the safetensors version")),
        false => Ok(path.to_path_buf()),
    }
}
