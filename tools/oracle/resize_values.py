"""Expected values of the resizers."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import resize
from module_values import compact

# (height, width) -> (height, width); all channels, whole images
SIZES = [((5, 7), (9, 13)), ((16, 16), (32, 32)), ((1, 1), (3, 2)), ((2, 3), (5, 3)), ((12, 10), (12, 10)),
         ((24, 16), (7, 5)), ((9, 4), (4, 9)), ((18, 24), (26, 35)), ((3, 40), (4, 7))]
# large: only some rows are kept
LARGE = [((72, 96), (101, 137)), ((512, 512), (768, 768)), ((512, 512), (1024, 1024)), ((300, 200), (99, 77))]


def image(seed, channels, size):
    """Drawn levels in [-1, 1], both ends included, so that bicubic overshoots the range."""
    h, w = size
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 129, (1, channels, h, w), generator=g).float() / 128


def write(root):
    folder = root / "resize"
    folder.mkdir(parents=True)
    tensors, cases, large = {}, [], []
    for i, (src, dst) in enumerate(SIZES):
        x = image(i, 2, src)
        tensors[f"small{i}.in"] = x
        done = []
        for name in resize.NAMES:
            if name == "bicubic-gaussian" and min(dst) < 3:
                continue  # a border of 2 cannot be reflected
            tensors[f"small{i}.{name}"] = resize.upsample(x.double(), dst, name).float()
            done.append(name)
        rgb = image(100 + i, 3, src)
        tensors[f"small{i}.u8-in"] = rgb
        for name in ("bilinear", "bicubic"):
            tensors[f"small{i}.u8-{name}"] = resize.upsample_u8(rgb, dst, name)
        cases.append({"name": f"small{i}", "from": list(src), "to": list(dst), "upsamplers": done,
                      "u8": ["bilinear", "bicubic"]})
    for i, (src, dst) in enumerate(LARGE):
        # Pixel (y, x) of the input is ((y*y*31 + x*x*17 + x*y*7) mod 257 - 128) / 128.
        y, x = np.mgrid[0 : src[0], 0 : src[1]].astype(np.int64)
        plane = ((y * y * 31 + x * x * 17 + x * y * 7) % 257 - 128).astype(np.float32) / 128
        rows = [0, 1, dst[0] // 2, dst[0] - 1]
        levels = (((y * y * 31 + x * x * 17 + x * y * 7) % 256)).astype(np.uint8)
        entry = {"name": f"large{i}", "from": list(src), "to": list(dst), "rows": rows}
        planes = torch.from_numpy(plane)[None, None]
        for name in ("bilinear", "bicubic", "bicubic-torch"):
            out = resize.upsample(planes.double(), dst, name).float()
            tensors[f"large{i}.{name}"] = out[0, 0, rows].contiguous()
        for name, filter_ in [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]:
            out = np.asarray(resize.pil_u8(Image.fromarray(levels), dst, filter_))
            tensors[f"large{i}.u8-{name}"] = torch.from_numpy(out[rows].copy())
        large.append(entry)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "oracle.safetensors")
    listing = {"cases": cases, "large": large,
               "large_input": "f32: ((y*y*31 + x*x*17 + x*y*7) mod 257 - 128) / 128; u8: the same sum mod 256"}
    (folder / "oracle.json").write_text(compact(json.dumps(listing, indent=1)))
