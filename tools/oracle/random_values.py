"""Expected values of `torch.randn` on a seeded CPU generator, f32: bits, not approximations.

Below 16 values torch draws one at a time through its scalar path (which keeps the second of a pair for the next draw);
from 16 on it fills blocks of 8 + 8. So sizes lie on both sides of 16 and off multiples of 16, and one generator is drawn
from several times in mixed order.
"""

import json
import zlib

import torch
from safetensors.torch import save_file

SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 47, 48, 49, 63, 64, 100, 624, 625, 1000, 1024, 4096, 4099,
         16384, 65536, 196608]
SEEDS = [0, 1, 42, 1234567890, 4294967295, 4294967296, 9007199254740993, 18446744073709551615 - 41]
# Draws from one generator, in this order.
SEQUENCES = [[1, 1, 1], [5, 5, 5, 16, 1], [15, 16, 17, 3], [16, 15, 1, 32], [3, 100, 2, 1000, 1], [1024, 4096, 64],
             [256, 576, 576, 1], [7, 624, 9, 625, 1]]
WHOLE = 100  # larger draws keep the first and last 8 values and the CRC-32 of all bytes


def store(tensors, entry, key, values):
    raw = values.numpy().astype("<f4").tobytes()
    entry |= {"size": values.numel(), "crc32": zlib.crc32(raw)}
    if values.numel() <= WHOLE:
        tensors[key] = values
    else:
        tensors[key] = torch.cat([values[:8], values[-8:]])
    entry["tensor"] = key


def write(root):
    folder = root / "randn"
    folder.mkdir(parents=True)
    tensors, single, sequences = {}, [], []
    for seed in SEEDS:
        # Seeds of 2^63 and more: torch takes them as negative numbers; the value is the same 64 bits.
        generator_seed = seed if seed < 2**63 else seed - 2**64
        for size in SIZES if seed in (0, 42) else [1, 15, 16, 33, 4096]:
            entry = {"seed": seed}
            values = torch.randn(size, generator=torch.Generator().manual_seed(generator_seed))
            store(tensors, entry, f"seed{seed}.size{size}", values)
            single.append(entry)
    for seed in (0, 7):
        for i, sizes in enumerate(SEQUENCES):
            generator = torch.Generator().manual_seed(seed)
            draws = []
            for j, size in enumerate(sizes):
                entry = {}
                store(tensors, entry, f"sequence{i}.seed{seed}.draw{j}", torch.randn(size, generator=generator))
                draws.append(entry)
            sequences.append({"seed": seed, "draws": draws})
    # A shaped draw is the flat one: [1, 4, h, w] in row-major order.
    shaped = torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(3))
    flat = torch.randn(2 * 4 * 5 * 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(shaped.flatten(), flat)
    tensors["shaped.seed3"] = shaped
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "oracle.safetensors")
    listing = {"whole_up_to": WHOLE, "single": single, "sequences": sequences}
    (folder / "oracle.json").write_text(json.dumps(listing, indent=1) + "\n")
