"""Writes what tests/clip.rs compares with: tests/data/clip/, small random text encoders with transformers' outputs, and
tests/data/manifest/, the tensors of the published text encoders.

    python tools/oracle/clip.py          (needs torch, transformers, safetensors; see requirements.txt)
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"

# Keys of config.json beside the ones that every case has; what a case is for stands beside it.
SMALL = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 11}
CASES = {
    # SD 1.5: quick_gelu, the wrong end-of-text id 2, keys under text_model., position_ids; stored in f32.
    "quick-gelu": ({"num_attention_heads": 3, "num_hidden_layers": 3, "hidden_act": "quick_gelu", "eos_token_id": 2},
                   torch.float32, {"prefix": True, "position_ids": True, "projection": False}),
    # SD 2.1: erf gelu; keys without prefix; another eps; end-of-text id in the middle of the vocabulary; f16.
    "gelu": ({"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu", "eos_token_id": 40, "layer_norm_eps": 1e-3},
             torch.float16, {"prefix": False, "position_ids": False, "projection": False}),
    # With a projection, one layer, one head, no hidden_act, eps or layer count that differ from the class defaults; bf16.
    "projection": ({"num_attention_heads": 1, "num_hidden_layers": 1, "projection_dim": 8, "eos_token_id": 60},
                   torch.bfloat16, {"prefix": True, "position_ids": False, "projection": True}),
    # SDXL's second: the class with a projection, which reads it.
    "with-projection": ({"num_attention_heads": 2, "num_hidden_layers": 3, "hidden_act": "gelu", "projection_dim": 10,
                         "eos_token_id": 60, "architectures": ["CLIPTextModelWithProjection"]},
                        torch.float16, {"prefix": True, "position_ids": False, "projection": False}),
}
PUBLISHED = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
             "hidden_act": "quick_gelu", "eos_token_id": 2, "projection_dim": 768},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23,
             "hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 512},
    "sdxl2": {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32,
              "hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 1280,
              "architectures": ["CLIPTextModelWithProjection"]},
}


def model_class(config):
    return CLIPTextModelWithProjection if "architectures" in config else CLIPTextModel


def perturb(model, seed, dtype):
    """No weight at its initial value: norms neither 1 nor 0, biases not 0. Exactly representable in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=g)
        if "layer_norm" in name and name.endswith("weight"):
            value = 1 + 0.2 * noise
        elif p.ndim == 1:
            value = 0.2 * noise
        elif "embedding" in name:
            value = 0.5 * noise
        else:
            value = noise * (1.5 / p.shape[1] ** 0.5)
        p.data.copy_(value.to(dtype).float())


def rows(config, eos):
    """Three rows: the end of text once, several times (padding), and in the first place after the start."""
    g = torch.Generator().manual_seed(7)
    length, vocab = config["max_position_embeddings"], config["vocab_size"]
    ids = torch.randint(0, vocab, (3, length), generator=g)
    end = vocab - 1 if eos == 2 else eos
    ids[ids == end] = 1
    ids[0, length - 1] = end
    ids[1, 4:] = end
    ids[2, 1] = end
    return ids


@torch.no_grad()
def outputs(model, ids):
    projection = getattr(model, "text_projection", None)
    text_model = model.text_model if projection is not None else model
    out = text_model(ids, output_hidden_states=True)
    norm = getattr(text_model, "text_model", text_model).final_layer_norm
    found = {
        "last_hidden_state": out.last_hidden_state,
        "penultimate": out.hidden_states[-2],
        "pooled": out.pooler_output,
        # What clip skip 1 makes of the prompt for SD 1.x.
        "skipped": norm(out.hidden_states[-2]),
    }
    if projection is not None:
        found["projected"] = model(ids).text_embeds
    return {name: tensor.float() for name, tensor in found.items()}


def write_case(name, more, dtype, form):
    config = SMALL | more
    model = model_class(config)(CLIPTextConfig(**config)).eval()
    perturb(model, 3, dtype)
    ids = rows(config, config["eos_token_id"])
    wanted = outputs(model, ids)
    # What plain low precision commits, per element at most: ours may commit twice as much.
    errors = {}
    for label, low in ("f16", torch.float16), ("bf16", torch.bfloat16):
        copy = model_class(config)(CLIPTextConfig(**config)).eval()
        copy.load_state_dict(model.state_dict())
        got = outputs(copy.to(low), ids)
        errors[label] = {name: float((got[name] - wanted[name]).abs().max()) for name in wanted}
    folder = DATA / "clip" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_text_model", **config}, indent=1) + "\n")
    plain = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    prefix = {k: "text_model." if form["prefix"] and not k.startswith("text_projection") else "" for k in plain}
    tensors = {prefix[k] + k: v.to(dtype).contiguous() for k, v in plain.items()}
    if form["position_ids"]:
        tensors["text_model.embeddings.position_ids"] = torch.arange(config["max_position_embeddings"]).unsqueeze(0)
    if form["projection"]:
        tensors["text_projection.weight"] = torch.ones(config["projection_dim"], config["hidden_size"], dtype=dtype)
    save_file(tensors, folder / "model.safetensors")
    expected = {name: tensor.contiguous() for name, tensor in wanted.items()}
    save_file({"ids": ids.int(), **expected}, folder / "expected.safetensors", metadata={"errors": json.dumps(errors)})
    print(name, sum(t.numel() for t in plain.values()), "parameters", errors)


def write_manifest(name, more):
    with torch.device("meta"):
        model = model_class(more)(CLIPTextConfig(**more))
        with_projection = CLIPTextModelWithProjection(CLIPTextConfig(**more))
    keys = [(k.removeprefix("text_model."), list(v.shape)) for k, v in model.state_dict().items()]
    # The published files have every key below this name.
    keys = sorted([k if k.startswith("text_projection") else f"text_model.{k}", shape] for k, shape in keys)
    assert {k for k, _ in keys} | {"text_projection.weight"} == set(with_projection.state_dict())
    count = sum(p.numel() for p in model.parameters())
    lines = ",\n".join(json.dumps(k) for k in keys)
    path = DATA / "manifest" / f"text_encoder_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = json.dumps({"vocab_size": 49408, "max_position_embeddings": 77, **more})
    path.write_text(f'{{"config": {config},\n"parameters": {count},\n"tensors": [\n{lines}\n]}}\n')
    print(name, count, "parameters", len(keys), "tensors")


def main():
    torch.set_num_threads(1)
    shutil.rmtree(DATA / "clip", ignore_errors=True)
    for name, case in CASES.items():
        write_case(name, *case)
    for name, more in PUBLISHED.items():
        write_manifest(name, more)


if __name__ == "__main__":
    main()
