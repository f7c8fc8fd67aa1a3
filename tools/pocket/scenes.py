"""Captioned pictures drawn by program: the data the pocket model is trained on.

A scene is one to three objects of one kind on a plain ground. Every length is a fraction of the picture's side, so the
same scene can be rendered at any size, and a larger rendering shows more detail of the same picture.

    python scenes.py --out sheet.png --size 128 --count 16 --seed 3
"""

import argparse
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

NUMBERS = ("one", "two", "three")
SIZES = ("small", "large")
COLOURS = {  # times the shade of the object
    "red": (0.88, 0.10, 0.10),
    "green": (0.12, 0.70, 0.20),
    "blue": (0.13, 0.32, 0.95),
    "yellow": (0.96, 0.83, 0.10),
    "purple": (0.62, 0.16, 0.80),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = ("ball", "cube", "cone")
POSITIONS = {  # words in the caption; where the group's middle is; the direction in which its objects are lined up
    "left": ("on the left", (0.20, 0.50), (0, 1)),
    "right": ("on the right", (0.80, 0.50), (0, 1)),
    "top": ("at the top", (0.50, 0.20), (1, 0)),
    "bottom": ("at the bottom", (0.50, 0.80), (1, 0)),
    "centre": ("in the centre", (0.50, 0.50), (1, 0)),
}
GROUNDS = {"grey": (0.45, 0.45, 0.46), "black": (0.07, 0.07, 0.08), "sand": (0.80, 0.67, 0.47)}

RADIUS = {"small": 0.085, "large": 0.125}
SPACING = {"one": (0.0,), "two": (-0.19, 0.19), "three": (-0.31, 0.0, 0.31)}
HELD_OUT_PERCENT = 15


@dataclass(frozen=True)
class Kind:
    """What a complete caption says."""

    number: str
    size: str
    colour: str
    shape: str
    position: str
    ground: str

    def caption(self, words=("number", "size", "colour", "position", "ground")):
        """The caption, with only the named words; the shape is always named."""
        parts = []
        if "number" in words:
            parts.append(self.number)
        elif self.number == "one":
            parts.append("a")
        if "size" in words:
            parts.append(self.size)
        if "colour" in words:
            parts.append(self.colour)
        parts.append(self.shape if self.number == "one" else self.shape + "s")
        if "position" in words:
            parts.append(POSITIONS[self.position][0])
        text = " ".join(parts)
        return f"{text}, on a {self.ground} ground" if "ground" in words else text

    def digest(self):
        return hashlib.sha256(self.caption().encode()).digest()

    def held_out(self):
        """Whether this combination is kept from training, under any caption."""
        return self.digest()[0] * 100 < HELD_OUT_PERCENT * 256


ALL_KINDS = tuple(Kind(*k) for k in itertools.product(NUMBERS, SIZES, COLOURS, SHAPES, POSITIONS, GROUNDS))
TRAINING_KINDS = tuple(k for k in ALL_KINDS if not k.held_out())
HELD_OUT_KINDS = tuple(sorted((k for k in ALL_KINDS if k.held_out()), key=Kind.digest))


@dataclass(frozen=True)
class Scene:
    """A kind, and the little that its caption leaves open."""

    kind: Kind
    centres: tuple  # (x, y) of each object
    radius: float
    tint: float  # brightness of the objects' colour
    slope: float  # ground light: brighter at the top (> 0) or at the bottom


def draw_scene(rng, kind):
    """A scene of this kind; rng is a numpy Generator."""
    _, (x, y), (dx, dy) = POSITIONS[kind.position]
    x, y = x + rng.uniform(-0.015, 0.015), y + rng.uniform(-0.015, 0.015)
    centres = tuple((x + dx * s, y + dy * s) for s in SPACING[kind.number])
    return Scene(
        kind=kind,
        centres=centres,
        radius=RADIUS[kind.size] * rng.uniform(0.95, 1.04),
        tint=rng.uniform(0.94, 1.0),
        slope=rng.uniform(0.0, 0.16),
    )


def draw_caption(rng, kind):
    """A caption as seen in training: mostly complete, sometimes with words left out, sometimes empty."""
    u = rng.random()
    if u < 0.10:
        return ""
    if u < 0.75:
        return kind.caption()
    return kind.caption([w for w in ("number", "size", "colour", "position", "ground") if rng.random() < 0.6])


def _ball(u, v):
    """Signed distance and shade of a unit ball; (u, v) in radii from its centre, v downwards."""
    rr = u * u + v * v
    z = np.sqrt(np.maximum(1.0 - rr, 0.0))
    light = np.maximum(-0.45 * u - 0.55 * v + 0.70 * z, 0.0)
    spot = np.exp(-((u + 0.36) ** 2 + (v + 0.40) ** 2) / 0.035)
    return np.sqrt(rr) - 1.0, 0.66 + 0.36 * light, 0.55 * spot


def _cube(u, v):
    """A cube seen from the front and a little above: the top face is a lighter strip."""
    half, corner = 0.90, 0.06
    qx, qy = np.abs(u) - (half - corner), np.abs(v) - (half - corner)
    distance = np.hypot(np.maximum(qx, 0.0), np.maximum(qy, 0.0)) + np.minimum(np.maximum(qx, qy), 0.0) - corner
    top = 0.5 - 0.5 * np.tanh((v + 0.42) / 0.06)
    return distance, 0.84 - 0.10 * v + top * 0.12, 0.18 * top


def _cone(u, v):
    """A cone: a triangle on a flat ellipse, lit from the left."""
    apex, base, half, bulge = -1.10, 0.80, 1.05, 0.16
    height = base - apex
    side = (np.abs(u) * height - (v - apex) * half) / np.hypot(height, half)
    inside_base = np.sqrt(np.maximum(1.0 - (u / half) ** 2, 0.0)) * bulge
    distance = np.maximum(side, v - base - inside_base)
    across = u / np.maximum((v - apex) / height * half, 0.15)
    return distance, 0.82 - 0.20 * np.clip(across, -1.0, 1.0), 0.25 * np.exp(-((across + 0.35) ** 2) / 0.03)


_SHAPE_OF = {"ball": _ball, "cube": _cube, "cone": _cone}


@dataclass(frozen=True)
class Thing:
    """One object of a picture."""

    shape: str
    colour: str
    centre: tuple
    radius: float
    tint: float


def render_things(things, ground, slope, size, window=None):
    """The picture, float32 [h, w, 3] in 0..1. window = (left, top, width, height) in pixels draws only that part."""
    left, top, width, height = window or (0, 0, size, size)
    x = ((left + np.arange(width, dtype=np.float32) + 0.5) / size)[None, :]
    y = ((top + np.arange(height, dtype=np.float32) + 0.5) / size)[:, None]

    light = np.broadcast_to(1.0 + slope * (0.5 - y), (height, width))
    for thing in things:
        u, v = (x - thing.centre[0]) / thing.radius, (y - thing.centre[1]) / thing.radius
        light = light * (1.0 - 0.30 * np.exp(-((u - 0.25) ** 2) / 0.9 - ((v - 1.0) ** 2) / 0.10))
    picture = light[..., None] * np.asarray(GROUNDS[ground], np.float32)

    for thing in things:
        u, v = (x - thing.centre[0]) / thing.radius, (y - thing.centre[1]) / thing.radius
        distance, shade, gloss = _SHAPE_OF[thing.shape](*np.broadcast_arrays(u, v))
        if thing.colour == "white":  # keeps the shaded side apart from a grey or sand ground
            shade = 0.5 + 0.5 * shade
        cover = np.clip(0.5 - distance * thing.radius * size, 0.0, 1.0)[..., None]
        body = shade[..., None] * (np.asarray(COLOURS[thing.colour], np.float32) * thing.tint)
        body = body + gloss[..., None] * (1.0 - body)
        picture = picture + cover * (body - picture)
    return np.clip(picture, 0.0, 1.0).astype(np.float32)


def render(scene, size, window=None):
    """The picture of a scene; arguments as for render_things."""
    kind = scene.kind
    things = [Thing(kind.shape, kind.colour, centre, scene.radius, scene.tint) for centre in scene.centres]
    return render_things(things, kind.ground, scene.slope, size, window)


def render_crowd(rng, size, window=None):
    """Nine unlike objects in a grid: no caption says this, but an autoencoder learns more from it than from ground."""
    things = [
        Thing(
            shape=SHAPES[rng.integers(len(SHAPES))],
            colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
            centre=(0.19 + 0.31 * column + rng.uniform(-0.03, 0.03), 0.19 + 0.31 * row + rng.uniform(-0.03, 0.03)),
            radius=rng.uniform(0.075, 0.130),
            tint=rng.uniform(0.94, 1.0),
        )
        for row in range(3)
        for column in range(3)
    ]
    return render_things(things, tuple(GROUNDS)[rng.integers(len(GROUNDS))], rng.uniform(0.0, 0.16), size, window)


def mask(shape, centre, radius, size):
    """Coverage of every pixel of a size x size picture by one object, float in 0..1."""
    at = (np.arange(size) + 0.5) / size
    u, v = np.meshgrid((at - centre[0]) / radius, (at - centre[1]) / radius)
    return np.clip(0.5 - _SHAPE_OF[shape](u, v)[0] * radius * size, 0.0, 1.0)


def to_image(picture):
    return Image.fromarray((picture * 255.0 + 0.5).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description="Draw a contact sheet of random scenes and print their captions.")
    parser.add_argument("--out", required=True, help="PNG to write")
    parser.add_argument("--size", type=int, default=64, help="side of one picture in pixels")
    parser.add_argument("--count", type=int, default=16, help="number of pictures")
    parser.add_argument("--columns", type=int, default=4, help="pictures in a row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    rows = -(-args.count // args.columns)
    sheet = np.zeros((rows * args.size, args.columns * args.size, 3), np.float32)
    for i in range(args.count):
        kind = ALL_KINDS[rng.integers(len(ALL_KINDS))]
        r, c = divmod(i, args.columns)
        sheet[r * args.size : (r + 1) * args.size, c * args.size : (c + 1) * args.size] = render(
            draw_scene(rng, kind), args.size
        )
        print(kind.caption())
    to_image(sheet).save(args.out)


if __name__ == "__main__":
    main()
