"""Writes tests/data/mmdit: small SD3Transformer2DModels, of every form that SD3 and SD3.5 have and of some that they have not.

    tools/oracle/venv tools/oracle/mmdit.py

NAME/config.json, the weights' description (drawn.py), and expected.safetensors with input and output: sample [N, C, H, W],
timestep [N], prompt_embeds [N, L, D], pooled_prompt_embeds [N, P], out, computed in f64. Of one model out_fp8: the same with the
large linear layers of the blocks in 8-bit floats, weights and inputs, a scale per row.

The sinusoid's frequencies are f32, and torch's exp gives three of the 128 an ulp beside the nearest; at t = 999 that moves a sine by
2e-5, and what comes out of so small a model by as much. So late timesteps are asked of the larger model alone.

    tools/oracle/venv tools/oracle/mmdit.py --published

prints how many parameters and tensors the published models have, from their configurations and the class alone.
"""

import json
import pathlib
import sys

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

import drawn
import small_models
from unet_options import product_in_8_bits

ROOT = pathlib.Path(__file__).resolve().parents[2] / "tests/data/mmdit"


def config(layers, heads, head_dim, channels, joint, pooled, positions, **more):
    return {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": channels,
            "out_channels": channels, "joint_attention_dim": joint, "caption_projection_dim": heads * head_dim,
            "pooled_projection_dim": pooled, "patch_size": 2, "sample_size": 16, "pos_embed_max_size": positions, **more}


# Name: configuration; batch, height, width of the sample; tokens of text; timesteps.
MODELS = {
    # SD3-medium in small, with heads as wide as its.
    "plain": (config(2, 2, 64, 16, 48, 40, 12), (2, 8, 12), 9, [981.25, 981.25]),
    # SD3.5-medium in small: norms of queries and keys, two blocks with a second attention; a step for each sample; the table is
    # cropped unevenly.
    "dual": (config(3, 3, 8, 6, 24, 20, 10, qk_norm="rms_norm", dual_attention_layers=[0, 1]), (2, 10, 6), 7, [621.0, 3.5]),
    # A second attention where the text ends, heads of no whole vectors, large patches, other channels out than in.
    "odd": (config(2, 3, 12, 4, 15, 11, 9, patch_size=4, out_channels=5, dual_attention_layers=[1]), (1, 12, 20), 5, [250.0]),
    # The only block is the last; the whole table; a patch of one cell; norms without a second attention (SD3.5-large).
    "single": (config(1, 2, 6, 3, 8, 9, 7, patch_size=1, out_channels=None, qk_norm="rms_norm"), (3, 7, 7), 1, [40.0, 7.5, 120.0]),
}
IN_8_BITS = ["dual"]

MEDIUM = config(24, 24, 64, 16, 4096, 2048, 192, sample_size=128)
PUBLISHED = {
    "sd3-medium": MEDIUM,
    "sd35-medium": MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
}


def published():
    for name, settings in PUBLISHED.items():
        with torch.device("meta"):
            state = SD3Transformer2DModel(**settings).state_dict()
        print(name, sum(tensor.numel() for tensor in state.values()), "parameters in", len(state), "tensors")


def to_8_bits(transformer):
    for block in transformer.transformer_blocks:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.startswith("norm"):
                product_in_8_bits(module)


def main():
    torch.set_num_threads(1)
    for seed, (name, (settings, (n, h, w), tokens, timesteps)) in enumerate(MODELS.items()):
        transformer = SD3Transformer2DModel(**settings)
        small_models.fill(transformer, 200 + seed, "transformer", torch.float32)
        folder = ROOT / name
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": "SD3Transformer2DModel"} | settings, indent=2)
        (folder / "config.json").write_text(text + "\n")
        drawn.write(folder, "diffusion_pytorch_model", transformer, 200 + seed, "transformer", torch.float32)

        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        tensors = {
            "sample": normal(n, settings["in_channels"], h, w),
            "timestep": torch.tensor(timesteps),
            "prompt_embeds": normal(n, tokens, settings["joint_attention_dim"]),
            "pooled_prompt_embeds": normal(n, settings["pooled_projection_dim"]),
        }
        double = [tensors[key].double() for key in ("sample", "prompt_embeds", "pooled_prompt_embeds")]
        transformer.double()

        def run():
            with torch.no_grad():
                return transformer(*double, tensors["timestep"]).sample.float().contiguous()

        tensors["out"] = run()
        if name in IN_8_BITS:
            to_8_bits(transformer)
            tensors["out_fp8"] = run()
        save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    published() if sys.argv[1:] == ["--published"] else main()
