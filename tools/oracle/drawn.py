"""Weights that tests/data describes and does not hold: names, shapes, and the seed from which tests/common/drawn.rs draws the
same bits as small_models.draw.

A small model takes a few kilobytes of names then, whatever its size. NAME.drawn.json stands in the place of NAME.safetensors, which
may be a shard:

    seed, part   what a draw depends on, beside the tensor's name
    dtype        f32, f16 or bf16, to which the values are rounded
    scaled       tensors whose first rows are multiplied: [name, rows, factor]
    crc32        of all values as little-endian f32, in this order
    tensors      [key, shape], in the order of the module; [key, shape, name] where the file has it under another name
"""

import atexit
import json
import pathlib
import shutil
import tempfile
import zlib

import torch
from safetensors.torch import save_file

import small_models

TWIN = "encoder.embed_tokens.weight"  # a second name of T5's shared.weight


class Described:
    """What `write` asks of a module: tensors by name, without T5's second name of one, and the configuration that scales a VAE's."""

    def __init__(self, state, config=None):
        self.state, self.config = {name: tensor for name, tensor in state.items() if name != TWIN}, config

    def state_dict(self):
        return self.state


def write(folder, stem, module, seed, part, dtype=torch.float32, factors={}, key=str, shard=None, variant=None):
    """Describes the weights of `module`, which `small_models.fill` has drawn from `seed` and `part`, as `folder/stem.drawn.json`.

    factors: tensor's name to (rows, factor), where the first rows were multiplied; key(name): what the file calls a tensor; shard,
    variant: as `small_models.write_shards` has them, whose index is written too.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    scaled = {}
    for name, tensor in state.items():
        drawn = small_models.draw(seed, f"{part}.{name}", tensor)
        if not torch.equal(drawn.to(dtype).float(), tensor):
            # small_models.fill does so with a VAE's latents.
            rows, factor = factors.get(name) or (module.config.latent_channels, 2 / module.config.scaling_factor)
            drawn[:rows] *= factor
            scaled[name] = [name, rows, factor]
        assert torch.equal(drawn.to(dtype).float(), tensor), name
    names = {key(name): name for name in state}
    outer = {key(name): tensor.to(dtype) for name, tensor in state.items()}
    for file, keys in small_models.files_of(folder, stem, outer, shard, variant):
        held = {name: state[name] for name in map(names.get, keys if shard else names)}
        describe(folder / file.replace(".safetensors", ".drawn.json"), held, seed, part, dtype, [scaled[name] for name in held if name in scaled], key)


def describe(path, state, seed, part, dtype, scaled, key):
    crc32 = 0
    for tensor in state.values():
        crc32 = zlib.crc32(tensor.contiguous().numpy().astype("<f4").tobytes(), crc32)
    head = {"seed": seed, "part": part, "dtype": {v: k for k, v in small_models.DTYPES.items()}[dtype],
            "scaled": scaled, "crc32": crc32}
    named = lambda name: [] if key(name) == name else [name]
    lines = [f"  {json.dumps([key(name), list(tensor.shape), *named(name)])}" for name, tensor in state.items()]
    path.write_text(json.dumps(head)[:-1] + ', "tensors": [\n' + ",\n".join(lines) + "\n]}\n")


def read(path):
    """The tensors that a NAME.drawn.json describes, in the dtype of the file."""
    described = json.loads(path.read_text())
    factors = {name: (rows, factor) for name, rows, factor in described["scaled"]}
    out, crc32 = {}, 0
    for key, shape, *name in described["tensors"]:
        name = name[0] if name else key
        tensor = small_models.draw(described["seed"], f"{described['part']}.{name}", torch.empty(shape, device="meta"))
        if name in factors:
            rows, factor = factors[name]
            tensor[:rows] *= factor
        out[key] = tensor.to(small_models.DTYPES[described["dtype"]])
        crc32 = zlib.crc32(out[key].float().numpy().astype("<f4").tobytes(), crc32)
    assert crc32 == described["crc32"], path
    return out


def folder(path):
    """The folder itself, or a temporary copy where files are described, in which they are safetensors."""
    path = pathlib.Path(path)
    if not list(path.rglob("*.drawn.json")):
        return path
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch)
    made = pathlib.Path(scratch) / path.name
    shutil.copytree(path, made)
    for file in made.rglob("*.drawn.json"):
        to = file.with_name(file.name.replace(".drawn.json", ".safetensors"))
        save_file({k: v.contiguous() for k, v in read(file).items()}, to, metadata={"format": "pt"})
        file.unlink()
    return made
