"""The small random Stable Diffusion directories: which configurations there are (those of SDXL: small_sdxl.py), and how
they are written.

Every weight is drawn (nothing stays at zero or one), rounded to the precision it is stored in, and only then used:
file and reference hold the same numbers. A draw depends on the model's seed and the tensor's name alone.
"""

import hashlib
import json
import math
import pathlib

import torch
from safetensors.torch import save_file

import small_sdxl
import small_tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

SD_SCHEDULE = small_sdxl.SD_SCHEDULE

# A model: seed; tokenizer settings; overrides of each config.json; how the files are written.
#   dtype: of the stored weights;  shard: bytes a file (with an index), none: one file
#   described: the weights are not written (drawn.py);  prefix: text encoder keys begin with "text_model.";  position_ids: the int64 buffer of older files is present
#   old_vae_names: attention keys query/key/value/proj_attn;  variant: file names carry ".fp16"
MODELS = {
    # SD 1.5 in small: heads as one number, 1x1-conv projections, quick_gelu, PNDM, the oldest file conventions.
    "sd15": {
        "covers": "scalar heads, conv projections, epsilon, quick_gelu, PNDM config, text_model. prefix, int64 "
        "position_ids, old VAE attention names, f16, vocab.json + merges.txt, pad <|endoftext|>",
        "seed": 15,
        "tokenizer": {"merges": 300, "form": "files", "pad": small_tokenizer.EOS, "max_length": 77, "added_tokens": "dict"},
        "text": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05, "projection_dim": 16, "eos_token_id": "eos"},
        "unet": {"sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": 2, "attention_head_dim": 2,
                 "cross_attention_dim": 16, "norm_num_groups": 4, "act_fn": "silu", "center_input_sample": False,
                 "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "downsample_padding": 1,
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "flip_sin_to_cos": True, "freq_shift": 0,
                 "in_channels": 4, "out_channels": 4, "mid_block_scale_factor": 1, "norm_eps": 1e-05},
        "vae": {"block_out_channels": [8, 16], "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 4,
                "sample_size": 32, "act_fn": "silu", "in_channels": 3, "out_channels": 3,
                "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        "scheduler": {"_class_name": "PNDMScheduler", **SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False,
                      "skip_prk_steps": True, "trained_betas": None},
        "files": {"dtype": "f16", "prefix": True, "position_ids": True, "old_vae_names": True},
    },
    # SD 2.1 in small: heads per level, linear projections, upcast attention, v-prediction, pad "!".
    "sd21": {
        "covers": "heads per level, linear projections, upcast_attention, v_prediction, gelu, DDIM config, no prefix, "
        "f16, pad !, legacy eos_token_id 2, three levels, VAE factor 4",
        "seed": 21,
        "tokenizer": {"merges": 200, "form": "files", "pad": "!", "max_length": 77, "added_tokens": "string"},
        "text": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "hidden_act": "gelu", "layer_norm_eps": 1e-05, "projection_dim": 64, "eos_token_id": 2,
                 "bos_token_id": 0, "pad_token_id": 1},
        "unet": {"sample_size": 24, "block_out_channels": [8, 16, 16], "layers_per_block": 1,
                 "attention_head_dim": [1, 2, 4], "cross_attention_dim": 32, "norm_num_groups": 4,
                 "use_linear_projection": True, "upcast_attention": True, "dual_cross_attention": False,
                 "num_class_embeds": None, "only_cross_attention": False,
                 "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]},
        "vae": {"block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 96,
                "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
                "scaling_factor": 0.18215},
        "scheduler": {"_class_name": "DDIMScheduler", **SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False,
                      "skip_prk_steps": True, "trained_betas": None, "prediction_type": "v_prediction"},
        "files": {"dtype": "f16", "prefix": False, "described": True},
    },
    # Four levels as in the published UNets, f32 in shards, per-level transformer depth.
    "four-levels": {
        "covers": "four levels, transformer_layers_per_block per level, f32 in shards with an index, VAE factor 8, "
        "Euler config with linspace spacing, prefix without position_ids, scalar heads",
        "seed": 4,
        "tokenizer": {"merges": 60, "form": "files", "pad": small_tokenizer.EOS, "max_length": 40, "added_tokens": "string"},
        "text": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
                 "hidden_act": "gelu", "projection_dim": 16, "max_position_embeddings": 40, "eos_token_id": "eos"},
        "unet": {"sample_size": 8, "block_out_channels": [8, 8, 12, 12], "layers_per_block": 1, "attention_head_dim": 4,
                 "cross_attention_dim": 16, "norm_num_groups": 4, "transformer_layers_per_block": [1, 2, 1, 1],
                 "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                 "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
        "vae": {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64,
                "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
                "scaling_factor": 0.13025},
        "scheduler": {"_class_name": "EulerDiscreteScheduler", **SD_SCHEDULE, "interpolation_type": "linear",
                      "prediction_type": "epsilon", "timestep_spacing": "linspace", "use_karras_sigmas": False,
                      "trained_betas": None},
        "files": {"dtype": "f32", "prefix": True, "shard": 100_000, "described": True},
    },
    # No quant convolutions, bf16, tokenizer.json only, x0 prediction.
    "no-quant": {
        "covers": "no quant_conv / post_quant_conv, bf16, tokenizer.json alone, model_max_length 24, sample prediction, "
        "Euler-ancestral config with trailing spacing, DownBlock2D before CrossAttnDownBlock2D, layers and heads per level",
        "seed": 5,
        "tokenizer": {"merges": 120, "form": "json", "pad": small_tokenizer.EOS, "max_length": 24, "added_tokens": "string"},
        "text": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
                 "hidden_act": "quick_gelu", "projection_dim": 24, "max_position_embeddings": 24, "eos_token_id": "eos"},
        "unet": {"sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": [1, 2],
                 "attention_head_dim": [2, 4], "cross_attention_dim": 24, "norm_num_groups": 8,
                 "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                 "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True},
        "vae": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32,
                "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
                "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.25},
        "scheduler": {"_class_name": "EulerAncestralDiscreteScheduler", **SD_SCHEDULE, "prediction_type": "sample",
                      "timestep_spacing": "trailing", "trained_betas": None},
        "files": {"dtype": "bf16", "prefix": True, "described": True},
    },
    # The least a config.json may say: everything else is the class default.
    "defaults": {
        "covers": "absent keys take the class default (four levels, 8 heads, 2 layers; CLIP 8 heads and quick_gelu; DDIM "
        "linear betas, set_alpha_to_one), VAE with one level (factor 1)",
        "seed": 6,
        "tokenizer": {"merges": 0, "form": "json-old", "pad": small_tokenizer.EOS, "max_length": 77, "added_tokens": "dict"},
        "text": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "eos_token_id": "eos"},
        "unet": {"block_out_channels": [8, 8, 8, 8], "cross_attention_dim": 16, "norm_num_groups": 4},
        "vae": {"block_out_channels": [8], "norm_num_groups": 4},
        "scheduler": {"_class_name": "DDIMScheduler"},
        "files": {"dtype": "f16", "prefix": False, "described": True},
    },
    # A VAE without mid attention and with three layers a block; DDPM; one level with cross-attention between two without.
    "mixed": {
        "covers": "plain, cross-attention, plain levels; transformer depth 2; VAE without mid attention; DDPM config; "
        "f16 variant file names; position_ids without prefix; groups of 8 channels",
        "seed": 7,
        "tokenizer": {"merges": 90, "form": "files", "pad": "!", "max_length": 32, "added_tokens": "dict"},
        "text": {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 1,
                 "hidden_act": "gelu", "layer_norm_eps": 1e-04, "projection_dim": 16, "max_position_embeddings": 32,
                 "eos_token_id": "eos"},
        "unet": {"sample_size": 12, "block_out_channels": [8, 16, 8], "layers_per_block": 1, "attention_head_dim": 2,
                 "cross_attention_dim": 16, "norm_num_groups": 2, "norm_eps": 1e-04, "transformer_layers_per_block": 2,
                 "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
        "vae": {"block_out_channels": [4, 8], "layers_per_block": 3, "norm_num_groups": 2, "sample_size": 24,
                "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
                "mid_block_add_attention": False, "scaling_factor": 0.3},
        "scheduler": {"_class_name": "DDPMScheduler", **SD_SCHEDULE, "clip_sample": False, "variance_type": "fixed_small",
                      "prediction_type": "epsilon", "trained_betas": None},
        "files": {"dtype": "f16", "prefix": False, "position_ids": True, "variant": "fp16", "described": True},
    },
    # Channels that are no power of two, attention at the lowest level too; a multistep config; v-prediction with quick_gelu.
    "wide": {
        "covers": "head widths 6 and 24 (two heads, one head), 12 and 24 channels, DPM-Solver config, v_prediction, linear projections off, "
        "f16 in shards, VAE scaling 0.5",
        "seed": 8,
        "tokenizer": {"merges": 40, "form": "files", "pad": small_tokenizer.EOS, "max_length": 20, "added_tokens": "string"},
        "text": {"hidden_size": 20, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5,
                 "hidden_act": "quick_gelu", "projection_dim": 20, "max_position_embeddings": 20, "eos_token_id": "eos"},
        "unet": {"sample_size": 16, "block_out_channels": [12, 24], "layers_per_block": 1, "attention_head_dim": [2, 1],
                 "cross_attention_dim": 20, "norm_num_groups": 3,
                 "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                 "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]},
        "vae": {"block_out_channels": [6, 12], "layers_per_block": 1, "norm_num_groups": 3, "sample_size": 32,
                "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
                "scaling_factor": 0.5, "force_upcast": False},
        "scheduler": {"_class_name": "DPMSolverMultistepScheduler", **SD_SCHEDULE, "prediction_type": "v_prediction",
                      "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint",
                      "lower_order_final": True, "trained_betas": None},
        "files": {"dtype": "f16", "prefix": True, "shard": 60_000, "described": True},
    },
    # SD 2.1 fine-tuned with v-prediction down to no signal at all.
    "zero-snr": {
        "covers": "v_prediction with rescale_betas_zero_snr and trailing spacing, DDIM config, f16",
        "seed": 9,
        "tokenizer": {"merges": 0, "form": "files", "pad": "!", "max_length": 16, "added_tokens": "string"},
        "text": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "hidden_act": "gelu", "projection_dim": 16, "max_position_embeddings": 16, "eos_token_id": "eos"},
        "unet": {"sample_size": 16, "block_out_channels": [8, 16], "layers_per_block": 1, "attention_head_dim": [1, 2],
                 "cross_attention_dim": 16, "norm_num_groups": 2, "use_linear_projection": True,
                 "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "vae": {"block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 32,
                "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
        "scheduler": {"_class_name": "DDIMScheduler", **SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False,
                      "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                      "timestep_spacing": "trailing"},
        "files": {"dtype": "f16", "prefix": True, "described": True},
    },
}

MODELS |= small_sdxl.MODELS

FIRST_CLASSES = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "scheduler": ["diffusers", None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def draw(seed: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The value of one weight: normal, scaled so that activations keep roughly unit size through the network."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    x = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    if name.endswith("embedding.weight"):
        return x * 0.5
    if name.endswith("bias"):
        return x * 0.1
    if tensor.ndim == 1:  # gamma of a norm
        return 1 + 0.2 * x
    return x / math.sqrt(tensor[0].numel())


def fill(module: torch.nn.Module, seed: int, part: str, dtype: torch.dtype):
    """Draws every floating-point weight of the module and rounds it to what the file will hold."""
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = draw(seed, f"{part}.{name}", tensor)
    if part == "vae":
        # As trained VAEs have it, scaled latents are of unit size. Otherwise the last steps of a run, which take small
        # differences of large numbers, would amplify rounding beyond what a test can allow.
        last = "quant_conv" if module.config.use_quant_conv else "encoder.conv_out"
        for name in (f"{last}.weight", f"{last}.bias"):
            state[name][: module.config.latent_channels] *= 2 / module.config.scaling_factor
    state = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in state.items()}
    module.load_state_dict(state)
    module.eval().requires_grad_(False)


def old_vae_name(key: str) -> str:
    for new, old in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]:
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def write_weights(folder: pathlib.Path, stem: str, state: dict, shard: int | None, variant: str | None):
    write_shards(folder, stem, state, lambda _, tensor: tensor, shard, variant)


def write_shards(folder: pathlib.Path, stem: str, state: dict, value, shard: int | None, variant: str | None):
    """One file, or with `shard` files of about that many bytes and their index.

    `state` may hold tensors without values: value(name, tensor) is what is written, asked for when its file is.
    """
    for file, part in files_of(folder, stem, state, shard, variant):
        save_file({k: value(k, t).contiguous() for k, t in part.items()}, folder / file, metadata={"format": "pt"})


def files_of(folder: pathlib.Path, stem: str, state: dict, shard: int | None, variant: str | None):
    """[(name, tensors)] of these files; the index of shards is written."""
    size_of = lambda tensor: tensor.numel() * tensor.element_size()
    dot = f".{variant}" if variant else ""
    shards, size = [{}], 0
    for name, tensor in sorted(state.items()):
        if shard and shards[-1] and size + size_of(tensor) > shard:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += size_of(tensor)
    name_of = lambda i: f"{stem}{dot}-{i + 1:05}-of-{len(shards):05}.safetensors" if shard else f"{stem}{dot}.safetensors"
    files = [(name_of(i), part) for i, part in enumerate(shards)]
    if shard:
        weight_map = {name: file for file, part in files for name in part}
        index = {"metadata": {"total_size": sum(map(size_of, state.values()))}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def write_json(path: pathlib.Path, tree):
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Model:
    """The reference modules of one directory, in f32, and its settings. `text_2`, `tokenizer_2`: of SDXL, else None."""

    text_2 = tokenizer_2 = None
    force_zeros = False  # SDXL: no negative prompt means zeros in place of an encoded ""

    def modules(self):
        """The names of the attributes that hold modules."""
        return [name for name in ("text", "text_2", "unet", "vae") if getattr(self, name) is not None]


def write_text_encoder(folder: pathlib.Path, config: dict, seed: int, files: dict, dtype, projection: bool):
    """Writes a text encoder; its class is CLIPTextModelWithProjection where `projection` is set. Returns the module."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    text = cls(CLIPTextConfig(**config, attn_implementation="sdpa"))
    fill(text, seed, folder.name, dtype)
    folder.mkdir()
    write_json(folder / "config.json", {"architectures": [cls.__name__], "model_type": "clip_text_model", **config})
    state = {k: v for k, v in text.state_dict().items() if v.is_floating_point()}
    # Integers are not drawn.
    if files.get("described") and not files.get("position_ids"):
        import drawn

        inner = lambda name: "text_model." * files["prefix"] + name.removeprefix("text_model.")
        key = lambda name: name if name == "text_projection.weight" else inner(name)
        drawn.write(folder, "model", text, seed, folder.name, dtype, key=key, shard=files.get("shard"), variant=files.get("variant"))
        return text
    outer = {k: v.to(dtype) for k, v in state.items() if k == "text_projection.weight"}
    state = {k.removeprefix("text_model."): v.to(dtype) for k, v in state.items() if k not in outer}
    if files.get("position_ids"):
        state["embeddings.position_ids"] = torch.arange(text.config.max_position_embeddings)[None]
    if files["prefix"]:
        state = {f"text_model.{k}": v for k, v in state.items()}
    write_weights(folder, "model", state | outer, files.get("shard"), files.get("variant"))
    return text


def write_network(folder: pathlib.Path, module, seed: int, dtype, files: dict):
    """Writes the weights of a UNet or a VAE, or describes them."""
    if files.get("described"):
        import drawn

        drawn.write(folder, "diffusion_pytorch_model", module, seed, folder.name, dtype, shard=files.get("shard"), variant=files.get("variant"))
        return
    state = {k: v.to(dtype) for k, v in module.state_dict().items()}
    if folder.name == "vae" and files.get("old_vae_names"):
        state = {old_vae_name(k): v for k, v in state.items()}
        assert any("proj_attn" in k for k in state)
    write_weights(folder, "diffusion_pytorch_model", state, files.get("shard"), files.get("variant"))


def text_config(overrides: dict, vocab_size: int, eos: int) -> dict:
    config = {"vocab_size": vocab_size, **overrides}
    if config["eos_token_id"] == "eos":
        config |= {"eos_token_id": eos, "bos_token_id": eos - 1, "pad_token_id": eos}
    return config


def build(name: str, root: pathlib.Path) -> Model:
    """Writes the directory `root/name` and returns its modules, holding the stored values."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTokenizer

    spec = MODELS[name]
    files = spec["files"]
    dtype = DTYPES[files["dtype"]]
    folder = root / name
    folder.mkdir(parents=True)
    model = Model()
    model.name, model.folder, model.spec = name, folder, spec

    # Classes are built from exactly the keys the config.json carries, so an absent key is the class's default.
    torch.manual_seed(0)
    vocab_size, eos, _ = small_tokenizer.write(folder / "tokenizer", **spec["tokenizer"])
    model.text = write_text_encoder(folder / "text_encoder", text_config(spec["text"], vocab_size, eos), spec["seed"],
                                    files, dtype, projection=False)
    model.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    if "text_2" in spec:
        vocab_size, eos, _ = small_tokenizer.write(folder / "tokenizer_2", **spec["tokenizer_2"])
        model.text_2 = write_text_encoder(folder / "text_encoder_2", text_config(spec["text_2"], vocab_size, eos),
                                          spec["seed"], files, dtype, projection=True)
        model.tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        model.force_zeros = spec["index"].get("force_zeros_for_empty_prompt", True)
    unet = UNet2DConditionModel(**spec["unet"])
    vae = AutoencoderKL(**spec["vae"])
    fill(unet, spec["seed"], "unet", dtype)
    fill(vae, spec["seed"], "vae", dtype)

    index = dict(FIRST_CLASSES) if "text_2" not in spec else small_sdxl.CLASSES | spec["index"]
    index["scheduler"] = ["diffusers", spec["scheduler"]["_class_name"]]
    if name == "sd15":  # published directories list a safety checker; copies often lack the folder
        index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"],
                  "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    if name == "sd21":
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)

    (folder / "unet").mkdir()
    write_json(folder / "unet/config.json",
               {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", **spec["unet"]})
    write_network(folder / "unet", unet, spec["seed"], dtype, files)

    (folder / "vae").mkdir()
    write_json(folder / "vae/config.json", {"_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", **spec["vae"]})
    write_network(folder / "vae", vae, spec["seed"], dtype, files)

    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler/scheduler_config.json", {"_diffusers_version": "0.6.0", **spec["scheduler"]})

    model.unet, model.vae = unet, vae
    model.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    model.scheduler_config = dict(spec["scheduler"])
    return model
