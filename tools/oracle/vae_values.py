"""Expected values for tests/vae.rs, of diffusers' AutoencoderKL: tiled decoding and encoding; a decoder whose activations
leave the range of f16, and how far torch itself is off then.

    tools/oracle/venv tools/oracle/vae_values.py

writes tests/data/vae/tiled.safetensors and tests/data/vae/large.safetensors. Maps are [N, C, H, W], f32.
"""

import pathlib

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

import drawn

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def load(model, variant=None):
    return AutoencoderKL.from_pretrained(drawn.folder(DATA / model / "vae"), variant=variant).double().eval()


def tiled():
    """Tiles of 16 pixels that overlap by 4, in a model of two levels; of 16 and 8 in one of four."""
    tensors = {}
    for model, side, fraction, h, w in [("sd15", 16, 0.25, 14, 11), ("sd15", 16, 0.25, 9, 8), ("four-levels", 32, 0.5, 7, 9)]:
        vae = load(model)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.enable_tiling()
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // factor
        vae.tile_overlap_factor = fraction
        latent, image = normal(1, 1, vae.config.latent_channels, h, w), normal(2, 1, 3, h * factor, w * factor).clamp(-1, 1)
        name = f"{model}.{h}x{w}"
        moments = vae.encode(image.double()).latent_dist.parameters
        decoded = vae.decode(latent.double()).sample
        vae.disable_tiling()
        difference = (decoded - vae.decode(latent.double()).sample).abs().max() / decoded.std()
        print(f"{name}: tiles are up to {difference:.2g} of a deviation off the whole")
        tensors |= {f"{name}.latent": latent, f"{name}.decoded": decoded, f"{name}.image": image, f"{name}.moments": moments}
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, DATA / "vae/tiled.safetensors")


# The residual stream of the decoder is scaled by this: SDXL's decoder leaves f16's range of 65504 in its finest levels.
LARGE = 2.0**16


def enlarge(vae):
    """Multiplies what is added to the decoder's residual stream. Norms take the factor away again, so that the picture stays
    of its size; tests/vae.rs does the same to the same tensors."""
    for name, weight in vae.decoder.named_parameters():
        if name.startswith("conv_in.") or ".conv2." in name or ".to_out.0." in name:
            weight.data *= LARGE
        if ".upsamplers.0.conv.bias" in name or ".conv_shortcut.bias" in name:
            weight.data *= LARGE


def error(got, want):
    """The largest of an element, relative to the larger of its size and the root mean square of all."""
    got, want = got.double(), want.double()
    return ((got - want).abs() / want.abs().clamp(min=want.pow(2).mean().sqrt())).max().item()


def large():
    vae = load("sdxl", "fp16")
    latent = normal(5, 1, 4, 9, 7) * 2
    enlarge(vae)
    sizes = []
    for module in vae.decoder.modules():
        module.register_forward_hook(lambda _, __, out: sizes.append(out.abs().max().item()))
    with torch.no_grad():
        want = vae.decode(latent.double()).sample
        largest = max(sizes)
        low = {}
        for name, dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]:
            got = vae.to(dtype).decode(latent.to(dtype)).sample
            low[name] = error(got, want) if got.isfinite().all() else float("inf")
            print(f"{name}: {got.isfinite().float().mean():.3f} finite, off by {low[name]:.3g}")
            vae.double()
            vae = load("sdxl", "fp16")
            enlarge(vae)
    print(f"largest activation {largest:.3g}")
    assert largest > 65504 and not low["f16"] < 1
    values = {"latent": latent, "decoded": want, "torch_error_bf16": torch.tensor([low["bf16"]])}
    save_file({k: v.float().contiguous() for k, v in values.items()}, DATA / "vae/large.safetensors")


(DATA / "vae").mkdir(exist_ok=True)
with torch.no_grad():
    tiled()
    large()
