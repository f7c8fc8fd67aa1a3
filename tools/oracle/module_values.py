"""Expected values of the modules of one model directory: text encoder(s), UNet, VAE; and the token ids."""

import copy
import json

import torch
from safetensors.torch import save_file

import small_tokenizer

TEXT_PROMPTS = ["", "a photo of a cat", "The QUICK brown fox, jumps over — the lazy dog! 😀 " * 6]


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def tokenize(tokenizer, prompt):
    """As the Stable Diffusion pipelines do: padded and cut to the tokenizer's length."""
    return tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids


def encode_prompt(model, prompt):
    """(prompt_embeds [1, L, C], pooled_prompt_embeds [1, P] or None for models other than SDXL)

    SD: the last hidden state, after the final norm. SDXL: both encoders' last but one, before it, side by side; the second's
    projected state at the end of the text.
    """
    ids = torch.tensor([tokenize(model.tokenizer, prompt)])
    if model.text_2 is None:
        return model.text(ids).last_hidden_state, None
    first = model.text(ids, output_hidden_states=True).hidden_states[-2]
    second = model.text_2(torch.tensor([tokenize(model.tokenizer_2, prompt)]), output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def set_mid_dilation(unet, dilation):
    """MegaFusion's dilation: the four 3x3 convolutions of the mid block's two residual blocks."""
    for resnet in (unet.mid_block.resnets[0], unet.mid_block.resnets[1]):
        for conv in (resnet.conv1, resnet.conv2):
            conv.dilation = (dilation, dilation)
            conv.padding = (dilation, dilation)


def text_values(model, tensors):
    cases = []
    for i, prompt in enumerate(TEXT_PROMPTS):
        ids = tokenize(model.tokenizer, prompt)
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


def sdxl_text_values(model, tensors, prompts=TEXT_PROMPTS):
    """`clip1.*`: of tokenizer and text_encoder; `clip2.*`: of tokenizer_2 and text_encoder_2."""
    cases = []
    for i, prompt in enumerate(prompts):
        for clip, tokenizer, text in [("clip1", model.tokenizer, model.text), ("clip2", model.tokenizer_2, model.text_2)]:
            ids = torch.tensor([tokenize(tokenizer, prompt)])
            out = text(ids, output_hidden_states=True)
            tensors |= {
                f"text{i}.{clip}.input_ids": ids,
                f"text{i}.{clip}.last_hidden_state": out.last_hidden_state,
                f"text{i}.{clip}.penultimate": out.hidden_states[-2],
            }
        embeds, pooled = encode_prompt(model, prompt)
        tensors |= {f"text{i}.prompt_embeds": embeds, f"text{i}.pooled_prompt_embeds": pooled}
        cases.append({"name": f"text{i}", "prompt": prompt})
    return cases


# Size ids: (original height, width, crop top, left, target height, width), a row each.
TIME_IDS = [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0], [768.0, 512.0, 64.0, 8.0, 1000.0, 896.0],
            [24.0, 16.0, 0.0, 3.0, 32.0, 40.0]]


def added(model, i, n):
    """What SDXL's UNet takes beside the prompt: seeded pooled embeddings [n, P] and size ids [n, 6]; {} for others."""
    if model.text_2 is None:
        return {}
    rows = [TIME_IDS[(i + row) % len(TIME_IDS)] for row in range(n)]
    return {"pooled_prompt_embeds": normal(2500 + i, n, model.text_2.config.projection_dim), "time_ids": torch.tensor(rows)}


def run_unet(unet, sample, timestep, prompt_embeds, pooled_prompt_embeds=None, time_ids=None, timestep_cond=None):
    """The ids stay f32 whatever the UNet computes in: f16 and bf16 do not hold them all."""
    more = {}
    if time_ids is not None:
        more = {"added_cond_kwargs": {"text_embeds": pooled_prompt_embeds.to(unet.dtype), "time_ids": time_ids}}
    if timestep_cond is not None:
        more["timestep_cond"] = timestep_cond.to(unet.dtype)
    return unet(sample.to(unet.dtype), timestep, encoder_hidden_states=prompt_embeds.to(unet.dtype), **more).sample


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
        inputs = {"sample": normal(1000 + i, n, 4, h, w), "timestep": torch.tensor(t),
                  "prompt_embeds": normal(2000 + i, n, context, cross), **added(model, i, n)}
        set_mid_dilation(model.unet, dilation)
        out = run_unet(model.unet, **inputs)
        set_mid_dilation(model.unet, 1)
        key = f"unet-{name}"
        tensors |= {f"{key}.{k}": v for k, v in inputs.items()} | {f"{key}.out": out}
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


def low_errors(single, tensors, cases):
    """Adds to every case how far torch itself is off in f16 and bf16: the largest error of an element of the output
    named, relative to max(|want|, rms). What a test may allow the product follows from it. SDXL: in f32, too."""
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16}
    if single.text_2 is not None:
        dtypes = {"f32": torch.float32} | dtypes
    for dtype, torch_dtype in dtypes.items():
        low = copy.copy(single)
        for name in single.modules():
            setattr(low, name, copy.deepcopy(getattr(single, name)).to(torch_dtype))

        def note(case, output, got):
            want = tensors[f"{case['name']}.{output}"]
            case.setdefault("torch_error", {})[dtype] = float(f"{relative(got, want):.1e}")

        for case in cases["text"]:
            if low.text_2 is None:
                ids = tensors[f"{case['name']}.input_ids"]
                note(case, "last_hidden_state", low.text(ids).last_hidden_state)
            else:
                note(case, "prompt_embeds", encode_prompt(low, case["prompt"])[0])
        for case in cases["unet"]:
            names = ("sample", "timestep", "prompt_embeds", "pooled_prompt_embeds", "time_ids")
            inputs = {k: tensors[key] for k in names if (key := f"{case['name']}.{k}") in tensors}
            set_mid_dilation(low.unet, case["dilation"])
            note(case, "out", run_unet(low.unet, **inputs))
        for case in cases["vae_encode"]:
            image = tensors[f"{case['name']}.image"].to(torch_dtype)
            note(case, "mean", low.vae.encode(image).latent_dist.mean)
        for case in cases["vae_decode"]:
            note(case, "decoded", low.vae.decode(tensors[f"{case['name']}.latent"].to(torch_dtype)).sample)
    for case in (case for kind in ("text", "unet", "vae_encode", "vae_decode") for case in cases[kind]):
        # A test of f32 allows 2e-5.
        assert case["torch_error"].get("f32", 0.0) < 1e-5, (single.name, case)


def relative(got, want):
    """The largest error of an element, relative to max(|want|, rms)."""
    got, want = got.double(), want.double()
    return ((got - want).abs() / want.abs().clamp_min(want.square().mean().sqrt()).clamp_min(1e-30)).max().item()


def write(single, model):
    """`oracle.safetensors` (tensors `<case>.<name>`) and `oracle.json` (the cases) in the model's directory.

    `model`: `single` in f64, so that the stored f32 values are the true ones to rounding.
    """
    tensors = {}
    text = text_values if model.text_2 is None else sdxl_text_values
    with torch.no_grad():
        cases = {"covers": model.spec["covers"], "text": text(model, tensors), "unet": unet_values(model, tensors)}
        vae = vae_values(model, tensors)
        cases |= {"vae_encode": vae["encode"], "vae_decode": vae["decode"]}
        low_errors(single, tensors, cases)
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name
    cases["vae_factor"] = model.vae_factor
    cases["vae_scaling_factor"] = model.vae.config.scaling_factor
    for key, tokenizer in [("tokens", model.tokenizer), ("tokens_2", model.tokenizer_2)]:
        if tokenizer is not None:
            cases[key] = {
                "max_length": tokenizer.model_max_length,
                "prompts": [{"prompt": p, "ids": tokenize(tokenizer, p)} for p in small_tokenizer.PROMPTS],
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
