"""Writes the keys and shapes of the published models' checkpoints, as the published classes have them.

    tools/oracle/venv tools/oracle/manifest.py [--check]

For every model: NAME.json, its config.json with the keys of the published file, and NAME.txt (of DeepFloyd IF NAME.txt.gz), one line a
module: path, then name and shape of each of its tensors. The configurations of IF-I-XL and IF-II-L are those of deepfloyd.py's
docstring; IF-I-L and IF-I-M are IF-I-XL's with their own channels, which their numbers of parameters confirm. That of IF-II-M is
not to be had: no list of it is here. Parts of SDXL that have the tensors of another model's have NAME.json alone, and
the script stops unless the two lists are one. The classes are built on torch's meta device, so this takes no memory and no
weights. --check compares with the files that are there instead of writing.
"""

import argparse
import gzip
import json
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/manifest"

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_21 = UNET | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
UNET_XL = UNET_21 | {
    "_diffusers_version": "0.19.0.dev0",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
UNET_IF = UNET_21 | {
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_head_dim": 64,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": "group_norm",
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "in_channels": 3,
    "layers_per_block": 3,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "num_attention_heads": None,
    "out_channels": 6,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}
UNET_IF_II = UNET_IF | {
    "_diffusers_version": "0.18.0.dev0",
    "block_out_channels": [160, 320, 640, 960, 1280],
    "class_embed_type": "timestep",
    "cross_attention_dim": 1280,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
    "in_channels": 6,
    "layers_per_block": [2, 2, 3, 5, 5],
    "mid_block_scale_factor": 1.4142271248762552,
    "resnet_out_scale_factor": 1.4142271248762552,
    "resnet_skip_time_act": True,
    "sample_size": 256,
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 1280,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
}


def unet_if(channels):
    return UNET_IF | {"block_out_channels": channels, "cross_attention_dim": channels[-1]}


VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
TEXT_21 = TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}

# Name: config and the published number of parameters.
MODELS = {
    "sd15-unet": (UNET, 859_520_964),
    "sd21-unet": (UNET_21, 865_910_724),
    "sdxl-unet": (UNET_XL, 2_567_463_684),
    "if-i-xl-unet": (unet_if([704, 1408, 2112, 2816]), 4_304_695_110),
    "if-i-l-unet": (unet_if([320, 640, 960, 1280]), 935_365_830),
    "if-i-m-unet": (unet_if([192, 384, 576, 768]), 371_605_830),
    "if-ii-l-unet": (UNET_IF_II, 1_243_277_190),
    "sd15-vae": (VAE, 83_653_863),
    "sd21-vae": (VAE | {"_diffusers_version": "0.10.0.dev0", "sample_size": 768}, 83_653_863),
    "sd15-text": (TEXT, 123_060_480),
    "sd21-text": (TEXT_21, 340_387_840),
}
# Name: config, the published number of parameters, and whose list is its own as well.
SAME = {
    "sdxl-vae": (
        VAE | {"_diffusers_version": "0.20.0.dev0", "force_upcast": True, "sample_size": 1024, "scaling_factor": 0.13025},
        83_653_863, "sd15-vae",
    ),
    "sdxl-text": (TEXT | {"torch_dtype": "float16"}, 123_060_480, "sd15-text"),
    "sdxl-text-2": (
        TEXT | {
            "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
            "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
            "torch_dtype": "float16",
        },
        694_659_840, "text_encoder_sdxl2",
    ),
}


def build(config):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if config.get("architectures") == ["CLIPTextModelWithProjection"]:
            return CLIPTextModelWithProjection(CLIPTextConfig(**config))
        if config.get("model_type") == "clip_text_model":
            return CLIPTextModel(CLIPTextConfig(**config))
        return {"UNet2DConditionModel": UNet2DConditionModel, "AutoencoderKL": AutoencoderKL}[
            config["_class_name"]
        ].from_config(config)


def listing(name):
    config, parameters = (MODELS | SAME)[name][:2]
    state = build(config).state_dict()
    total = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
    assert total == parameters, f"{name}: {total} parameters, published {parameters}"
    modules = {}
    for key, tensor in sorted(state.items()):
        if not tensor.is_floating_point():
            continue
        # Newer transformers releases drop the prefix that the published text encoders have.
        if "-text" in name and not key.startswith("text_projection"):
            key = "text_model." + key.removeprefix("text_model.")
        path, tensor_name = key.rsplit(".", 1)
        modules.setdefault(path, []).append(f"{tensor_name} {'x'.join(map(str, tensor.shape))}")
    return "".join(f"{path} {' '.join(tensors)}\n" for path, tensors in modules.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    ROOT.mkdir(parents=True, exist_ok=True)
    changed = []
    for name, (config, _, other) in SAME.items():
        path, text = ROOT / f"{name}.json", json.dumps(config, indent=2) + "\n"
        if other in MODELS:
            assert listing(name) == listing(other), name
        else:  # of clip.py
            held = json.loads((ROOT / f"{other}.json").read_text())["tensors"]
            state = {k: v for k, v in build(config).state_dict().items() if v.is_floating_point()}
            named = lambda k: k if k.startswith("text_projection") else "text_model." + k.removeprefix("text_model.")
            assert sorted(held) == sorted([named(k), list(v.shape)] for k, v in state.items()), name
        if check and (not path.exists() or path.read_text() != text):
            changed.append(path.name)
        elif not check:
            path.write_text(text)
    for name, (config, _) in MODELS.items():
        listed = (ROOT / f"{name}.txt", listing(name).encode())
        if name.startswith("if-"):
            listed = (ROOT / f"{name}.txt.gz", gzip.compress(listed[1], 9, mtime=0))
        for path, data in [(ROOT / f"{name}.json", (json.dumps(config, indent=2) + "\n").encode()), listed]:
            if check and (not path.exists() or path.read_bytes() != data):
                changed.append(path.name)
            elif not check:
                path.write_bytes(data)
    if changed:
        sys.exit(f"differ: {', '.join(changed)}")


if __name__ == "__main__":
    main()
