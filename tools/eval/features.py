"""A fixed feature extractor for pictures of simple scenes, 64 pixels a side and up: 60 numbers a picture, no weights.

InceptionV3 was trained on photographs and has 2048 features: on some hundred pictures of balls and cubes its covariance
is singular and most of its features say nothing. This bank is written down instead of trained, so it is the same for
everybody, and small, so that 100 pictures are enough. Per 64x64 picture or crop, of luma Y and two colour differences:

    layout    27  means of Y, R-G, (R+G)/2-B over a 3x3 grid: what colour is where
    edges     12  Gabor amplitude of Y at wavelengths 3, 6, 12 pixels in 4 directions, averaged over the picture
    places    12  the same summed over directions, averaged over quarters: where there is texture or an outline
    colour     6  Gabor amplitude of both colour differences at the three wavelengths: outlines of coloured things
    texture    3  amplitude at a longer wavelength of the amplitude at a shorter one: how unevenly texture is spread

Amplitudes a are taken as log(1 + a / 0.01), so that fine texture counts beside outlines. Edges, places, colour are a
scattering transform of first order and texture of second (Bruna and Mallat 2013, arXiv:1203.1513): stable when a scene
is shifted a little, sensitive to how much detail there is and at which scale. Each group is centred and divided by the
standard deviation of its features over ground-truth scenes (CENTRE, GAIN): no group outweighs the others, and the
kernel of the kernel distance works where it is sensitive.

Two forms, as the paper has them: the whole picture resized to 64x64 (content, arrangement, colour; blind to detail
finer than the model's own size, as FID at 299x299 is blind at 1024), and 64x64 crops at full size (detail, texture,
blur, noise).
"""

import functools

import numpy as np
from PIL import Image
from scipy import fft

from common import EvalError

SIDE = 64
WAVELENGTHS = (3.0, 6.0, 12.0)
DIRECTIONS = 4
PAD = 16  # mirrored border: a Gabor filter of wavelength 12 ends within it
FLOOR = 0.01
GROUPS = {"layout": 27, "edges": 12, "places": 12, "colour": 6, "texture": 3}
# Over ground-truth scenes at 64, 128 and 256 pixels, whole and cropped, measured once and rounded: the mean of each
# channel, or of each wavelength; and the standard deviation of each group.
CENTRE = {
    "layout": (0.38, 0.03, 0.05),
    "edges": (0.40, 0.45, 0.55),
    "places": (1.05, 1.20, 1.30),
    "colour": (0.55, 0.75, 1.00, 0.60, 0.80, 1.05),
    "texture": (0.50, 0.50, 0.65),
}
GAIN = {"layout": 0.14, "edges": 0.17, "places": 0.36, "colour": 0.39, "texture": 0.20}
VERSION = 1  # of everything above: stored results of another version are not compared


def _gabor(wavelength, angle, side):
    """Frequency response [side, side] of a Gabor filter with one lobe: mean 0, amplitude 1 at its own frequency."""
    frequency = fft.fftfreq(side)
    fx, fy = frequency[None, :], frequency[:, None]
    sigma = 0.45 / wavelength  # width of the lobe; about 2.5 periods of the wave fit
    along, across = fx * np.cos(angle) + fy * np.sin(angle), -fx * np.sin(angle) + fy * np.cos(angle)

    def lobe(centre):
        return np.exp(-((along - centre) ** 2) / (2 * sigma**2) - across**2 / (2 * (1.2 * sigma) ** 2))

    wave = lobe(1.0 / wavelength)
    return (wave - wave[0, 0] / lobe(0.0)[0, 0] * lobe(0.0)).astype(np.float32)


@functools.cache
def _bank():
    """[wavelengths, directions, side, side] responses on the padded picture."""
    side = SIDE + 2 * PAD
    angles = np.arange(DIRECTIONS) * np.pi / DIRECTIONS
    return np.stack([[_gabor(w, a, side) for a in angles] for w in WAVELENGTHS])


def _amplitudes(planes, filters):
    """|planes * filter|: [..., 64, 64] and [K, side, side] to [..., K, 64, 64]."""
    border = [(0, 0)] * (planes.ndim - 2) + [(PAD, PAD)] * 2
    spectrum = fft.fft2(np.pad(planes, border, mode="symmetric"))
    waves = fft.ifft2(spectrum[..., None, :, :] * filters)
    return np.abs(waves[..., PAD:-PAD, PAD:-PAD])


def _grid(planes, cells):
    """Means over cells x cells areas: [..., 64, 64] to [..., cells * cells]."""
    edges = np.linspace(0, SIDE, cells + 1).round().astype(int)
    rows = [planes[..., a:b, :] for a, b in zip(edges, edges[1:])]
    out = [row[..., a:b].mean(axis=(-2, -1)) for row in rows for a, b in zip(edges, edges[1:])]
    return np.stack(out, axis=-1)


def bank(batch):
    """Features f64 [N, 60] of pictures f32 [N, 64, 64, 3] in 0..1."""
    x = np.asarray(batch, np.float32)
    if x.ndim != 4 or x.shape[1:] != (SIDE, SIDE, 3):
        raise EvalError(f"bank: pictures have shape {list(x.shape)}, expected [N, {SIDE}, {SIDE}, 3]")
    r, g, b = np.moveaxis(x, -1, 0)
    luma, difference = (r + g + b) / 3, np.stack([r - g, (r + g) / 2 - b], axis=1)
    filters = _bank()
    flat = filters.reshape(-1, *filters.shape[2:])
    waves = _amplitudes(luma, flat).reshape(len(x), len(WAVELENGTHS), DIRECTIONS, SIDE, SIDE)
    scales = waves.sum(axis=2)  # [N, wavelengths, 64, 64]
    ring = filters.sum(axis=1)  # no direction
    longer = [(0, 1), (0, 2), (1, 2)]
    second = np.stack([_amplitudes(scales[:, i], ring[k : k + 1])[:, 0].mean(axis=(1, 2)) for i, k in longer], axis=1)
    groups = {
        "layout": _grid(np.concatenate([luma[:, None], difference], axis=1), 3),
        "edges": waves.mean(axis=(3, 4)),
        "places": _grid(scales, 2),
        "colour": _amplitudes(difference, ring).mean(axis=(3, 4)),
        "texture": second,
    }
    out = []
    for name, values in groups.items():
        values = values.reshape(len(x), -1).astype(np.float64)
        values = values if name == "layout" else np.log1p(values / FLOOR)
        centre = np.repeat(CENTRE[name], GROUPS[name] // len(CENTRE[name]))
        out.append((values - centre) / GAIN[name])
    return np.concatenate(out, axis=1)


def resized(picture, side=SIDE):
    """f32 [h, w, 3] to [side, side, 3]: PIL's bicubic with antialias in float, clamped to 0..1, as clean-fid."""
    picture = np.asarray(picture, np.float32)
    if picture.shape[:2] == (side, side):
        return picture
    planes = [
        Image.fromarray(np.ascontiguousarray(picture[..., c])).resize((side, side), Image.BICUBIC) for c in range(3)
    ]
    return np.clip(np.stack([np.asarray(p) for p in planes], axis=-1), 0.0, 1.0)


def whole_features(pictures):
    """[N, 60] of a list of f32 [h, w, 3] pictures in 0..1, each resized to 64x64."""
    return bank(np.stack([resized(p) for p in pictures]))


def crop_features(pictures, ids, crops):
    """[N * crops.count, 60] of pictures.Crops (side 64) of each picture; row i * count + c is crop c of picture i."""
    if crops.side != SIDE:
        raise EvalError(f"crops of {crops.side}x{crops.side}: the feature bank takes {SIDE}x{SIDE}")
    return np.concatenate([bank(np.stack(crops.of(key, np.asarray(p)))) for key, p in zip(ids, pictures)])
