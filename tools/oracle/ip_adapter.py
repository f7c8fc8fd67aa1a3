"""IP-Adapter (Ye et al. 2023, arXiv:2308.06721): small random image encoders and adapters, and runs with them.

    ip_adapter.py [OUT]      tests/data/ip-adapter, or elsewhere

The values are those of transformers' CLIPVisionModelWithProjection and of diffusers' own conversion of adapter files, projections
and attention processors, in f64 from the stored weights.

    NAME/                config.json of an encoder, its weights (drawn.py), preprocessor_config.json of one
    NAME.drawn.json      an adapter in the form of the published .safetensors; sd15-base.bin as torch.save writes it
    modules.safetensors  NAME.pixels [N, 3, S, S], NAME.embeds, NAME.penultimate of encoders; NAME.tokens [N, tokens, D] of adapters,
                         from the encoder's outputs, the last row that of no picture; prepared.PICTURE.NAME [3, S, S] as transformers'
                         CLIPImageProcessor over PIL makes them
    RUN.safetensors      the latents of each step, and those that are decoded;  runs.json: model, adapters, pictures, masks, command line, how far f32 is off
"""

import json
import pathlib
import sys

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import drawn
import reference
import small_models
from module_values import relative

ROOT = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
PICTURES = ROOT / "pictures-in"

ENCODERS = {
    # Name: configuration, keys of preprocessor_config.json, do keys begin with "vision_model."?
    "quick": ({"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 14,
               "patch_size": 7, "projection_dim": 20, "hidden_act": "quick_gelu"}, None, True),
    # Patches that leave pixels over, heads of 10 channels.
    "odd": ({"hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 23,
             "patch_size": 5, "projection_dim": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-4}, None, True),
    "one-layer": ({"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
                   "image_size": 12, "patch_size": 4, "projection_dim": 18, "hidden_act": "gelu"},
                  {"size": {"shortest_edge": 15}, "crop_size": {"height": 12, "width": 12}, "resample": 3,
                   "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.5, 0.75]}, False),
}
ADAPTERS = {
    # Name: model, encoder, tokens, width and heads of the perceiver (None: base).
    "sd15-base": ("sd15", "quick", 4, None),
    "sd15-plus": ("sd15", "quick", 5, (28, 1)),
    "wide-base": ("wide", "odd", 4, None),
    "sdxl-base": ("sdxl", "odd", 4, None),
    "sdxl-plus": ("sdxl", "one-layer", 3, (36, 2)),
}
PERCEIVER_LAYERS = 4  # what diffusers builds

# Name: model; (adapter, scale, [(picture, mask)]) each; the settings that are not the defaults.
RUNS = {
    "plain-base": ("sd15", [("sd15-base", 0.7, [("photo", None)])],
                   {"method": "plain", "size": (20, 16), "steps": 2, "guidance": 2.0, "seed": 501, "scheduler": "ddim"}),
    "plain-plus-two-pictures": ("sd15", [("sd15-plus", 1.0, [("photo", None), ("tall", None)])],
                                {"method": "plain", "size": (16, 16), "steps": 2, "guidance": 2.0, "seed": 502,
                                 "scheduler": "ddim"}),
    "unguided-wide": ("wide", [("wide-base", 0.9, [("tall", None)])],
                      {"method": "plain", "size": (16, 20), "steps": 2, "guidance": 1.0, "seed": 503, "scheduler": "ddim"}),
    "mega-plus": ("sd15", [("sd15-plus", 0.6, [("tall", None)])],
                  {"method": "megafusion++", "stages": (((16, 16), 2), ((24, 32), 2)), "guidance": 2.0, "seed": 504}),
    "two-adapters": ("sd15", [("sd15-base", 0.5, [("photo", None)]), ("sd15-plus", 0.8, [("tall", None)])],
                     {"method": "plain", "size": (16, 16), "steps": 2, "guidance": 2.0, "seed": 505, "scheduler": "euler"}),
    "plain-sdxl": ("sdxl", [("sdxl-base", 1.0, [("photo", None)])],
                  {"method": "plain", "size": (16, 20), "steps": 2, "guidance": 2.0, "seed": 506, "scheduler": "euler"}),
    "sdxl-mega-plus": ("sdxl", [("sdxl-plus", 0.8, [("photo", None)])],
                       {"method": "megafusion", "stages": (((16, 16), 2), ((32, 24), 2)), "guidance": 2.0, "seed": 507}),
    "hidiffusion": ("sdxl", [("sdxl-plus", 0.7, [("photo", None)])],
                    {"method": "hidiffusion", "size": (64, 64), "steps": 2, "guidance": 2.0, "seed": 508, "scheduler": "ddim"}),
    "demofusion": ("sdxl", [("sdxl-base", 0.7, [("photo", None)])],
                   {"method": "demofusion", "size": (64, 64), "steps": 2, "guidance": 2.0, "seed": 509, "scheduler": "ddim"}),
    "mask": ("sd15", [("sd15-base", 1.0, [("photo", "mask")])],
             {"method": "plain", "size": (16, 24), "steps": 2, "guidance": 2.0, "seed": 510, "scheduler": "ddim"}),
    "two-masks": ("sd15", [("sd15-plus", 0.8, [("photo", "mask"), ("tall", "photo")])],
                  {"method": "plain", "size": (16, 16), "steps": 2, "guidance": 2.0, "seed": 511, "scheduler": "ddim"}),
    "sdxl-mega-mask-and-without": (
        "sdxl", [("sdxl-base", 0.6, [("photo", "mask")]), ("sdxl-base", 0.8, [("tall", None)])],
        {"method": "megafusion", "stages": (((16, 16), 2), ((32, 32), 2)), "guidance": 2.0, "seed": 512}),
}


def picture(name):
    return Image.open(PICTURES / f"{name}.png").convert("RGB")


def encoder(out, name, seed):
    config, preprocessor, prefixed = ENCODERS[name]
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config, attn_implementation="sdpa"))
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    base = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}
    small_models.write_json(folder / "config.json", base | config)
    if preprocessor:
        small_models.write_json(folder / "preprocessor_config.json", preprocessor)
    own = lambda key: key if prefixed else key.removeprefix("vision_model.")
    state = {}
    for key, tensor in model.state_dict().items():
        assert key.startswith(("vision_model.", "visual_projection.")), key
        state[own(key)] = small_models.draw(seed, f"vision.{own(key)}", tensor)
    drawn.write(folder, "model", drawn.Described(state), seed, "vision")
    model.load_state_dict({key: state[own(key)] for key in model.state_dict()})
    return model.eval().requires_grad_(False)


def processor(name):
    config, preprocessor, _ = ENCODERS[name]
    side = config["image_size"]
    return CLIPImageProcessorPil(**(preprocessor or {"size": side, "crop_size": side}))


def pixels(name, pictures):
    return processor(name)(pictures, return_tensors="pt").pixel_values


def adapter(out, name, seed):
    """Writes the file; returns it as diffusers reads it."""
    of, encoder_name, tokens, perceiver = ADAPTERS[name]
    unet, vision = small_models.MODELS[of]["unet"], ENCODERS[encoder_name][0]
    cross = unet["cross_attention_dim"]
    shapes = {}
    if perceiver is None:
        embed = vision["projection_dim"]
        shapes |= {"proj.weight": (tokens * cross, embed), "proj.bias": (tokens * cross,), "norm.weight": (cross,),
                   "norm.bias": (cross,)}
    else:
        (dim, heads), embed = perceiver, vision["hidden_size"]
        norm = lambda key, width: {f"{key}.weight": (width,), f"{key}.bias": (width,)}
        linear = lambda key, to, width: {f"{key}.weight": (to, width), f"{key}.bias": (to,)}
        shapes |= {"latents": (1, tokens, dim)} | linear("proj_in", dim, embed)
        shapes |= linear("proj_out", cross, dim) | norm("norm_out", cross)
        for i in range(PERCEIVER_LAYERS):
            shapes |= norm(f"layers.{i}.0.norm1", dim) | norm(f"layers.{i}.0.norm2", dim) | norm(f"layers.{i}.1.0", dim)
            shapes |= {f"layers.{i}.0.to_q.weight": (heads * 64, dim), f"layers.{i}.0.to_kv.weight": (2 * heads * 64, dim),
                       f"layers.{i}.0.to_out.weight": (dim, heads * 64), f"layers.{i}.1.1.weight": (4 * dim, dim),
                       f"layers.{i}.1.3.weight": (dim, 4 * dim)}
    from diffusers import UNet2DConditionModel

    channels = [a.to_q.weight.shape[0] for a in attentions(UNet2DConditionModel(**unet))]
    kv = {f"{2 * i + 1}.to_{x}_ip.weight": (c, cross) for i, c in enumerate(channels) for x in "kv"}
    state = {f"image_proj.{key}": shape for key, shape in shapes.items()}
    state |= {f"ip_adapter.{key}": shape for key, shape in kv.items()}
    state = {key: small_models.draw(seed, f"ip.{key}", torch.empty(shape)) for key, shape in state.items()}
    nested = {part: {key.removeprefix(part + "."): tensor for key, tensor in state.items() if key.startswith(part)}
              for part in ("image_proj", "ip_adapter")}
    if name == "sd15-base":
        torch.save(nested, out / f"{name}.bin")
    else:
        drawn.write(out, name, drawn.Described(state), seed, "ip")
    return nested


def attentions(unet):
    """Cross-attentions in the order of diffusers' processors, by which files number them."""
    return [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if ".attn2." in name]


def embeds(model, pixel_values, plus):
    """Of the pictures, and the row of none."""
    if plus:
        all_of = torch.cat([pixel_values, torch.zeros_like(pixel_values[:1])])
        return model(all_of, output_hidden_states=True).hidden_states[-2]
    projected = model(pixel_values).image_embeds
    return torch.cat([projected, torch.zeros_like(projected[:1])])


def shown(unet, adapters, states, encoders, factor):
    """Gives the UNet the adapters of a run: every later call sees their pictures."""
    unet._load_ip_adapter_weights([states[name] for name, _, _ in adapters], low_cpu_mem_usage=False)
    unet.to(unet.dtype)
    for name, processor_ in unet.attn_processors.items():
        if ".attn2." in name:
            processor_.to(unet.dtype).scale = [scale for _, scale, _ in adapters]
    rows = []
    for name, _, images in adapters:
        _, encoder_name, _, perceiver = ADAPTERS[name]
        values = pixels(encoder_name, [picture(image) for image, _ in images]).to(unet.dtype)
        rows.append(embeds(encoders[encoder_name].to(unet.dtype), values, perceiver is not None))
    masked = any(mask for _, _, images in adapters for _, mask in images)

    def before(_, args, kwargs):
        sample = args[0]
        batch = []
        for all_of in rows:
            conditional, none = all_of[None, :-1], all_of[-1:].expand(len(all_of) - 1, *all_of.shape[1:])[None]
            assert len(sample) in (1, 2)
            batch.append(torch.cat([none, conditional]) if len(sample) == 2 else conditional)
        kwargs["added_cond_kwargs"] = (kwargs.get("added_cond_kwargs") or {}) | {"image_embeds": batch}
        if masked:
            height, width = (side * factor for side in sample.shape[2:])
            masks = []
            for _, _, images in adapters:
                files = [picture(mask).convert("L") if mask else None for _, mask in images]
                one = lambda file: torch.ones(1, 1, height, width) if file is None else IPAdapterMaskProcessor().preprocess(
                    file, height=height, width=width)
                masks.append(torch.cat([one(file) for file in files]).reshape(1, len(files), height, width))
            kwargs["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
        return args, kwargs

    unet.register_forward_pre_hook(before, with_kwargs=True)


@torch.no_grad()
def main():
    torch.set_num_threads(2)
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "ip-adapter"
    out.mkdir(parents=True, exist_ok=True)
    encoders = {name: encoder(out, name, 510 + i) for i, name in enumerate(ENCODERS)}
    states = {name: adapter(out, name, 520 + i) for i, name in enumerate(ADAPTERS)}

    tensors, outputs = {}, {}
    for name, model in encoders.items():
        values = pixels(name, [picture("photo"), picture("tall")])
        for image in ("photo", "tall", "mask"):
            tensors[f"prepared.{image}.{name}"] = pixels(name, [picture(image)])[0]
        tensors[f"{name}.pixels"] = values
        model = model.double()
        for plus in (False, True):
            outputs[name, plus] = embeds(model, values.double(), plus)
        tensors[f"{name}.embeds"] = outputs[name, False][:-1]
        tensors[f"{name}.penultimate"] = outputs[name, True]
    for name, (of, encoder_name, _, perceiver) in ADAPTERS.items():
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**small_models.MODELS[of]["unet"])
        unet._load_ip_adapter_weights([states[name]], low_cpu_mem_usage=False)
        projection = unet.encoder_hid_proj.image_projection_layers[0].double()
        tensors[f"{name}.tokens"] = projection(outputs[encoder_name, perceiver is not None])
    save_file({key: tensor.float().contiguous() for key, tensor in tensors.items()}, out / "modules.safetensors")

    runs = []
    for name, (of, adapters, changes) in RUNS.items():
        settings = reference.Settings(prompt="a photo of a cat", **changes)
        results = []
        for exact in (False, True):
            model = reference.load(ROOT / of)
            model = reference.double(model) if exact else model
            if exact:
                before = reference.run(model, settings)
            for each in encoders.values():
                each.double() if exact else each.float()
            shown(model.unet, adapters, states, encoders, model.vae_factor)
            results.append(reference.run(model, settings))
        in_f32, want = results
        choices = lambda key: key == "shifts" or key.startswith("jitter")
        kept = {key: tensor for key, tensor in want.items() if key.startswith("step") or key == "latent" or choices(key)}
        if "step1" in kept and settings.method == "plain":
            kept.pop("latent")  # it is the last step's
        changed = (before["latent"] - want["latent"]).abs().max().item()
        error = max(relative(in_f32[key], kept[key]) for key in kept if not choices(key))
        print(f"{name}: {len(kept)} tensors, the pictures change {changed:.2f}, f32 is off by {error:.1e}")
        assert changed > 0.05 and error < 7e-5
        save_file(kept, out / f"{name}.safetensors")
        runs.append({"name": name, "model": of,
                     "adapters": [{"name": adapter, "scale": scale} for adapter, scale, _ in adapters],
                     "images": [image for _, _, images in adapters for image, _ in images],
                     "masks": [mask for _, _, images in adapters for _, mask in images],
                     "args": settings.args({"prompt": None} | changes), "f32_error": float(f"{error:.1e}")})
    (out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
