"""Single-file (LDM) forms of the small models, and LoRAs for sd15, with what diffusers and torch make of them.

The LDM names are found by asking diffusers: its own conversion reads each file back, and the script stops unless that
gives every tensor of the directory form, so a wrong name here cannot pass.

    tools/oracle/venv tools/oracle/single_file.py
"""

import json
import pathlib

import torch
from diffusers.loaders import single_file_utils as published
from safetensors.torch import load_file, save_file

import drawn

DATA = pathlib.Path(__file__).parents[2] / "tests/data"
OUT = DATA / "single-file"
RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
          ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]
TOP = [("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
       ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
       ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2")]


def weights(folder, stem):
    files = sorted(drawn.folder(folder).glob(f"{stem}*.safetensors"))
    return {k: v for f in files for k, v in load_file(f).items()}


def unet_name(key, keys, layers):
    for new, old in TOP:
        if key.startswith(new + "."):
            return old + key[len(new):]
    side, index, *rest = key.split(".")
    if side == "mid_block":
        kind, n = index, int(rest[0])
        block, rest = ("middle_block.1", rest[1:]) if kind == "attentions" else (f"middle_block.{2 * n}", rest[1:])
    else:
        b, kind, n, rest = int(index), rest[0], int(rest[1]), rest[2:]
        per = layers + 1
        if kind == "downsamplers":
            return f"input_blocks.{(b + 1) * per}.0.op.{rest[1]}"
        if kind == "upsamplers":
            sub = 2 if any(k.startswith(f"up_blocks.{b}.attentions.") for k in keys) else 1
            return f"output_blocks.{(b + 1) * per - 1}.{sub}.conv.{rest[1]}"
        i = b * per + n + (side == "down_blocks")
        block = f"{'input' if side == 'down_blocks' else 'output'}_blocks.{i}.{int(kind == 'attentions')}"
    rest = ".".join(rest)
    if kind == "resnets":
        for new, old in RESNET:
            if rest.startswith(new + "."):
                rest = old + rest[len(new):]
                break
    return f"{block}.{rest}"


def vae_name(key, levels):
    for new, old in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")]:
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    for new, old in [("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
                     ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"),
                     ("to_v", "v"), ("to_out.0", "proj_out"), ("conv_shortcut", "nin_shortcut"),
                     ("conv_norm_out", "norm_out"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                     ("resnets", "block"), ("down_blocks", "down")]:
        key = key.replace(new, old)
    if ".up_blocks." in key:
        a, b = key.split(".up_blocks.")
        i, rest = b.split(".", 1)
        key = f"{a}.up.{levels - 1 - int(i)}.{rest}"
    return key


def openclip(state, extra_layer):
    """OpenCLIP's form of a transformers text encoder."""
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    layers = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layers."))
    out = {"token_embedding.weight": state["embeddings.token_embedding.weight"],
           "positional_embedding": state["embeddings.position_embedding.weight"],
           "ln_final.weight": state["final_layer_norm.weight"], "ln_final.bias": state["final_layer_norm.bias"],
           "logit_scale": torch.tensor(4.6)}
    for i in range(layers + extra_layer):
        at = f"encoder.layers.{min(i, layers - 1)}."
        to = f"transformer.resblocks.{i}."
        for kind in ["weight", "bias"]:
            out[f"{to}attn.in_proj_{kind}"] = torch.cat([state[f"{at}self_attn.{n}_proj.{kind}"] for n in "qkv"])
            for new, old in [("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]:
                out[f"{to}{old}.{kind}"] = state[f"{at}{new}.{kind}"]
    if "text_projection.weight" in state:
        out["text_projection"] = state["text_projection.weight"].T.contiguous()
    return out


def write(name):
    folder = DATA / name
    config = {p: json.loads((folder / p / "config.json").read_text()) for p in ["unet", "vae"]}
    unet, vae = (weights(folder / p, "diffusion_pytorch_model") for p in ["unet", "vae"])
    text = weights(folder / "text_encoder", "model")
    sdxl, sd2 = (folder / "text_encoder_2").is_dir(), name.startswith("sd21")
    file = {}
    layers = config["unet"]["layers_per_block"]
    ldm_unet = {"model.diffusion_model." + unet_name(k, unet, layers): v for k, v in unet.items()}
    ldm_vae = {"first_stage_model." + vae_name(k, len(config["vae"]["block_out_channels"])): v for k, v in vae.items()}
    for k, v in ldm_vae.items():
        if ".attn_1." in k and v.ndim == 2:
            ldm_vae[k] = v[:, :, None, None].contiguous()
    back = published.convert_ldm_unet_checkpoint(dict(ldm_unet), {"class_embed_type": None, "addition_embed_type": None, **config["unet"]})
    assert back.keys() == unet.keys() and all(torch.equal(back[k], unet[k]) for k in unet), name
    back = published.convert_ldm_vae_checkpoint(dict(ldm_vae), config["vae"])
    old = {k.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn")
           if "proj_attn" in "".join(vae) else k: v for k, v in back.items()}
    assert old.keys() == vae.keys() and all(torch.equal(old[k], vae[k]) for k in vae), name
    file |= ldm_unet | ldm_vae
    prefixed = {k if k.startswith(("text_model.", "text_projection")) else f"text_model.{k}": v for k, v in text.items()}
    if sd2:
        file |= {"cond_stage_model.model." + k: v for k, v in openclip(text, 1).items()}
    else:
        at = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
        file |= {at + k: v for k, v in prefixed.items()}
    if sdxl:
        second = openclip(weights(folder / "text_encoder_2", "model"), 0)
        file |= {"conditioner.embedders.1.model." + k: v for k, v in second.items()}
    file["alphas_cumprod"] = torch.zeros(3)
    save_file({k: v.contiguous().clone() for k, v in file.items()}, OUT / f"{name}.safetensors", metadata={"format": "pt"})


def loras():
    """One LoRA in three dialects, with PyTorch's merged weights; and one of each relative."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.3
    unet = weights(DATA / "sd15/unet", "diffusion_pytorch_model")
    text = {k.removeprefix("text_model."): v for k, v in weights(DATA / "sd15/text_encoder", "model").items()}
    at = "down_blocks.0.attentions.0.transformer_blocks.0"
    alpha, r = 2.0, 4
    kohya, old, peft, merged = {}, {}, {}, {}
    for m in [f"{at}.attn1.to_q", f"{at}.attn2.to_k", f"{at}.attn1.to_out.0"]:
        w = unet[f"{m}.weight"].float()
        down, up = draw(r, w.shape[1]), draw(w.shape[0], r)
        flat = "lora_unet_" + m.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(alpha)}
        path, leaf = m.removesuffix(".0").rsplit(".", 1)
        # Without alpha, alpha is the rank: the factor goes into `up`.
        old |= {f"unet.{path}.processor.{leaf}_lora.down.weight": down,
                f"unet.{path}.processor.{leaf}_lora.up.weight": up * (alpha / r)}
        peft |= {f"unet.{m}.lora_A.weight": down, f"unet.{m}.lora_B.weight": up * (alpha / r)}
        merged[f"unet/{m}.weight"] = w.double() + alpha / r * up.double() @ down.double()
    m = "encoder.layers.1.self_attn.q_proj"
    w = text[f"{m}.weight"].float()
    down, up = draw(r, w.shape[1]), draw(w.shape[0], r)
    flat = "lora_te_text_model_" + m.replace(".", "_")
    kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(alpha)}
    full = f"text_encoder.text_model.{m}"
    old |= {f"{full}.lora_linear_layer.down.weight": down, f"{full}.lora_linear_layer.up.weight": up * (alpha / r)}
    peft |= {f"{full}.lora_A.weight": down, f"{full}.lora_B.weight": up * (alpha / r)}
    merged[f"text_encoder/{m}.weight"] = w.double() + alpha / r * up.double() @ down.double()
    # Relatives, on kohya's LDM names: DoRA by output, a convolution, LoHa, LoKr.
    other, others = {}, {}
    w = unet[f"{at}.attn1.to_v.weight"].double()
    down, up, norms = draw(2, w.shape[1]), draw(w.shape[0], 2), draw(w.shape[0], 1).abs() + 0.5
    flat = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_v"
    other |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.dora_scale": norms}
    moved = w + up.double() @ down.double()
    others[f"unet/{at}.attn1.to_v.weight"] = moved * norms.double() / moved.norm(dim=1, keepdim=True)
    m = "down_blocks.0.resnets.0.conv1"
    w = unet[f"{m}.weight"].double()
    down, up = draw(2, w.shape[1], 3, 3), draw(w.shape[0], 2, 1, 1)
    flat = "lora_unet_input_blocks_1_0_in_layers_2"
    other |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
    others[f"unet/{m}.weight"] = w + 0.5 * torch.einsum("or,rikl->oikl", up[:, :, 0, 0].double(), down.double())
    w = unet[f"{at}.ff.net.2.weight"].double()
    a1, b1, a2, b2 = draw(w.shape[0], 2), draw(2, w.shape[1]), draw(w.shape[0], 2), draw(2, w.shape[1])
    flat = "lora_unet_" + f"{at}.ff.net.2".replace(".", "_")
    other |= {f"{flat}.hada_w1_a": a1, f"{flat}.hada_w1_b": b1, f"{flat}.hada_w2_a": a2, f"{flat}.hada_w2_b": b2,
              f"{flat}.alpha": torch.tensor(1.0)}
    others[f"unet/{at}.ff.net.2.weight"] = w + 0.5 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    m = "mid_block.resnets.0.conv1"
    w = unet[f"{m}.weight"].double()
    w1, a, b, core = draw(4, 2), draw(2, w.shape[0] // 4), draw(2, w.shape[1] // 2), draw(2, 2, 3, 3)
    flat = "lora_unet_middle_block_0_in_layers_2"
    other |= {f"{flat}.lokr_w1": w1, f"{flat}.lokr_w2_a": a, f"{flat}.lokr_w2_b": b, f"{flat}.lokr_t2": core,
              f"{flat}.alpha": torch.tensor(1.0)}
    w2 = torch.einsum("ijkl,jr,ip->prkl", core.double(), b.double(), a.double())
    others[f"unet/{m}.weight"] = w + 0.5 * torch.kron(w1.double()[:, :, None, None].contiguous(), w2.contiguous())
    for name, state in [("kohya", kohya), ("old-diffusers", old), ("peft", peft), ("relatives", other),
                        ("merged", merged), ("merged-relatives", others)]:
        save_file({k: v.float().contiguous() for k, v in state.items()}, OUT / f"lora-{name}.safetensors")


def patterns():
    """A LoRA as diffusers saves it with the configurations of PEFT: alphas by pattern, ranks of their own."""
    generator = torch.Generator().manual_seed(9)
    draw = lambda *shape: torch.randn(shape, generator=generator) * 0.3
    unet = weights(DATA / "sd15/unet", "diffusion_pytorch_model")
    text = {k.removeprefix("text_model."): v for k, v in weights(DATA / "sd15/text_encoder", "model").items()}
    at, up = "down_blocks.0.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.0.transformer_blocks.0"
    layer = "encoder.layers.1"
    # Part, module, rank, and the scale that its configuration below comes to.
    modules = [
        ("unet", f"{at}.attn1.to_q", 4, 3 / 4),  # its own name
        ("unet", f"{up}.attn1.to_q", 4, 6 / 4),  # no pattern: the first has ^, the others another layer
        ("unet", f"{at}.attn2.to_k", 2, 5 / 2),  # the end of its name, and the first of two patterns
        ("unet", f"{up}.attn2.to_v", 3, 1 / 3),  # a regular expression
        ("unet", f"{at}.attn1.to_v", 4, 6 / 4),  # v is matched in up_blocks only, and 1.to_v is no end at a dot
        ("unet", f"{at}.attn1.to_out.0", 4, 6 / 4),
        ("text_encoder", f"{layer}.self_attn.q_proj", 4, 2 / 2),  # the root of the rank
        ("text_encoder", f"{layer}.mlp.fc1", 2, 7 / 2 ** 0.5),
    ]
    configs = {
        "unet": {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn2.to_k": 2, r"up_blocks\..*\.to_v": 3}, "use_rslora": False,
                 "alpha_pattern": {f"^{at}.attn1.to_q": 3, "attn2.to_k": 5, f"{at}.attn2.to_k": 9, "1.to_v": 9,
                                   r"up_blocks\.\d+\..*\.to_[vx]": 1, "to": 9}},
        "text_encoder": {"r": 4, "lora_alpha": 2, "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc1": 7},
                         "use_rslora": True},
    }
    state, merged = {}, {}
    for part, m, r, scale in modules:
        w = (unet if part == "unet" else text)[f"{m}.weight"].double()
        a, b = draw(r, w.shape[1]), draw(w.shape[0], r)
        name = f"{part}.{m}" if part == "unet" else f"{part}.text_model.{m}"
        state |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        merged[f"{part}/{m}.weight"] = w + scale * b.double() @ a.double()
    metadata = {f"{part}.{key}": value for part, config in configs.items() for key, value in config.items()}
    save_file({k: v.contiguous() for k, v in state.items()}, OUT / "lora-patterns.safetensors",
              metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, indent=2)})
    save_file({k: v.float().contiguous() for k, v in merged.items()}, OUT / "lora-patterns-merged.safetensors")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name in ["sd15", "sd21", "sdxl"]:
        if (DATA / name).is_dir():
            write(name)
    loras()
    patterns()
