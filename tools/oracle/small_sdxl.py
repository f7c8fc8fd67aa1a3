"""The small random SDXL directories: two tokenizers, two text encoders, a UNet with size conditioning. small_models.py
writes them, and says what the settings mean.

Published SDXL in brief: CLIP-L (quick_gelu) and OpenCLIP bigG (gelu, with a projection), both read before their last layer;
no attention in the first level and 2 and 10 transformer layers in the others; heads of one width; linear projections.
"""

import small_tokenizer

SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}

CLASSES = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "scheduler": ["diffusers", None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def tokenizer(merges, max_length=77, pad="!", form="files"):
    return {"merges": merges, "form": form, "pad": pad, "max_length": max_length, "added_tokens": "dict"}


def text(width, layers, heads, act, projection, **more):
    return {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "hidden_act": act, "layer_norm_eps": 1e-05, "projection_dim": projection, "eos_token_id": "eos", **more}


# As the published config.json has them: ids that are not the tokenizer's; the end of the text is the largest id.
LEGACY_IDS = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}


def unet(channels, heads, depth, cross, pooled, time_dim, **more):
    """No attention in the first level; `time_dim`: of each of the six size ids."""
    levels = len(channels) - 1
    return {"sample_size": 16, "block_out_channels": channels, "layers_per_block": 1, "attention_head_dim": heads,
            "transformer_layers_per_block": depth, "cross_attention_dim": cross, "norm_num_groups": 2,
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": time_dim,
            "projection_class_embeddings_input_dim": pooled + 6 * time_dim,
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * levels,
            "up_block_types": ["CrossAttnUpBlock2D"] * levels + ["UpBlock2D"], **more}


def vae(channels, **more):
    return {"block_out_channels": channels, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
            "scaling_factor": 0.13025, "sample_size": 32, "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels), **more}


EULER = {"_class_name": "EulerDiscreteScheduler", **SD_SCHEDULE, "clip_sample": False, "interpolation_type": "linear",
         "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
         "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False}

# Every key of the published UNet's config.json that is not among the ones above.
PUBLISHED_UNET_KEYS = {
    "act_fn": "silu", "addition_embed_type_num_heads": 64, "center_input_sample": False, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "num_attention_heads": None,
    "num_class_embeds": None, "only_cross_attention": False, "out_channels": 4, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_dim": None, "time_embedding_type": "positional",
    "timestep_post_act": None, "upcast_attention": None,
}

MODELS = {
    # SDXL base in small.
    "sdxl": {
        "covers": "SDXL base: all config keys as published, CLIP-L (pad <|endoftext|>) and bigG (pad !), legacy "
        "eos_token_id 2 in both, transformer depths 1, 2, 3 with two layers a block, heads of one width, Euler leading, "
        "f16 with variant names, prefix, zeros for no negative prompt, VAE force_upcast",
        "seed": 101,
        "tokenizer": tokenizer(120, pad=small_tokenizer.EOS),
        "tokenizer_2": tokenizer(120),
        "text": text(16, 3, 2, "quick_gelu", 16, **LEGACY_IDS),
        "text_2": text(24, 2, 3, "gelu", 24, **LEGACY_IDS),
        "unet": unet([8, 16, 16], [1, 2, 2], [1, 2, 3], 40, 24, 8, layers_per_block=2, **PUBLISHED_UNET_KEYS),
        "vae": vae([8, 16], layers_per_block=2, act_fn="silu", in_channels=3, out_channels=3, force_upcast=True),
        "scheduler": EULER,
        "index": {"force_zeros_for_empty_prompt": True, "add_watermarker": None},
        "files": {"dtype": "f16", "prefix": True, "variant": "fp16", "described": True},
    },
    # An encoded negative prompt where none is given; every dimension of the size conditioning another.
    "sdxl-encoded-negative": {
        "covers": "force_zeros_for_empty_prompt false, pooled width unlike the hidden width, 6 x 12 size ids, bigG narrower "
        "than CLIP-L, vocabularies of different sizes, three-level VAE with force_upcast false, f16 without prefix",
        "seed": 102,
        "tokenizer": tokenizer(150, max_length=32, pad=small_tokenizer.EOS),
        "tokenizer_2": tokenizer(20, max_length=32),
        "text": text(32, 2, 4, "quick_gelu", 32, max_position_embeddings=32),
        "text_2": text(16, 3, 1, "gelu", 20, max_position_embeddings=32),
        "unet": unet([8, 16, 16], [2, 4, 2], [1, 1, 2], 48, 20, 12),
        "vae": vae([4, 8, 8], force_upcast=False),
        "scheduler": EULER,
        "index": {"force_zeros_for_empty_prompt": False},
        "files": {"dtype": "f16", "prefix": False, "described": True},
    },
    # SDXL-Turbo in small.
    "sdxl-turbo": {
        "covers": "SDXL-Turbo: Euler-ancestral with trailing spacing, name with turbo, f16, force_zeros absent (true)",
        "seed": 103,
        "tokenizer": tokenizer(60, max_length=40, pad=small_tokenizer.EOS),
        "tokenizer_2": tokenizer(60, max_length=40),
        "text": text(16, 2, 2, "quick_gelu", 16, max_position_embeddings=40, **LEGACY_IDS),
        "text_2": text(16, 2, 2, "gelu", 16, max_position_embeddings=40, **LEGACY_IDS),
        "unet": unet([8, 8, 16], [1, 1, 2], [1, 2, 3], 32, 16, 8, sample_size=8),
        "vae": vae([8, 8], force_upcast=True),
        "scheduler": {**EULER, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        "index": {"_name_or_path": "stabilityai/sdxl-turbo"},
        "files": {"dtype": "f16", "prefix": True, "described": True},
    },
    # A fine-tuned model with v-prediction and zero terminal SNR.
    "sdxl-v-zero-snr": {
        "covers": "v_prediction with rescale_betas_zero_snr and trailing spacing, bf16, two attention levels of depth 2, "
        "tokenizer.json alone",
        "seed": 104,
        "tokenizer": tokenizer(80, max_length=24, pad=small_tokenizer.EOS, form="json"),
        "tokenizer_2": tokenizer(80, max_length=24, form="json"),
        "text": text(16, 2, 2, "quick_gelu", 16, max_position_embeddings=24),
        "text_2": text(16, 3, 4, "gelu", 32, max_position_embeddings=24),
        "unet": unet([8, 16], [1, 2], [1, 2], 32, 32, 6),
        "vae": vae([8, 8], force_upcast=False),
        "scheduler": {**EULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                      "timestep_spacing": "trailing"},
        "index": {"force_zeros_for_empty_prompt": True},
        "files": {"dtype": "bf16", "prefix": True, "described": True},
    },
    # Everything in shards of f32.
    "sdxl-shards": {
        "covers": "f32 in shards with an index for every part (the text encoders too), position_ids in both text encoders, "
        "DDIM config, one VAE of four levels (factor 8), number of transformer layers as one number",
        "seed": 105,
        "tokenizer": tokenizer(0, max_length=20, pad=small_tokenizer.EOS),
        "tokenizer_2": tokenizer(0, max_length=20),
        "text": text(8, 2, 1, "quick_gelu", 8, max_position_embeddings=20),
        "text_2": text(12, 2, 3, "gelu", 8, max_position_embeddings=20),
        "unet": unet([4, 8, 8], [1, 2, 2], 1, 20, 8, 4, sample_size=8),
        "vae": vae([4, 4, 4, 8], force_upcast=True),
        "scheduler": {"_class_name": "DDIMScheduler", **SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False,
                      "prediction_type": "epsilon"},
        "index": {"force_zeros_for_empty_prompt": True},
        "files": {"dtype": "f32", "prefix": True, "position_ids": True, "shard": 30_000, "described": True},
    },
    # Widths that are no power of two, attention in the first level too, projections as 1x1 convolutions.
    "sdxl-odd": {
        "covers": "channels 6 and 12 in groups of 3, attention in the first level, 1x1 projections, one head a level, 10 "
        "values per size id, gelu in both encoders, bf16",
        "seed": 107,
        "tokenizer": tokenizer(30, max_length=16),
        "tokenizer_2": tokenizer(30, max_length=16),
        "text": text(10, 2, 5, "gelu", 10, max_position_embeddings=16),
        "text_2": text(14, 2, 7, "gelu", 22, max_position_embeddings=16),
        "unet": unet([6, 12], 1, [1, 2], 24, 22, 10) | {
            "norm_num_groups": 3, "use_linear_projection": False,
            "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2},
        "vae": vae([6, 12], norm_num_groups=3, force_upcast=False),
        "scheduler": EULER,
        "index": {"force_zeros_for_empty_prompt": True},
        "files": {"dtype": "bf16", "prefix": False, "described": True},
    },
}
