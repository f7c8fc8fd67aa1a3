"""ResAdapter (Cheng et al. 2024, arXiv:2403.02084): random ones for the small models, and plain runs with them.

    resadapter.py [OUT]      tests/data/resadapter, or elsewhere

One folder per model, in the form of the published ones: pytorch_lora_weights.safetensors, kohya's keys of the convolutions that
change the size, f16, alpha 8; diffusion_pytorch_model.safetensors, f32, the norms of all ResNets. NAME.safetensors has the latents
of each step of a run in f64 with W + weight alpha / rank (up * down) and these norms, and how far f32 is from them.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

import reference
from module_values import relative

ROOT = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
ALPHA, RANK = 8.0, 3
RUNS = {
    "sd15": (0.7, {"method": "plain", "size": (20, 16), "steps": 2, "guidance": 2.0, "seed": 95, "scheduler": "ddim"}),
    "sdxl": (1.0, {"method": "plain", "size": (16, 20), "steps": 2, "guidance": 2.0, "seed": 96, "scheduler": "euler"}),
}


def made(unet, generator):
    """(LoRA, norms) of this UNet."""
    draw = lambda shape, size: torch.randn(shape, generator=generator) * size
    lora, norms = {}, {}
    for name, parameter in unet.named_parameters():
        if name.endswith("samplers.0.conv.weight"):
            out, into, height, width = parameter.shape
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            lora[f"{key}.alpha"] = torch.tensor(ALPHA).half()
            lora[f"{key}.lora_down.weight"] = draw((RANK, into, height, width), 0.1).half()
            lora[f"{key}.lora_up.weight"] = draw((out, RANK, 1, 1), 0.1).half()
        if ".resnets." in name and (".norm1." in name or ".norm2." in name):
            norms[name] = parameter.detach() + draw(parameter.shape, 0.2)
    return lora, norms


def apply(unet, lora, norms, weight):
    dtype = unet.dtype
    missing = unet.load_state_dict({name: tensor.to(dtype) for name, tensor in norms.items()}, strict=False)
    assert not missing.unexpected_keys
    for name, parameter in unet.named_parameters():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.alpha" in lora:
            alpha, down, up = (lora[f"{key}.{end}"].to(dtype) for end in ("alpha", "lora_down.weight", "lora_up.weight"))
            change = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
            parameter.data += weight * alpha / down.shape[0] * change


@torch.no_grad()
def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "resadapter"
    runs = []
    for seed, (name, (weight, changes)) in enumerate(RUNS.items()):
        single = reference.load(ROOT / name)
        double = reference.double(single)
        lora, norms = made(single.unet, torch.Generator().manual_seed(seed))
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(lora, folder / "pytorch_lora_weights.safetensors")
        save_file(norms, folder / "diffusion_pytorch_model.safetensors")
        settings = reference.Settings(prompt="a photo of a cat", **changes)
        before = reference.run(double, settings)
        for model in (single, double):
            apply(model.unet, lora, norms, weight)
        tensors, in_f32 = reference.run(double, settings), reference.run(single, settings)
        kept = {key: tensor for key, tensor in tensors.items() if key.startswith("step")}
        assert (before["step2"] - kept["step2"]).abs().max() > 0.1
        error = max(relative(in_f32[key], tensors[key]) for key in kept)
        assert error < 7e-5, error
        save_file(kept, out / f"{name}.safetensors")
        runs.append({"model": name, "weight": weight, "args": settings.args({"prompt": None} | changes),
                     "f32_error": float(f"{error:.1e}")})
    (out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
