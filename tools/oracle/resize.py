"""MegaFusion's upsamplers on float images `[N, C, H, W]`, and the 8-bit one of the published code."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

GAUSSIAN_SIGMA = 1.1  # the paper does not give it; the common rule for 5 taps
NAMES = ["bilinear", "bicubic", "bicubic-torch", "bicubic-gaussian", "bicubic-edge"]


def pil(images, size, filter_):
    """PIL on mode F (f32, accumulating in f64), plane by plane. size: (height, width)"""
    planes = images.flatten(0, 1).numpy().astype(np.float32)
    out = [np.asarray(Image.fromarray(p).resize((size[1], size[0]), filter_)) for p in planes]
    return torch.from_numpy(np.stack(out)).unflatten(0, images.shape[:2]).to(images.dtype)


def per_plane(images, kernel, padding):
    n, c = images.shape[:2]
    planes = images.flatten(0, 1)[:, None]
    if padding:
        planes = F.pad(planes, (padding,) * 4, mode="reflect")
    return F.conv2d(planes, kernel[None, None].to(images.dtype)).unflatten(0, (n, c))[:, :, 0]


def gaussian(images):
    """5x5, sigma 1.1, border reflected about the edge pixel (which is not repeated)."""
    x = torch.arange(-2, 3, dtype=torch.float64)
    g = torch.exp(-(x**2) / (2 * GAUSSIAN_SIGMA**2))
    g = g / g.sum()
    return per_plane(images, torch.outer(g, g), 2)


def edge(images):
    """(1/2) [[-1,-1,-1],[-1,10,-1],[-1,-1,-1]]; border pixels stay as they are."""
    kernel = torch.full((3, 3), -0.5)
    kernel[1, 1] = 5.0
    out = images.clone()
    if images.shape[-1] > 2 and images.shape[-2] > 2:
        out[:, :, 1:-1, 1:-1] = per_plane(images, kernel, 0)
    return out


def upsample(images, size, name):
    if name == "bilinear":
        return pil(images, size, Image.Resampling.BILINEAR)
    if name == "bicubic-torch":
        # In f32 whatever the run is in: torch then rounds its coordinates, which is 8e-5 of a result at 768 pixels.
        out = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False, antialias=False)
        return out.to(images.dtype)
    out = pil(images, size, Image.Resampling.BICUBIC)
    return {"bicubic": lambda x: x, "bicubic-gaussian": gaussian, "bicubic-edge": edge}[name](out)


def pil_u8(image, size, filter_):
    """PIL on 8-bit pictures: the horizontal pass, rounded to 8 bits, then the vertical one.

    Two calls, because Pillow 13 goes first where it shrinks most (for pictures that become lower); releases of the time
    of the published code always filtered rows first. The order shows: the rounding and clamping between differ.
    """
    width_only = image.resize((size[1], image.height), filter_)
    return width_only.resize((size[1], size[0]), filter_)


def upsample_u8(images, size, name):
    """The published code's way: [-1, 1] -> 8-bit RGB -> PIL -> [-1, 1]."""
    filter_ = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[name]
    out = []
    for image in images:
        levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        resized = pil_u8(Image.fromarray(levels), size, filter_)
        out.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(images.dtype) / 255 * 2 - 1)
    return torch.stack(out)
