"""Writes tests/data/unet-options: one tiny UNet for each group of options that no published SD 1.x/2.x model sets.

    tools/oracle/venv tools/oracle/unet_options.py

NAME/config.json and weights as diffusers writes them (f16, every one drawn), and expected.safetensors with input and
output: sample [N, C, H, W], timestep [], prompt_embeds [N, L, 16], out, computed in f64.
"""

import json
import pathlib

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import small_models

ROOT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/unet-options"

CROSS = {
    "block_out_channels": [8, 12],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
# Name: overrides; batch, height, width.
OPTIONS = {
    "only-cross-attention": (
        {"only_cross_attention": True, "mid_block_scale_factor": 1.5, "flip_sin_to_cos": False, "freq_shift": 1,
         "center_input_sample": True},
        (2, 6, 5),
    ),
    "no-mid-block": (
        {"mid_block_type": None, "only_cross_attention": [True, False], "conv_in_kernel": 5, "conv_out_kernel": 1,
         "time_embedding_dim": 24},
        (1, 8, 8),
    ),
    "one-resnet-mid-block": (
        {"mid_block_type": "UNetMidBlock2D", "downsample_padding": 0, "in_channels": 9, "out_channels": 8},
        (1, 9, 7),
    ),
    "transformer-layers-per-resnet": (
        {"layers_per_block": [2, 1], "transformer_layers_per_block": [[1, 2], 1],
         "reverse_transformer_layers_per_block": [[2, 1], [1, 1, 2]]},
        (1, 4, 6),
    ),
}


def main():
    torch.set_num_threads(1)
    for seed, (name, (overrides, (n, h, w))) in enumerate(OPTIONS.items()):
        config = CROSS | overrides
        unet = UNet2DConditionModel(**config)
        small_models.fill(unet, 100 + seed, "unet", torch.float16)
        folder = ROOT / name
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": "UNet2DConditionModel"} | config, indent=2)
        (folder / "config.json").write_text(text + "\n")
        state = {key: tensor.half() for key, tensor in unet.state_dict().items()}
        save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})

        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(n, unet.config.in_channels, h, w, generator=generator)
        embeds = torch.randn(n, 7, 16, generator=generator)
        timestep = torch.tensor(621.0)
        with torch.no_grad():
            out = unet.double()(sample.double(), timestep, encoder_hidden_states=embeds.double()).sample
        tensors = {"sample": sample, "timestep": timestep, "prompt_embeds": embeds, "out": out.float()}
        save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
