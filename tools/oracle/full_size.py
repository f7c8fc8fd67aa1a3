"""Writes a model directory of the size of Stable Diffusion 1.5 or SDXL with random weights: published shapes, no published
values.

    tools/oracle/venv tools/oracle/full_size.py DIR [--model sd15|sdxl] [--dtype f16|bf16] [--seed N] [--parts unet,vae,...]

For timing and memory: a picture from it is noise. The tokenizers are the small one padded to the published 49408 ids.
About 2.1 GB, and 6.9 GB for SDXL, whose files are shards of 2 GB: what the script holds in memory. The parameter counts are
checked against the published ones.
"""

import argparse
import json
import pathlib

import torch

import small_models
import small_sdxl
import small_tokenizer

UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "cross_attention_dim": 768, "norm_num_groups": 32,
    "norm_eps": 1e-05, "act_fn": "silu", "downsample_padding": 1, "mid_block_scale_factor": 1,
}
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu", "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-05,
    "projection_dim": 768, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}
SDXL_UNET = {
    **small_sdxl.PUBLISHED_UNET_KEYS, "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
    "norm_num_groups": 32, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
SDXL_TEXT = {**TEXT, **small_sdxl.LEGACY_IDS}
SDXL_TEXT_2 = {
    **SDXL_TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "hidden_act": "gelu", "projection_dim": 1280,
}
# Part -> (config, parameters); then what else the directory holds.
MODELS = {
    "sd15": {
        "parts": {"unet": (UNET, 859_520_964), "vae": (VAE, 83_653_863), "text_encoder": (TEXT, 123_060_480)},
        "index": small_models.FIRST_CLASSES, "scheduler": small_models.MODELS["sd15"]["scheduler"], "shard": None,
        "tokenizers": {"tokenizer": small_tokenizer.EOS},
    },
    "sdxl": {
        "parts": {"unet": (SDXL_UNET, 2_567_463_684), "text_encoder": (SDXL_TEXT, 123_060_480),
                  "text_encoder_2": (SDXL_TEXT_2, 694_659_840),
                  "vae": (VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, 83_653_863)},
        "index": small_sdxl.CLASSES | {"force_zeros_for_empty_prompt": True}, "scheduler": small_sdxl.EULER,
        "shard": 2_000_000_000, "tokenizers": {"tokenizer": small_tokenizer.EOS, "tokenizer_2": "!"},
    },
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
           "text_encoder_2": "CLIPTextModelWithProjection"}


def module(part, config):
    import diffusers
    import transformers

    with torch.device("meta"):  # shapes only: the values are drawn one tensor at a time
        if part.startswith("text"):
            return getattr(transformers, CLASSES[part])(transformers.CLIPTextConfig(**config))
        return getattr(diffusers, CLASSES[part])(**config)


def write_part(folder, part, config, parameters, seed, dtype, shard):
    """A shard is drawn when it is written, so one of them is what memory holds."""
    folder.mkdir(parents=True, exist_ok=True)
    text = part.startswith("text")
    shapes = {}
    for name, tensor in module(part, config).state_dict().items():
        if tensor.dtype.is_floating_point:
            bare = name.removeprefix("text_model.")
            key = f"text_model.{bare}" if text and bare != "text_projection.weight" else bare
            shapes[key] = tensor.to(dtype)
    total = sum(tensor.numel() for tensor in shapes.values())
    assert total == parameters, (part, total)
    classes = {"architectures": [CLASSES[part]], "model_type": "clip_text_model"} if text else {"_class_name": CLASSES[part]}
    small_models.write_json(folder / "config.json", classes | config)
    stem = "model" if text else "diffusion_pytorch_model"
    draw = lambda key, tensor: small_models.draw(seed, f"{part}.{key}", tensor).to(dtype)
    small_models.write_shards(folder, stem, shapes, draw, shard, None)


def write_tokenizer(folder, pad):
    """The small vocabulary, then unused entries, then the special tokens at their published ids."""
    small_tokenizer.write(folder, merges=300, form="files", pad=pad, max_length=77, added_tokens="dict")
    vocab = list(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))[:-2]
    vocab += [f"[unused{i}]" for i in range(TEXT["vocab_size"] - 2 - len(vocab))]
    vocab += [small_tokenizer.BOS, small_tokenizer.EOS]
    text = json.dumps({t: i for i, t in enumerate(vocab)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--dtype", choices=["f16", "bf16"], default="f16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", help="separated by commas; all of the model's when left out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, root = MODELS[options.model], options.dir
    root.mkdir(parents=True, exist_ok=True)
    scheduler = model["scheduler"]
    small_models.write_json(root / "model_index.json", model["index"] | {"scheduler": ["diffusers", scheduler["_class_name"]]})
    for name, pad in model["tokenizers"].items():
        if not (root / name).exists():
            write_tokenizer(root / name, pad)
    (root / "scheduler").mkdir(exist_ok=True)
    small_models.write_json(root / "scheduler/scheduler_config.json", scheduler)
    for part in options.parts.split(",") if options.parts else model["parts"]:
        config, parameters = model["parts"][part]
        write_part(root / part, part, config, parameters, options.seed, small_models.DTYPES[options.dtype], model["shard"])
        print(f"{part}: {parameters} parameters")


if __name__ == "__main__":
    main()
