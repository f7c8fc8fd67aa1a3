//! What cannot be run as a model, recognised so that the message says what it is: by its tensors, or by the class that a
//! configuration names.

/// Why a file whose keys hold all texts of an entry is refused. Earlier entries are more special.
const KEYS: &[(&[&str], Foreign)] = &[
    (&["individual_token_refiner."], Foreign::Family("HunyuanVideo")),
    (&["distilled_guidance_layer."], Foreign::Family("Chroma")),
    (&["double_blocks."], Foreign::Family("FLUX")),
    (&["single_transformer_blocks."], Foreign::Family("FLUX")),
    (&["double_layers."], Foreign::Family("AuraFlow")),
    (&["double_stream_blocks."], Foreign::Family("HiDream")),
    (&["patchify_proj."], Foreign::Family("LTX-Video")),
    (&["adaln_single.", "transformer_blocks."], Foreign::Family("PixArt")),
    (&["y_embedder.y_proj.", "t_block.1."], Foreign::Family("PixArt")),
    (&["clip_txt_mapper."], Foreign::Family("Stable Cascade")),
    (&["clip_txt_pooled_mapper."], Foreign::Family("Stable Cascade")),
    (&[".channelwise."], Foreign::Family("Stable Cascade")),
    (&["mlp_t5."], Foreign::Family("Hunyuan-DiT")),
    (&[".qkv_x."], Foreign::Family("Mochi")),
    (&["patch_embed.text_proj."], Foreign::Family("CogVideoX")),
    (&["head.modulation"], Foreign::Family("Wan")),
    (&["cap_embedder."], Foreign::Family("Lumina")),
    (&["attention_y_norm."], Foreign::Family("Sana")),
    (&["encoder_hid_proj.", "add_embedding.pool."], Foreign::Part("the UNet of a DeepFloyd IF")),
    (&[".time_stack."], Foreign::Family("Stable Video Diffusion, a video model,")),
    (&[".temopral_conv."], Foreign::Family("ModelScope's text-to-video model")), // spelled so in its files
    (&["temp_conv"], Foreign::Family("a text-to-video model")),
    (&["edm_mean"], Foreign::Family("Playground 2.5")),
    (&["edm_vpred."], Foreign::Family("CosXL")),
    (&["lora_"], Foreign::Beside("a LoRA")),
    (&["hada_w1"], Foreign::Beside("a LoRA (LoHa)")),
    (&["lokr_w1"], Foreign::Beside("a LoRA (LoKr)")),
    (&["oft_blocks"], Foreign::Family("an adapter of the kind OFT")),
    (&["oft_diag"], Foreign::Family("an adapter of the kind OFT")),
    (&["image_proj.", "ip_adapter."], Foreign::Family("an IP-Adapter")),
];

/// As [`KEYS`], for files that hold no UNet.
const KEYS_WITHOUT_UNET: &[(&[&str], Foreign)] = &[
    (&["joint_blocks."], Foreign::Part("the transformer of a Stable Diffusion 3")),
    (&["transformer_blocks.0.norm1_context."], Foreign::Part("the transformer of a Stable Diffusion 3")),
    (&["motion_modules."], Foreign::Family("a motion module of AnimateDiff")),
    (&["control_model."], Foreign::Part("a ControlNet")),
    (&["controlnet_cond_embedding."], Foreign::Part("a ControlNet")),
    (&["controlnet_down_blocks."], Foreign::Part("a ControlNet")),
    (&["input_hint_block."], Foreign::Part("a ControlNet")),
    (&["body.0.block1."], Foreign::Part("a T2I-Adapter")),
    (&["body.0.in_conv."], Foreign::Part("a T2I-Adapter")),
    (&["adapter.body."], Foreign::Part("a T2I-Adapter")),
    (&["adapter.conv_in."], Foreign::Part("a T2I-Adapter")),
    (&["decoder.mid_block.", "encoder.mid_block."], Foreign::Part("a VAE")),
    (&["decoder.mid.", "encoder.mid."], Foreign::Part("a VAE")),
    (&["first_stage_model.decoder."], Foreign::Part("a VAE")),
    (&["mid_block.resnets.", "conv_in."], Foreign::Part("a UNet")),
    (&["middle_block.0.in_layers.", "time_embed."], Foreign::Part("a UNet")),
    (&["encoder.layers.0.self_attn."], Foreign::Part("a text encoder")),
    (&["transformer.resblocks.0."], Foreign::Part("a text encoder")),
    (&["emb_params"], Foreign::Beside("a file of textual inversion")),
    (&["string_to_param"], Foreign::Beside("a file of textual inversion")),
    (&["clip_l", "clip_g"], Foreign::Beside("a file of textual inversion")),
];

/// What classes of diffusers and transformers begin with, longer ones first where one begins another.
const CLASSES: &[(&str, Foreign)] = &[
    ("SD3Transformer2DModel", Foreign::Part("the transformer of a Stable Diffusion 3")),
    ("Flux", Foreign::Family("FLUX")),
    ("PixArt", Foreign::Family("PixArt")),
    ("StableCascade", Foreign::Family("Stable Cascade")),
    ("Wuerstchen", Foreign::Family("Wuerstchen")),
    ("StableVideoDiffusion", Foreign::Family("Stable Video Diffusion, a video model,")),
    ("UNetSpatioTemporal", Foreign::Family("Stable Video Diffusion, a video model,")),
    ("TextToVideo", Foreign::Family("a text-to-video model")),
    ("UNet3D", Foreign::Family("a text-to-video model")),
    ("VideoToVideo", Foreign::Family("a video model")),
    ("I2VGenXL", Foreign::Family("I2VGen-XL, a video model,")),
    ("AnimateDiff", Foreign::Family("AnimateDiff, a video model,")),
    ("MotionAdapter", Foreign::Family("a motion module of AnimateDiff")),
    ("CogVideoX", Foreign::Family("CogVideoX, a video model,")),
    ("CogView", Foreign::Family("CogView")),
    ("LTX", Foreign::Family("LTX-Video, a video model,")),
    ("Mochi", Foreign::Family("Mochi, a video model,")),
    ("Wan", Foreign::Family("Wan, a video model,")),
    ("HunyuanVideo", Foreign::Family("HunyuanVideo, a video model,")),
    ("HunyuanDiT", Foreign::Family("Hunyuan-DiT")),
    ("Kandinsky", Foreign::Family("Kandinsky")),
    ("AuraFlow", Foreign::Family("AuraFlow")),
    ("Lumina", Foreign::Family("Lumina")),
    ("Sana", Foreign::Family("Sana")),
    ("Chroma", Foreign::Family("Chroma")),
    ("HiDream", Foreign::Family("HiDream")),
    ("QwenImage", Foreign::Family("Qwen-Image")),
    ("StableUnCLIP", Foreign::Family("Stable unCLIP")),
    ("UnCLIP", Foreign::Family("unCLIP")),
    ("StableDiffusionUpscale", Foreign::Family("an upscaler")),
    ("StableDiffusionLatentUpscale", Foreign::Family("an upscaler")),
    ("StableDiffusionDepth2Img", Foreign::Family("a model that also reads depth")),
    ("StableDiffusionInstructPix2Pix", Foreign::Family("InstructPix2Pix, which edits pictures and")),
    ("StableDiffusionXLInstructPix2Pix", Foreign::Family("InstructPix2Pix, which edits pictures and")),
    ("StableAudio", Foreign::Family("a model of sound")),
    ("AudioLDM", Foreign::Family("a model of sound")),
    ("ControlNet", Foreign::Part("a ControlNet")),
    ("T2IAdapter", Foreign::Part("a T2I-Adapter")),
    ("Autoencoder", Foreign::Part("a VAE")),
    ("VQModel", Foreign::Part("a VAE")),
    ("UNet2DConditionModel", Foreign::Part("a UNet")),
    ("CLIPText", Foreign::Part("a text encoder")),
    ("CLIPModel", Foreign::Part("a text encoder")),
    ("T5EncoderModel", Foreign::Part("a text encoder")),
];

/// What a thing is that is no model of these families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Another family, by its name.
    Family(&'static str),
    /// A part of a model.
    Part(&'static str),
    /// What may be given beside a model.
    Beside(&'static str),
    /// The second model of SDXL, which goes over a picture of the first.
    Refiner,
}

impl std::fmt::Display for Foreign {
    /// What is said behind a file's name: `is FLUX, which is not supported; ...`.
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Foreign::Family(what) => {
                let comma = if what.ends_with(',') || what.ends_with(" and") { "" } else { "," };
                write!(f, "is {what}{comma} which is not supported; Stable Diffusion 1.x, 2.x, XL and 3 are")
            }
            Foreign::Part(what) => write!(f, "is {what} alone, not a whole model"),
            Foreign::Beside(what) => write!(f, "is {what}, not a model: give it beside a model"),
            Foreign::Refiner => f.write_str("is the SDXL refiner, which is not supported; use the base model"),
        }
    }
}

impl Foreign {
    /// By the keys of a single file; `has_unet`: it holds the UNet of a Stable Diffusion. `None`: nothing speaks against
    /// the families that are supported.
    pub fn of_keys<'a>(keys: impl Iterator<Item = &'a str> + Clone, has_unet: bool) -> Option<Foreign> {
        let holds = |text: &&str| keys.clone().any(|key| key.contains(text));
        let find = |table: &[(&[&str], Foreign)]| {
            table.iter().find(|(texts, _)| texts.iter().all(&holds)).map(|(_, foreign)| *foreign)
        };
        find(KEYS).or_else(|| if has_unet { None } else { find(KEYS_WITHOUT_UNET) })
    }

    /// By the class that a configuration or a model_index.json names.
    pub fn of_class(class: &str) -> Option<Foreign> {
        CLASSES.iter().find(|(beginning, _)| class.starts_with(beginning)).map(|(_, foreign)| *foreign)
    }

    /// By the channels that a UNet of Stable Diffusion reads.
    pub fn of_channels(channels: usize) -> Option<Foreign> {
        match channels {
            4 | 9 => None, // plain and inpainting
            5 => Some(Foreign::Family("a model that also reads depth")),
            7 => Some(Foreign::Family("an upscaler")),
            8 => Some(Foreign::Family("a model that edits pictures (InstructPix2Pix)")),
            _ => Some(Foreign::Family("a model that reads more than a picture's latents")),
        }
    }
}
