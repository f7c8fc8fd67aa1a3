"""Writes a Stable Diffusion 1.5-sized model directory with random f16 weights: published shapes, no published values.

    tools/oracle/venv tools/oracle/full_size.py DIR [--seed N] [--parts unet,vae,text_encoder]

For timing and memory: a picture from it is noise. The tokenizer is the small one padded to the published 49408 ids.
About 2.1 GB. The parameter counts are checked against the published ones.
"""

import argparse
import json
import pathlib

import torch

import small_models
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
SCHEDULER = small_models.MODELS["sd15"]["scheduler"]
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


def module(part):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    make = {"unet": lambda: UNet2DConditionModel(**UNET), "vae": lambda: AutoencoderKL(**VAE),
            "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT))}[part]
    with torch.device("meta"):  # shapes only: the values are drawn one tensor at a time
        return make()


def write_part(folder, part, seed):
    folder.mkdir(parents=True, exist_ok=True)
    state, total = {}, 0
    for name, tensor in module(part).state_dict().items():
        if tensor.dtype.is_floating_point:
            total += tensor.numel()
            state[name] = small_models.draw(seed, f"{part}.{name}", tensor).half()
    assert total == PARAMETERS[part], (part, total)
    if part == "text_encoder":
        state = {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}
    config = {
        "unet": {"_class_name": "UNet2DConditionModel", **UNET},
        "vae": {"_class_name": "AutoencoderKL", **VAE},
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **TEXT},
    }[part]
    small_models.write_json(folder / "config.json", config)
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    small_models.write_weights(folder, stem, state, None, None)


def write_tokenizer(folder):
    """The small vocabulary, then unused entries, then the special tokens at their published ids."""
    small_tokenizer.write(folder, merges=300, form="files", pad=small_tokenizer.EOS, max_length=77, added_tokens="dict")
    vocab = list(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))[:-2]
    vocab += [f"[unused{i}]" for i in range(TEXT["vocab_size"] - 2 - len(vocab))]
    vocab += [small_tokenizer.BOS, small_tokenizer.EOS]
    text = json.dumps({t: i for i, t in enumerate(vocab)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="unet,vae,text_encoder")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    root = options.dir
    root.mkdir(parents=True, exist_ok=True)
    small_models.write_json(root / "model_index.json", small_models.FIRST_CLASSES | {"scheduler": ["diffusers", "PNDMScheduler"]})
    if not (root / "tokenizer").exists():
        write_tokenizer(root / "tokenizer")
    (root / "scheduler").mkdir(exist_ok=True)
    small_models.write_json(root / "scheduler/scheduler_config.json", SCHEDULER)
    for part in options.parts.split(","):
        write_part(root / part, part, options.seed)
        print(f"{part}: {PARAMETERS[part]} parameters")


if __name__ == "__main__":
    main()
