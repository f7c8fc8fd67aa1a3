"""Expected values of the modules of one model directory: text encoder, UNet, VAE; and the token ids."""

import copy
import json

import torch
from safetensors.torch import save_file

import small_tokenizer

TEXT_PROMPTS = ["", "a photo of a cat", "The QUICK brown fox, jumps over — the lazy dog! 😀 " * 6]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def tokenize(model, prompt):
    """As the Stable Diffusion pipelines do: padded and cut to the tokenizer's length."""
    return model.tokenizer(
        prompt, padding="max_length", max_length=model.tokenizer.model_max_length, truncation=True
    ).input_ids


def encode_prompt(model, prompt):
    return model.text(torch.tensor([tokenize(model, prompt)])).last_hidden_state


def set_mid_dilation(unet, dilation):
    """MegaFusion's dilation: the four 3x3 convolutions of the mid block's two residual blocks."""
    for resnet in (unet.mid_block.resnets[0], unet.mid_block.resnets[1]):
        for conv in (resnet.conv1, resnet.conv2):
            conv.dilation = (dilation, dilation)
            conv.padding = (dilation, dilation)


def text_values(model, tensors):
    cases = []
    for i, prompt in enumerate(TEXT_PROMPTS):
        ids = tokenize(model, prompt)
        out = model.text(torch.tensor([ids]), output_hidden_states=True)
        tensors |= {
            f"text{i}.input_ids": torch.tensor([ids]),
            f"text{i}.last_hidden_state": out.last_hidden_state,
            f"text{i}.penultimate": out.hidden_states[-2],
            f"text{i}.pooled": out.pooler_output,
            f"text{i}.prompt_embeds": out.last_hidden_state.clone(),
        }
        cases.append({"name": f"text{i}", "prompt": prompt})
    return cases


def unet_values(model, tensors):
    cross = model.unet.config.cross_attention_dim
    length = model.tokenizer.model_max_length
    # name, batch, height, width, timesteps, mid dilation, context length
    table = [
        ("square", 1, 8, 8, [501.0], 1, length),
        ("odd", 1, 9, 13, [981.0], 1, length),
        ("batch", 2, 8, 12, [1.0, 1.0], 1, length),
        ("timesteps", 3, 4, 6, [999.0, 0.0, 333.25], 1, 5),
        ("dilated", 1, 12, 10, [181.0], 2, length),
        ("dilated-odd", 2, 13, 9, [21.0, 21.0], 2, length),
    ]
    cases = []
    for i, (name, n, h, w, t, dilation, context) in enumerate(table):
        sample = normal(1000 + i, n, 4, h, w)
        timestep = torch.tensor(t)
        embeds = normal(2000 + i, n, context, cross)
        set_mid_dilation(model.unet, dilation)
        out = model.unet(sample.double(), timestep, encoder_hidden_states=embeds.double()).sample
        set_mid_dilation(model.unet, 1)
        key = f"unet-{name}"
        tensors |= {f"{key}.sample": sample, f"{key}.timestep": timestep, f"{key}.prompt_embeds": embeds,
                    f"{key}.out": out}
        cases.append({"name": key, "dilation": dilation})
    return cases


def vae_values(model, tensors):
    f = model.vae_factor
    cases = {"encode": [], "decode": []}
    for i, (name, n, h, w) in enumerate([("square", 1, 24, 24), ("batch", 2, 16, 24), ("odd", 1, 9 * f, 5 * f)]):
        image = normal(3000 + i, n, 3, h, w).mul(0.5).clamp(-1, 1)
        latent = model.vae.encode(image.double()).latent_dist
        tensors |= {f"encode-{name}.image": image, f"encode-{name}.mean": latent.mean,
                    f"encode-{name}.logvar": latent.logvar}
        cases["encode"].append({"name": f"encode-{name}"})
    for i, (name, n, h, w) in enumerate([("square", 1, 4, 4), ("batch", 2, 3, 4), ("odd", 1, 5, 3), ("one", 1, 1, 1)]):
        latent = normal(4000 + i, n, 4, h, w) * 2
        tensors |= {f"decode-{name}.latent": latent, f"decode-{name}.decoded": model.vae.decode(latent.double()).sample}
        cases["decode"].append({"name": f"decode-{name}"})
    return cases


def half_errors(single, tensors, cases):
    """Adds to every case how far torch itself is off in f16 and bf16: the largest error of an element of the output
    named, relative to max(|want|, rms). What a test may allow the product follows from it."""
    for dtype, torch_dtype in [("f16", torch.float16), ("bf16", torch.bfloat16)]:
        text, unet, vae = (copy.deepcopy(m).to(torch_dtype) for m in (single.text, single.unet, single.vae))

        def note(case, output, got):
            want = tensors[f"{case['name']}.{output}"]
            case.setdefault("torch_error", {})[dtype] = float(f"{relative(got, want):.1e}")

        for case in cases["text"]:
            ids = tensors[f"{case['name']}.input_ids"]
            note(case, "last_hidden_state", text(ids).last_hidden_state)
        for case in cases["unet"]:
            name = case["name"]
            sample, embeds = (tensors[f"{name}.{k}"].to(torch_dtype) for k in ("sample", "prompt_embeds"))
            set_mid_dilation(unet, case["dilation"])
            note(case, "out", unet(sample, tensors[f"{name}.timestep"], encoder_hidden_states=embeds).sample)
        for case in cases["vae_encode"]:
            image = tensors[f"{case['name']}.image"].to(torch_dtype)
            note(case, "mean", vae.encode(image).latent_dist.mean)
        for case in cases["vae_decode"]:
            note(case, "decoded", vae.decode(tensors[f"{case['name']}.latent"].to(torch_dtype)).sample)


def relative(got, want):
    """The largest error of an element, relative to max(|want|, rms)."""
    got, want = got.double(), want.double()
    return ((got - want).abs() / want.abs().clamp_min(want.square().mean().sqrt()).clamp_min(1e-30)).max().item()


def write(single, model):
    """`oracle.safetensors` (tensors `<case>.<name>`) and `oracle.json` (the cases) in the model's directory.

    `model`: `single` in f64, so that the stored f32 values are the true ones to rounding.
    """
    tensors = {}
    with torch.no_grad():
        cases = {"covers": model.spec["covers"], "text": text_values(model, tensors), "unet": unet_values(model, tensors)}
        vae = vae_values(model, tensors)
        cases |= {"vae_encode": vae["encode"], "vae_decode": vae["decode"]}
        half_errors(single, tensors, cases)
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name
    cases["vae_factor"] = model.vae_factor
    cases["vae_scaling_factor"] = model.vae.config.scaling_factor
    cases["tokens"] = {
        "max_length": model.tokenizer.model_max_length,
        "prompts": [{"prompt": p, "ids": tokenize(model, p)} for p in small_tokenizer.PROMPTS],
    }
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, model.folder / "oracle.safetensors")
    # One line a case, so that a change of one expected value is one line of a diff.
    lines = json.dumps(cases, indent=1, ensure_ascii=False)
    (model.folder / "oracle.json").write_text(compact(lines), encoding="utf-8")


def compact(text):
    """Puts lists of numbers on one line."""
    import re

    return re.sub(r"\[\s+((?:-?[\d.e+-]+,\s+)*-?[\d.e+-]+)\s+\]",
                  lambda m: "[" + re.sub(r"\s+", " ", m.group(1)) + "]", text) + "\n"
