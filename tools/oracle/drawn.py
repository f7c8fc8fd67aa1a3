"""Weights that tests/data describes and does not hold: names, shapes, and the seed from which tests/common/drawn.rs draws the
same bits as small_models.draw.

A small model takes a few kilobytes of names then, whatever its size. NAME.drawn.json stands in the place of NAME.safetensors:

    seed, part   what a draw depends on, beside the tensor's name
    dtype        f32, f16 or bf16, to which the values are rounded
    scaled       tensors whose first rows are multiplied: [name, rows, factor]
    crc32        of all values as little-endian f32, in this order
    tensors      [key, shape], in the order of the module; [key, shape, name] where the file has it under another name
"""

import json
import zlib

import torch

import small_models

TWIN = "encoder.embed_tokens.weight"  # a second name of T5's shared.weight


class Described:
    """What `write` asks of a module: tensors by name, without T5's second name of one, and the configuration that scales a VAE's."""

    def __init__(self, state, config=None):
        self.state, self.config = {name: tensor for name, tensor in state.items() if name != TWIN}, config

    def state_dict(self):
        return self.state


def write(folder, stem, module, seed, part, dtype=torch.float32, factors={}, key=str):
    """Describes the weights of `module`, which `small_models.fill` has drawn from `seed` and `part`, as `folder/stem.drawn.json`.

    factors: tensor's name to (rows, factor), where the first rows were multiplied; key(name): what the file calls a tensor.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    scaled = []
    for name, tensor in state.items():
        drawn = small_models.draw(seed, f"{part}.{name}", tensor)
        if not torch.equal(drawn.to(dtype).float(), tensor):
            # small_models.fill does so with a VAE's latents.
            rows, factor = factors.get(name) or (module.config.latent_channels, 2 / module.config.scaling_factor)
            drawn[:rows] *= factor
            scaled.append([name, rows, factor])
        assert torch.equal(drawn.to(dtype).float(), tensor), name
    crc32 = 0
    for tensor in state.values():
        crc32 = zlib.crc32(tensor.contiguous().numpy().astype("<f4").tobytes(), crc32)
    head = {"seed": seed, "part": part, "dtype": {v: k for k, v in small_models.DTYPES.items()}[dtype],
            "scaled": scaled, "crc32": crc32}
    named = lambda name: [] if key(name) == name else [name]
    lines = [f"  {json.dumps([key(name), list(tensor.shape), *named(name)])}" for name, tensor in state.items()]
    text = json.dumps(head)[:-1] + ', "tensors": [\n' + ",\n".join(lines) + "\n]}\n"
    (folder / f"{stem}.drawn.json").write_text(text)
