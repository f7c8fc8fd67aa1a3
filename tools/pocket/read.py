"""Reads number, size, colour, shape, position and ground back from a picture in the style of scenes.py.

No learned parts. The ground's colour is the median of the picture's border; a pixel belongs to an object if no
brightness of the ground's colour explains it, so shadows stay ground. Connected pixels form an object. Its shape is the
one whose outline, with the same area and middle, differs least; its colour follows from hue and saturation, the
position from the mean of the objects' centres.

    python read.py picture.png ...          prints what is seen
    python read.py --score DIR              scores DIR/000.png, 001.png, ... against heldout.txt, line by line
    python read.py --self-test              scores renderings of known scenes: the reader's own error
"""

import argparse
import colorsys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

import scenes

HELD_OUT = Path(__file__).resolve().parent / "heldout.txt"
SCORED = ("number", "colour", "shape", "position")

GROUND_DISTANCE = 0.17  # RGB distance from every shade of the ground, beyond which a pixel is an object's
MIN_AREA = 0.006  # of the picture; a small cone covers 0.018
WHITE_SATURATION = 0.30
HUES = {"red": 0.0, "yellow": 50.0, "green": 128.0, "blue": 226.0, "purple": 283.0}  # degrees, of scenes.COLOURS
BLURS = (0.0, 0.008, 0.016)  # of the picture's side: the outlines are compared sharp and a little blurred
SMALL_BELOW = 0.104  # radius in picture sides: between 0.085 and 0.125


@dataclass(frozen=True)
class Reading:
    """What is seen; None where nothing, or where the objects disagree."""

    number: str | None
    size: str | None
    colour: str | None
    shape: str | None
    position: str | None
    ground: str

    def caption(self):
        shown = {k: v if v is not None else "?" for k, v in vars(self).items()}
        return "{number} {size} {colour} {shape}, {position}, {ground} ground".format(**shown)


def from_ground(picture):
    """(distance of every pixel from the ground's colour, that colour) of a float [side, side, 3] picture."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = np.median(border, axis=0)
    shade = np.clip(picture @ ground / max(ground @ ground, 1e-4), 0.5, 1.2)
    return np.linalg.norm(picture - shade[..., None] * ground, axis=-1), ground


def nearest(value, table, distance):
    return min(table, key=lambda name: distance(value, table[name]))


def read_colour(pixels):
    hue, saturation, _ = colorsys.rgb_to_hsv(*np.median(pixels, axis=0))
    if saturation < WHITE_SATURATION:
        return "white"
    return nearest(hue * 360, HUES, lambda a, b: abs((a - b + 180) % 360 - 180))


def agreed(values):
    """The value if all are the same, else None."""
    return values[0] if len(set(values)) == 1 else None


def outline_constants(shape):
    """(area over squared radius, how far the area's middle is below the centre, in radii) of a shape."""
    size, radius = 512, 0.25
    mask = scenes.mask(shape, (0.5, 0.5), radius, size)
    return mask.sum() / size**2 / radius**2, (ndimage.center_of_mass(mask)[0] + 0.5 - size / 2) / (radius * size)


OUTLINES = {shape: outline_constants(shape) for shape in scenes.SHAPES}


def read_shape(cover):
    """(shape, radius, centre) of the one object whose coverage of each pixel is given."""
    size = len(cover)
    area = cover.sum() / size**2
    row, column = (c + 0.5 for c in ndimage.center_of_mass(cover))
    best = None
    for shape, (area_over_square, below) in OUTLINES.items():
        radius = np.sqrt(area / area_over_square)
        centre = (column / size, row / size - below * radius)
        mask = scenes.mask(shape, centre, radius, size)
        for blur in BLURS:
            error = np.square(ndimage.gaussian_filter(mask, blur * size) - cover).sum()
            if best is None or error < best[0]:
                best = (error, shape, radius, centre)
    return best[1:]


def read(picture):
    """Reading of a square float [side, side, 3] picture in 0..1."""
    size = len(picture)
    distance, ground_colour = from_ground(picture)
    ground = nearest(ground_colour, scenes.GROUNDS, lambda a, b: np.linalg.norm(a - np.array(b)))
    labels, count = ndimage.label(distance > GROUND_DISTANCE)
    colours, shapes, centres, radii = [], [], [], []
    for k in range(1, count + 1):
        part = labels == k
        if part.sum() < MIN_AREA * size**2:
            continue
        inner = ndimage.binary_erosion(part)  # without the blended edge
        inner = inner if inner.any() else part
        near = ndimage.binary_dilation(part, iterations=max(1, size // 64))
        cover = np.clip(distance / np.median(distance[inner]), 0.0, 1.0) * near
        shape, radius, centre = read_shape(cover)
        colours.append(read_colour(picture[inner]))
        shapes.append(shape)
        centres.append(centre)
        radii.append(radius)
    if not centres:
        return Reading(None, None, None, None, None, ground)
    anchors = {name: middle for name, (_, middle, _) in scenes.POSITIONS.items()}
    position = nearest(np.mean(centres, axis=0), anchors, lambda a, b: np.hypot(a[0] - b[0], a[1] - b[1]))
    return Reading(
        number=scenes.NUMBERS[len(centres) - 1] if len(centres) <= len(scenes.NUMBERS) else None,
        size="small" if np.median(radii) < SMALL_BELOW else "large",
        colour=agreed(colours),
        shape=agreed(shapes),
        position=position,
        ground=ground,
    )


def load(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255.0


def print_score(readings, kinds):
    """Share of the pictures with each attribute right, and with number, colour, shape and position all right."""
    right = Counter()
    for reading, kind in zip(readings, kinds):
        agree = {name: getattr(reading, name) == getattr(kind, name) for name in vars(reading)}
        right.update(name for name, value in agree.items() if value)
        right["all four"] += all(agree[name] for name in SCORED)
        right["all six"] += all(agree.values())
    for name in (*SCORED, "all four", "size", "ground", "all six"):
        print(f"{name:9} {right[name]:5} of {len(kinds)}  {100 * right[name] / len(kinds):6.2f} %")


def kinds_of(captions):
    known = {kind.caption(): kind for kind in scenes.ALL_KINDS}
    return [known[caption] for caption in captions]


def score_directory(directory, captions, verbose=False):
    """Scores DIR/NNN.png, the picture of captions[NNN]; pictures beyond the last one present are not counted."""
    paths = [directory / f"{i:03d}.png" for i in range(len(captions))]
    paths = [path for path in paths if path.exists()]
    kinds = kinds_of([captions[int(path.stem)] for path in paths])
    readings = [read(load(path)) for path in paths]
    if verbose:
        for path, reading, kind in zip(paths, readings, kinds):
            wrong = any(getattr(reading, name) != getattr(kind, name) for name in SCORED)
            print(f"{path.name} {'WRONG' if wrong else 'right'}  asked: {kind.caption()}  seen: {reading.caption()}")
    print_score(readings, kinds)


def self_test(size, count):
    """The reader's error on renderings, rounded to 8 bits as a PNG is."""
    rng = np.random.default_rng(size)
    kinds = [scenes.ALL_KINDS[rng.integers(len(scenes.ALL_KINDS))] for _ in range(count)]
    pictures = (scenes.render(scenes.draw_scene(rng, kind), size) for kind in kinds)
    print(f"{count} renderings at {size}x{size}")
    print_score([read(np.round(p * 255) / 255) for p in pictures], kinds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, help="PNG files to read")
    parser.add_argument("--score", type=Path, metavar="DIR", help="score the pictures NNN.png in DIR")
    parser.add_argument("--captions", type=Path, default=HELD_OUT, help="captions of --score, one in a line")
    parser.add_argument("--verbose", action="store_true", help="with --score: also print each picture's reading")
    parser.add_argument("--self-test", action="store_true", help="measure the reader on renderings")
    parser.add_argument("--count", type=int, default=2000, help="renderings per size in --self-test")
    args = parser.parse_args()
    for path in args.pictures:
        print(f"{path}: {read(load(path)).caption()}")
    if args.score:
        score_directory(args.score, args.captions.read_text().splitlines(), args.verbose)
    if args.self_test:
        for size in (64, 128, 256):
            self_test(size, args.count)


if __name__ == "__main__":
    main()
