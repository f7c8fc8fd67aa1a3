"""Writes tests/data/unet-options: one tiny UNet for each group of options that no published SD 1.x/2.x model sets, those
of SDXL and of LCM among them.

    tools/oracle/venv tools/oracle/unet_options.py

NAME/config.json, the weights (f16, every one drawn; most are described: drawn.py), and expected.safetensors with input and
output: sample [N, C, H, W], timestep [], prompt_embeds [N, L, 16], out, computed in f64; with added conditioning
pooled_prompt_embeds [N, P] and time_ids [N, 6], with a guidance embedding guidance [1]. Of some models out_fp8: the same with the linear layers
of the transformers in 8-bit floats, weights and inputs, a scale per row; but for the keys and values of the text.
"""

import json
import pathlib

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors.torch import save_file

import drawn
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
    "text-time": (
        {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": [1, 2],
         "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 2],
         "use_linear_projection": True, "upcast_attention": None, "addition_embed_type": "text_time",
         "addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 46},
        (2, 6, 5),
    ),
    "guidance-embedding": ({"time_cond_proj_dim": 14}, (1, 6, 5)),
}


# Whose weights are stored: it stands in for the UNet of a whole model, which is read as a directory.
STORED = ["guidance-embedding"]
# These with out_fp8.
IN_8_BITS = ["only-cross-attention", "text-time", "guidance-embedding"]


def in_8_bits(rows):
    """Rows [..., K] as 8-bit floats would hold them: scaled, in f32, so that the largest of a row is 448."""
    rows = rows.float()
    peak = rows.abs().amax(-1, keepdim=True)
    codes = (rows * (448.0 / peak)).to(torch.float8_e4m3fn)
    return codes.double() * (peak / 448.0).double()


def product_in_8_bits(module):
    """Lets a linear layer or a 1x1 convolution compute with weight and input in 8 bits."""
    weight, pixels = module.weight.data, isinstance(module, torch.nn.Conv2d)
    module.weight.data = in_8_bits(weight.flatten(1)).reshape(weight.shape)

    def rounded(_, inputs):
        x = inputs[0]
        return (in_8_bits(x.movedim(1, -1)).movedim(-1, 1) if pixels else in_8_bits(x),)

    module.register_forward_pre_hook(rounded)


def to_8_bits(unet):
    of_text = ("attn2.to_k", "attn2.to_v")
    for name, module in unet.named_modules():
        cross = name.endswith(of_text) or (module_of_cross(unet, name) and name.endswith(("attn1.to_k", "attn1.to_v")))
        if "attentions." in name and isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not cross:
            product_in_8_bits(module)


def module_of_cross(unet, name):
    """Is this a part of a block whose first attention is to the text as well?"""
    block = name.rsplit(".", 2)[0]
    return name.count(".") > 2 and getattr(unet.get_submodule(block), "only_cross_attention", False)


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
        if name in STORED:
            state = {key: tensor.half() for key, tensor in unet.state_dict().items()}
            save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        else:
            drawn.write(folder, "diffusion_pytorch_model", unet, 100 + seed, "unet", torch.float16)

        generator = torch.Generator().manual_seed(seed)
        sample = torch.randn(n, unet.config.in_channels, h, w, generator=generator)
        embeds = torch.randn(n, 7, 16, generator=generator)
        timestep = torch.tensor(621.0)
        tensors = {"sample": sample, "timestep": timestep, "prompt_embeds": embeds}
        added, guidance = None, None
        if "addition_embed_type" in config:
            pooled = torch.randn(n, 10, generator=generator)
            ids = torch.tensor([[512.0, 768, 0, 64, 1024, 1024], [1000, 333, 16, 0, 256, 1536]])
            tensors |= {"pooled_prompt_embeds": pooled, "time_ids": ids}
            added = {"text_embeds": pooled.double(), "time_ids": ids}
        if "time_cond_proj_dim" in config:
            tensors |= {"guidance": torch.tensor([6.5])}
            # The published method reads nothing of its object.
            embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding
            guidance = embedding(None, tensors["guidance"], config["time_cond_proj_dim"]).double()
        with torch.no_grad():
            out = unet.double()(
                sample.double(), timestep, encoder_hidden_states=embeds.double(), timestep_cond=guidance,
                added_cond_kwargs=added,
            ).sample
        tensors |= {"out": out.float()}
        if name in IN_8_BITS:
            to_8_bits(unet)
            with torch.no_grad():
                out = unet(
                    sample.double(), timestep, encoder_hidden_states=embeds.double(), timestep_cond=guidance,
                    added_cond_kwargs=added,
                ).sample
            tensors |= {"out_fp8": out.float()}
        save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
