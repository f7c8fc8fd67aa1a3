"""What published single files and LoRAs hold beyond the small models: keys and shapes at full size, 8-bit floats, SDXL.

- manifest/ldm-NAME.txt.gz: key and shape of every tensor of a published single file. The LDM names are found by asking
  diffusers: its own conversions, run on the meta device, must give every key and shape of the published classes back.
- single-file/fp8.safetensors: all 256 codes of both 8-bit floats, and scaled weights of sd15 and sd21, with torch's values.
- single-file/lora-sdxl*.safetensors, lora-several*.safetensors: a LoRA for both text encoders and the UNet under its LDM
  names; three adapters at once, in their order; with PyTorch's merged weights.

    tools/oracle/venv tools/oracle/published.py [--check]
"""

import gzip
import pathlib
import sys
import tempfile
import types

import torch
from safetensors.torch import load_file, save_file

import drawn
import manifest
import mmdit
import single_file
import t5
from single_file import DATA, openclip, published, unet_name, vae_name, weights

OUT = DATA / "single-file"
TEXT_G = manifest.TEXT | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
}



def meta(config):
    if config.get("architectures") == ["CLIPTextModelWithProjection"]:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        with torch.device("meta"):
            model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    else:
        model = manifest.build(config)
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def same(a, b, what):
    shapes = lambda state: {k.removeprefix("text_model."): tuple(v.shape) for k, v in state.items()}
    assert shapes(a) == shapes(b), what


def ldm(name, unet, vae, text, text_2=None):
    """Every tensor of the single file, on the meta device."""
    file = {}
    parts = {"unet": meta(unet), "vae": meta(vae), "text": meta(text)}
    of_unet = {"model.diffusion_model." + unet_name(k, parts["unet"], unet["layers_per_block"]): v
               for k, v in parts["unet"].items()}
    of_vae = {"first_stage_model." + vae_name(k, 4): v for k, v in parts["vae"].items()}
    of_vae = {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in of_vae.items()}
    config = {"class_embed_type": None, "addition_embed_type": None, **unet}
    same(published.convert_ldm_unet_checkpoint(dict(of_unet), config), parts["unet"], name)
    same(published.convert_ldm_vae_checkpoint(dict(of_vae), vae), parts["vae"], name)
    file |= of_unet | of_vae

    def of_openclip(state, prefix, further):
        held = {prefix + k: v for k, v in openclip(state, further).items()}
        wide = next(v.shape[1] for k, v in state.items() if k.endswith("token_embedding.weight"))
        model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=wide))
        back = published.convert_open_clip_checkpoint(model, dict(held), prefix=prefix)
        back = {k.removeprefix("text_model."): v for k, v in back.items() if k not in ("text_projection", "logit_scale")}
        same({k: v for k, v in back.items() if k in {m.removeprefix("text_model.") for m in state}}, state, name)
        return held

    if name == "sd21":
        file |= of_openclip(parts["text"], "cond_stage_model.model.", 1)
    else:
        at = "conditioner.embedders.0.transformer." if text_2 else "cond_stage_model.transformer."
        held = {at + "text_model." + k.removeprefix("text_model."): v for k, v in parts["text"].items()}
        same(published.convert_ldm_clip_checkpoint(dict(held)), parts["text"], name)
        file |= held
    if text_2:
        file |= of_openclip(meta(text_2), "conditioner.embedders.1.model.", 0)
    return "".join(f"{k} {'x'.join(map(str, v.shape))}\n" for k, v in sorted(file.items()))


def sd3(name, config):
    """The same of a Stable Diffusion 3: its transformer under the first names, text encoders under those of transformers."""
    from diffusers import SD3Transformer2DModel
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**config)
        encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **t5.PUBLISHED))
    config = transformer.config  # with the defaults of its class
    width, heads, text = config["caption_projection_dim"], config["attention_head_dim"], config["joint_attention_dim"]
    empty = lambda *shape: torch.empty(shape, device="meta")
    file = {}

    def linear(at, out, into):
        file[f"{at}.weight"], file[f"{at}.bias"] = empty(out, into), empty(out)

    file["pos_embed"] = empty(1, config["pos_embed_max_size"] ** 2, width)
    file["x_embedder.proj.weight"], file["x_embedder.proj.bias"] = empty(width, config["in_channels"], 2, 2), empty(width)
    linear("context_embedder", width, text)
    for embedder, into in ("t_embedder", 256), ("y_embedder", config["pooled_projection_dim"]):
        linear(f"{embedder}.mlp.0", width, into)
        linear(f"{embedder}.mlp.2", width, width)
    last = config["num_layers"] - 1
    for i in range(config["num_layers"]):
        for stream in "x_block", "context_block":
            at, ends = f"joint_blocks.{i}.{stream}", stream == "context_block" and i == last
            dual = stream == "x_block" and i in config["dual_attention_layers"]
            linear(f"{at}.adaLN_modulation.1", (9 if dual else 2 if ends else 6) * width, width)
            for attention in ("attn", "attn2") if dual else ("attn",):
                linear(f"{at}.{attention}.qkv", 3 * width, width)
                if config["qk_norm"]:
                    file |= {f"{at}.{attention}.ln_{x}.weight": empty(heads) for x in "qk"}
                if not ends:
                    linear(f"{at}.{attention}.proj", width, width)
            if not ends:
                linear(f"{at}.mlp.fc1", 4 * width, width)
                linear(f"{at}.mlp.fc2", width, 4 * width)
    linear("final_layer.linear", 4 * config["out_channels"], width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    same(published.convert_sd3_transformer_checkpoint_to_diffusers(dict(file)), transformer.state_dict(), name)

    file = {f"model.diffusion_model.{k}": v for k, v in file.items()}
    vae = meta(manifest.VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False})
    of_vae = {"first_stage_model." + vae_name(k, 4): v for k, v in vae.items()}
    file |= {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in of_vae.items()}
    clip = {k: v for k, v in meta(manifest.TEXT).items()}
    file |= {f"text_encoders.clip_l.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in clip.items()}
    file |= {f"text_encoders.clip_g.transformer.{k}": v for k, v in meta(TEXT_G).items()}
    state = drawn.Described(encoder.state_dict()).state_dict()
    file |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in state.items()}
    return "".join(f"{k} {'x'.join(map(str, v.shape))}\n" for k, v in sorted(file.items()))


def scaled(weight, dtype, rows):
    """`weight` in 8 bits, its scale, and the values that the two stand for."""
    largest = weight.abs().reshape(weight.shape[0], -1).amax(1) if rows else weight.abs().amax()
    scale = (largest / torch.finfo(dtype).max).clamp(min=1e-12).float()
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1)) if rows else scale
    code = (weight / shaped).to(dtype)
    return code, scale, code.float() * shaped


def fp8(path):
    out = {}
    for name, dtype in [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)
        out[f"codes.{name}"], out[f"values.{name}"] = codes, codes.float()
    for model, dtype, keys in [
        ("sd15", torch.float8_e4m3fn, [
            ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", False),
            ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", False),
            ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2.weight", True),
        ]),
        ("sd21", torch.float8_e5m2, [
            ("cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight", True),
            ("cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.weight", False),
        ]),
    ]:
        file = load_file(OUT / f"{model}.safetensors")
        for key, rows in keys:
            code, scale, value = scaled(file[key].float(), dtype, rows)
            module = key.removesuffix(".weight")
            out |= {f"{model}/{key}": code, f"{model}/{module}.scale_weight": scale, f"{model}.values/{key}": value}
    save_file({k: v.contiguous() for k, v in out.items()}, path)


def sdxl_lora():
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.3
    lora, merged = {}, {}

    def change(part, state, module, flat, rank, alpha):
        w = state[f"{module}.weight"].double()
        kernel = w.shape[2:]
        down, up = draw(rank, w.shape[1], *kernel), draw(w.shape[0], rank, *[1] * len(kernel))
        lora[f"{flat}.lora_down.weight"], lora[f"{flat}.lora_up.weight"] = down, up
        if alpha is not None:
            lora[f"{flat}.alpha"] = torch.tensor(float(alpha))
        factor = (rank if alpha is None else alpha) / rank
        delta = up.double().flatten(1) @ down.double().flatten(1)
        merged[f"{part}/{module}.weight"] = w + factor * delta.reshape(w.shape)

    folder = DATA / "sdxl"
    for part, flat in [("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")]:
        state = {k.removeprefix("text_model."): v for k, v in weights(folder / part, "model").items()}
        for module, alpha in [("encoder.layers.0.self_attn.v_proj", 1), ("encoder.layers.1.mlp.fc1", None)]:
            change(part, state, module, f"{flat}_text_model_{module.replace('.', '_')}", 2, alpha)
    unet = weights(folder / "unet", "diffusion_pytorch_model")
    held = [k.removesuffix(".weight") for k in unet if k.endswith(".weight")]
    kinds = ["attn2.to_k", "attn1.to_out.0", "proj_in", "ff.net.0.proj", "resnets.0.conv2", "conv_shortcut",
             "upsamplers.0.conv", "downsamplers.0.conv", "time_embedding.linear_1"]
    for i, kind in enumerate(kinds):
        module = [k for k in held if k.endswith(kind)][-1]
        name = unet_name(f"{module}.weight", unet, 2).removesuffix(".weight")
        change("unet", unet, module, "lora_unet_" + name.replace(".", "_"), 3, i or None)
    return lora, merged


def several():
    """Two adapters of single_file.py and a third one over the same tensors, in this order and with these weights."""
    unet = weights(DATA / "sd15/unet", "diffusion_pytorch_model")
    at = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    flat = "lora_unet_" + at.replace(".", "_")
    kohya, relatives = (load_file(OUT / f"lora-{name}.safetensors") for name in ["kohya", "relatives"])
    generator = torch.Generator().manual_seed(6)
    third = {}
    for leaf in ["to_q", "to_v"]:
        rows, columns = unet[f"{at}.{leaf}.weight"].shape
        third[f"{flat}_{leaf}.lora_down.weight"] = torch.randn(2, columns, generator=generator) * 0.3
        third[f"{flat}_{leaf}.lora_up.weight"] = torch.randn(rows, 2, generator=generator) * 0.3
        third[f"{flat}_{leaf}.alpha"] = torch.tensor(1.0)
    delta = lambda file, name: (
        float(file.get(f"{name}.alpha", len(file[f"{name}.lora_down.weight"]))) / len(file[f"{name}.lora_down.weight"])
        * file[f"{name}.lora_up.weight"].double() @ file[f"{name}.lora_down.weight"].double())
    merged = {}
    w = unet[f"{at}.to_q.weight"].double()
    merged[f"unet/{at}.to_q.weight"] = w + 0.7 * delta(kohya, f"{flat}_to_q") - 0.4 * delta(third, f"{flat}_to_q")
    # DoRA in the middle: what comes before it is normed with the weight, what comes after is added.
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_v"
    norms = relatives[f"{name}.dora_scale"].double()
    dora = lambda w: (w + delta(relatives, name)) * norms / (w + delta(relatives, name)).norm(dim=1, keepdim=True)
    w = unet[f"{at}.to_v.weight"].double()
    half = w + 0.5 * (dora(w) - w)
    merged[f"unet/{at}.to_v.weight"] = half - 0.4 * delta(third, f"{flat}_to_v")
    before = w - 0.4 * delta(third, f"{flat}_to_v")
    merged[f"other order/{at}.to_v.weight"] = before + 0.5 * (dora(before) - before)
    return third, merged


def main():
    check, changed = "--check" in sys.argv[1:], []
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        fp8(place / "fp8.safetensors")
        for name, (lora, merged) in [("sdxl", sdxl_lora()), ("several", several())]:
            for suffix, state in [("", lora), ("-merged", merged)]:
                state = {k: v.float().contiguous() for k, v in state.items()}
                save_file(state, place / f"lora-{name}{suffix}.safetensors")
        for path in sorted(place.iterdir()):
            target = OUT / path.name
            if check and (not target.exists() or target.read_bytes() != path.read_bytes()):
                changed.append(path.name)
            elif not check:
                target.write_bytes(path.read_bytes())
    config, lists = {name: config for name, (config, _) in manifest.MODELS.items()}, {}
    for name, text, second in [("sd15", "sd15-text", None), ("sd21", "sd21-text", None), ("sdxl", "sd15-text", TEXT_G)]:
        lists[name] = ldm(name, config[f"{name}-unet"], config["sd15-vae"], config[text], second)
    for name in "sd3", "sd35":
        lists[name] = sd3(name, mmdit.PUBLISHED[f"{name}-medium"])
    for name, text in lists.items():
        target = manifest.ROOT / f"ldm-{name}.txt.gz"
        if check and (not target.exists() or gzip.decompress(target.read_bytes()).decode() != text):
            changed.append(target.name)
        elif not check:
            target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    if changed:
        sys.exit(f"differ: {', '.join(changed)}")


if __name__ == "__main__":
    main()
