"""Captioned pictures drawn by program: the data the pocket model is trained on.

A scene is one to three like objects at a place, or two unlike objects in a relation, on a ground with a texture. It can
be drawn at any size and any aspect ratio. All lengths are in units of the picture's shorter side; a place ("on the
left") is a fraction of width and height, and the objects of a group or pair keep their distances from each other. So a
wider picture shows more ground, and a larger one shows finer detail of the same scene: the textures of the grounds and
of the objects have periods of 1/24 to 1/100 of a side, and a pattern finer than the pixels fades out instead of
aliasing. At 64 pixels most of it is gone, at 256 all of it is there.

    python scenes.py --out sheet.png --size 128 --count 16 --seed 3     a contact sheet, and its captions
    python scenes.py --held-out 500 > heldout.txt                       captions that are never trained on
"""

import argparse
import hashlib
import itertools
from dataclasses import dataclass, replace

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
RELATIONS = {  # words; the same seen from the other object; the direction from the first object to the second
    "left": ("to the left of", "to the right of", (1, 0)),
    "above": ("above", "below", (0, 1)),
}
GROUNDS = {  # mean colour
    "grey": (0.45, 0.45, 0.46),
    "black": (0.12, 0.12, 0.13),
    "sand": (0.80, 0.67, 0.47),
    "wooden": (0.50, 0.33, 0.20),
    "checkered": (0.27, 0.42, 0.43),
}

RADIUS = {"small": 0.085, "large": 0.125}
SPACING = {"one": (0.0,), "two": (-0.20, 0.20), "three": (-0.32, 0.0, 0.32)}
APART = 0.42  # between the two objects of a pair
HELD_OUT_PERCENT = 15
LATTICE = 128  # values along a side of the random lattice that noise is drawn from; it repeats beyond


# ---- what captions say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One object a caption asks for. Its centre is anchor * (width, height) + offset * shorter side."""

    size: str
    colour: str
    shape: str
    anchor: tuple
    offset: tuple


def held_out(kind):
    """Whether this combination is kept from training, under any caption."""
    return hashlib.sha256(kind.caption().encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def _on(text, words, ground):
    return f"{text}, on a {ground} ground" if "ground" in words else text


@dataclass(frozen=True)
class Group:
    """One to three like objects at a place: "two small red cubes on the left, on a sand ground"."""

    number: str
    size: str
    colour: str
    shape: str
    position: str
    ground: str

    WORDS = ("number", "size", "colour", "position", "ground")

    def caption(self, words=WORDS):
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
        return _on(" ".join(parts), words, self.ground)

    def asked(self):
        _, anchor, (dx, dy) = POSITIONS[self.position]
        offsets = [(dx * s, dy * s) for s in SPACING[self.number]]
        return tuple(Asked(self.size, self.colour, self.shape, anchor, offset) for offset in offsets)


@dataclass(frozen=True)
class Pair:
    """Two unlike objects: "a large red ball to the left of a small blue cube, on a sand ground".

    The first object is left of the second, or above it. The same scene has a second wording, which names the other
    object first: "a small blue cube to the right of a large red ball".
    """

    size: str
    colour: str
    shape: str
    relation: str
    size2: str
    colour2: str
    shape2: str
    ground: str

    WORDS = ("size", "colour", "relation", "ground")

    def caption(self, words=WORDS, turned=False):
        """The caption, with only the named words; turned: the wording that names the second object first."""
        ends = [(self.size, self.colour, self.shape), (self.size2, self.colour2, self.shape2)]
        forward, backward, _ = RELATIONS[self.relation]
        between = (backward if turned else forward) if "relation" in words else "and"
        named = []
        for size, colour, shape in reversed(ends) if turned else ends:
            kept = [w for w, name in ((size, "size"), (colour, "colour")) if name in words]
            named.append(" ".join(["a", *kept, shape]))
        return _on(f"{named[0]} {between} {named[1]}", words, self.ground)

    def asked(self):
        dx, dy = (0.5 * APART * d for d in RELATIONS[self.relation][2])
        return (
            Asked(self.size, self.colour, self.shape, (0.5, 0.5), (-dx, -dy)),
            Asked(self.size2, self.colour2, self.shape2, (0.5, 0.5), (dx, dy)),
        )


def _pairs():
    one = tuple(itertools.product(SIZES, COLOURS, SHAPES))
    for first, relation, second, ground in itertools.product(one, RELATIONS, one, GROUNDS):
        if first[1] != second[1] and first[2] != second[2]:
            yield Pair(*first, relation, *second, ground)


GROUPS = tuple(Group(*k) for k in itertools.product(NUMBERS, SIZES, COLOURS, SHAPES, POSITIONS, GROUNDS))
PAIRS = tuple(_pairs())
TRAINING_GROUPS = tuple(k for k in GROUPS if not held_out(k))
TRAINING_PAIRS = tuple(k for k in PAIRS if not held_out(k))
HELD_OUT_GROUPS = tuple(k for k in GROUPS if held_out(k))
HELD_OUT_PAIRS = tuple(k for k in PAIRS if held_out(k))
KIND_OF = {k.caption(): k for k in GROUPS + PAIRS} | {k.caption(turned=True): k for k in PAIRS}  # complete captions


def random_kind(rng, groups=TRAINING_GROUPS, pairs=TRAINING_PAIRS):
    """A kind of scene, by default one of those trained on: half groups, half pairs. rng is a numpy Generator."""
    return groups[rng.integers(len(groups))] if rng.random() < 0.5 else pairs[rng.integers(len(pairs))]


def random_wording(rng, kind):
    """A complete caption of this kind."""
    return kind.caption(turned=rng.random() < 0.5) if isinstance(kind, Pair) else kind.caption()


def random_caption(rng, kind):
    """A caption as seen in training: mostly complete, sometimes with words left out, sometimes (10 %) empty."""
    u = rng.random()
    if u < 0.10:
        return ""
    words = kind.WORDS if u < 0.80 else [w for w in kind.WORDS if rng.random() < 0.6]
    return kind.caption(words, turned=rng.random() < 0.5) if isinstance(kind, Pair) else kind.caption(words)


def held_out_captions(count):
    """Captions of different held-out kinds, half groups, half pairs (every other one turned), always the same ones."""
    rng = np.random.default_rng(0)
    groups, pairs = rng.permutation(len(HELD_OUT_GROUPS)), rng.permutation(len(HELD_OUT_PAIRS))
    captions = [HELD_OUT_GROUPS[k].caption() for k in groups[: count // 2]]
    captions += [HELD_OUT_PAIRS[k].caption(turned=i % 2 == 1) for i, k in enumerate(pairs[: count - count // 2])]
    return [captions[k] for k in rng.permutation(count)]


# ---- scenes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One object of a picture; centre and radius in shorter sides."""

    shape: str
    colour: str
    centre: tuple
    radius: float
    tint: float


@dataclass(frozen=True)
class Light:
    """Where the light comes from, and how uneven it is on the ground."""

    side: float  # from the left (-1) to the right (1)
    slope: float  # brighter at the top (> 0)


@dataclass(frozen=True)
class Scene:
    """A kind, and the little that its caption leaves open."""

    kind: Group | Pair
    shifts: tuple  # (dx, dy) of each object from where the kind has it, in shorter sides
    scales: tuple  # of each object's radius
    tint: float  # brightness of the objects' colour
    light: Light
    texture: int  # seed of the ground's texture

    def things(self, width, height):
        """The objects of a width x height picture."""
        short = min(width, height)
        out = []
        for asked, shift, scale in zip(self.kind.asked(), self.shifts, self.scales):
            centre = expected_centre(asked, width, height)
            centre = tuple(c / short + s for c, s in zip(centre, shift))
            out.append(Thing(asked.shape, asked.colour, centre, RADIUS[asked.size] * scale, self.tint))
        return out


def expected_centre(asked, width, height):
    """(x, y) in pixels of where a caption's object belongs in a width x height picture."""
    short = min(width, height)
    return tuple(a * side + o * short for a, side, o in zip(asked.anchor, (width, height), asked.offset))


SCATTERED_WORDS = ("number", "colour", "ground")  # what a caption can still say of a scattered scene
SCATTERED_RADIUS = (0.075, 0.140)


def random_light(rng):
    return Light(side=rng.uniform(-0.8, 0.8), slope=rng.uniform(0.0, 0.16))


def random_scene(rng, kind):
    """A scene of this kind. The objects of a group move together, those of a pair each for itself."""
    count = len(kind.asked())
    if isinstance(kind, Group):
        shifts, scales = (tuple(rng.uniform(-0.02, 0.02, 2)),) * count, (rng.uniform(0.95, 1.04),) * count
    else:
        shifts = tuple(tuple(rng.uniform(-0.03, 0.03, 2)) for _ in range(count))
        scales = tuple(rng.uniform(0.95, 1.04, count))
    return Scene(kind, shifts, scales, rng.uniform(0.94, 1.0), random_light(rng), int(rng.integers(2**31)))


def scattered_scene(rng, kind, width, height):
    """The kind's objects on its ground, anywhere in a width x height picture, in any size, without touching.

    Of a kind that is trained on never one that would pass for a held-out kind.
    """
    short = min(width, height)
    sides = np.array((width, height)) / short
    asked = kind.asked()
    home = [np.array(expected_centre(a, width, height)) / short for a in asked]
    while True:
        radii = rng.uniform(*SCATTERED_RADIUS, len(asked))
        centres = [rng.uniform(1.2 * r, sides - 1.2 * r) for r in radii]
        apart = (
            np.linalg.norm(centres[i] - centres[k]) - 1.35 * (radii[i] + radii[k])
            for i, k in itertools.combinations(range(len(asked)), 2)
        )
        if min(apart, default=0.0) < 0.0:
            continue
        like = _taken_for(kind, centres, radii, sides)
        if held_out(kind) or like is None or not held_out(like):
            break
    shifts = tuple(tuple(map(float, c - h)) for c, h in zip(centres, home))
    scales = tuple(float(r / RADIUS[a.size]) for r, a in zip(radii, asked))
    return Scene(kind, shifts, scales, rng.uniform(0.94, 1.0), random_light(rng), int(rng.integers(2**31)))


def _taken_for(kind, centres, radii, sides):
    """The kind that these objects come nearest to with these centres and radii; None for a group of unlike sizes."""
    sizes = [min(SIZES, key=lambda name: abs(RADIUS[name] - r)) for r in radii]
    if isinstance(kind, Group):
        middle = np.mean(centres, axis=0)
        away = {name: np.linalg.norm(middle - anchor * sides) for name, (_, anchor, _) in POSITIONS.items()}
        alike = len(set(sizes)) == 1
        return replace(kind, position=min(away, key=away.get), size=sizes[0]) if alike else None
    ends = [(sizes[0], kind.colour, kind.shape), (sizes[1], kind.colour2, kind.shape2)]
    step = centres[1] - centres[0]
    relation = "left" if abs(step[0]) > abs(step[1]) else "above"
    if step @ RELATIONS[relation][2] < 0:
        ends.reverse()
    return Pair(*ends[0], relation, *ends[1], kind.ground)


# ---- textures --------------------------------------------------------------------------------------------------------


def fade(frequency, pixel):
    """Contrast left of a pattern of so many periods a side, drawn with pixels of this size (in sides)."""
    return np.exp(-4.0 * (frequency * pixel) ** 2)


def _noise(lattice, x, y, frequency, pixel):
    """Smooth noise in -1..1 with so many lattice points a side, faded where the pixels are coarser."""
    x, y = x * frequency, y * frequency
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - column, y - row
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    c0, c1, r0, r1 = column % LATTICE, (column + 1) % LATTICE, row % LATTICE, (row + 1) % LATTICE
    top = lattice[r0, c0] * (1 - u) + lattice[r0, c1] * u
    bottom = lattice[r1, c0] * (1 - u) + lattice[r1, c1] * u
    return (top * (1 - v) + bottom * v) * fade(0.6 * frequency, pixel)


def _waves(frequency, at, pixel):
    return np.cos(2 * np.pi * frequency * at) * fade(frequency, pixel)


def ground_texture(ground, x, y, pixel, seed):
    """Brightness of a ground relative to its mean, float [h, w]; x, y and pixel in shorter sides."""
    rng = np.random.default_rng(seed)
    lattice = rng.uniform(-1.0, 1.0, (LATTICE, LATTICE)).astype(np.float32)
    x, y = np.broadcast_arrays(x + np.float32(rng.uniform(0, 1)), y + np.float32(rng.uniform(0, 1)))
    if ground == "grey":  # stone
        return 1.0 + 0.06 * _noise(lattice, x, y, 22, pixel) + 0.16 * _noise(lattice, x, y, 90, pixel)
    if ground == "black":  # woven cloth
        return 1.0 + 0.55 * _waves(40, x, pixel) * np.cos(2 * np.pi * 40 * y) + 0.10 * _noise(lattice, x, y, 60, pixel)
    if ground == "sand":  # ripples and grain
        bent = y + 0.03 * _noise(lattice, x, y, 4, pixel)
        return 1.0 + 0.035 * _waves(14, bent, pixel) + 0.13 * _noise(lattice, x, y, 100, pixel)
    if ground == "wooden":  # planks five to a side, their grain, dark seams
        plank = np.floor(5 * y).astype(int)
        inside = np.abs(5 * y - plank - 0.5)  # 0 in the middle of a plank, 0.5 at its seams
        seam = np.clip((inside - 0.5) / (5 * max(pixel, 0.008)) + 1.0, 0.0, 1.0) * min(0.008 / pixel, 1.0)
        shade = 0.07 * lattice[plank % LATTICE, 0]
        bent = y + 0.012 * _noise(lattice, 0.25 * x + 0.37 * plank, y, 18, pixel) + 0.1 * plank
        return (1.0 + shade + 0.13 * _waves(46, bent, pixel) + 0.06 * _waves(19, bent, pixel)) * (1.0 - 0.4 * seam)
    if ground == "checkered":  # tiles eight to a side, a fine hatching on them
        across, down = (np.clip(np.sin(2 * np.pi * 4 * at) / (2 * np.pi * 4 * pixel), -0.5, 0.5) for at in (x, y))
        return 1.0 + 0.40 * across * down + 0.10 * _waves(50, 0.7 * (x + y), pixel)
    raise ValueError(f"unknown ground {ground!r}; known: {', '.join(GROUNDS)}")


# ---- objects ---------------------------------------------------------------------------------------------------------
# Each takes (u, v) in radii from the object's centre, v downwards, the side the light comes from and the size of a
# pixel in radii, and returns the signed distance to the outline (in radii), the shade of the colour, and the gloss.


def _ball(u, v, light, pixel):
    """A ball with fine grooves around it."""
    rr = u * u + v * v
    z = np.sqrt(np.maximum(1.0 - rr, 0.0))
    lit = np.maximum(0.56 * light * u - 0.55 * v + 0.70 * z, 0.0)
    spot = np.exp(-((u - 0.45 * light) ** 2 + (v + 0.40) ** 2) / 0.035)
    return np.sqrt(rr) - 1.0, 0.66 + 0.36 * lit + 0.12 * z * _waves(4.5, v, pixel), 0.55 * spot


def _cube(u, v, light, pixel):
    """A cube seen from the front and a little above: the top face is a lighter strip, the front is finely checked."""
    half, corner = 0.90, 0.06
    qx, qy = np.abs(u) - (half - corner), np.abs(v) - (half - corner)
    distance = np.hypot(np.maximum(qx, 0.0), np.maximum(qy, 0.0)) + np.minimum(np.maximum(qx, qy), 0.0) - corner
    top = 0.5 - 0.5 * np.tanh((v + 0.42) / 0.06)
    check = _waves(3.5, u, pixel) * np.cos(2 * np.pi * 3.5 * v) * (1.0 - top)
    return distance, 0.84 - 0.10 * v + 0.06 * light * u + 0.12 * top + 0.13 * check, 0.18 * top


def _cone(u, v, light, pixel):
    """A cone: a triangle on a flat ellipse, with fine rings."""
    apex, base, half, bulge = -1.10, 0.80, 1.05, 0.16
    height = base - apex
    side = (np.abs(u) * height - (v - apex) * half) / np.hypot(height, half)
    curve = np.sqrt(np.maximum(1.0 - (u / half) ** 2, 0.0)) * bulge
    distance = np.maximum(side, v - base - curve)
    across = u / np.maximum((v - apex) / height * half, 0.15)
    rings = _waves(4.0, v - curve, pixel)
    shade = 0.82 + 0.25 * light * np.clip(across, -1.0, 1.0) + 0.11 * rings
    return distance, shade, 0.25 * np.exp(-((across - 0.45 * light) ** 2) / 0.03)


_SHAPE_OF = {"ball": _ball, "cube": _cube, "cone": _cone}


# ---- pictures --------------------------------------------------------------------------------------------------------


def render_things(things, ground, light, texture, width, height, window=None):
    """The picture, float32 [h, w, 3] in 0..1. window = (left, top, width, height) in pixels draws only that part."""
    short = min(width, height)
    left, top, columns, rows = window or (0, 0, width, height)
    x = ((left + np.arange(columns, dtype=np.float32) + 0.5) / short)[None, :]
    y = ((top + np.arange(rows, dtype=np.float32) + 0.5) / short)[:, None]

    bright = (1.0 + light.slope * (0.5 - y * short / height)) * (1.0 + 0.10 * light.side * (x * short / width - 0.5))
    for thing in things:
        u, v = (x - thing.centre[0]) / thing.radius, (y - thing.centre[1]) / thing.radius
        bright = bright * (1.0 - 0.30 * np.exp(-((u + 0.40 * light.side) ** 2) / 0.9 - ((v - 1.0) ** 2) / 0.10))
        bright = bright * (1.0 - 0.22 * np.exp(-(u**2) / 0.6 - ((v - 0.92) ** 2) / 0.02))  # where it touches
    bright = bright * ground_texture(ground, x, y, 1.0 / short, texture)
    picture = bright[..., None] * np.asarray(GROUNDS[ground], np.float32)

    for thing in things:
        u, v = (x - thing.centre[0]) / thing.radius, (y - thing.centre[1]) / thing.radius
        pixel = 1.0 / (thing.radius * short)
        distance, shade, gloss = _SHAPE_OF[thing.shape](*np.broadcast_arrays(u, v), light.side, pixel)
        if thing.colour == "white":  # keeps the shaded side apart from a grey or sand ground
            shade = 0.5 + 0.5 * shade
        cover = np.clip(0.5 - distance / pixel, 0.0, 1.0)[..., None]
        body = shade[..., None] * (np.asarray(COLOURS[thing.colour], np.float32) * thing.tint)
        body = body + gloss[..., None] * (1.0 - body)
        picture = picture + cover * (body - picture)
    return np.clip(picture, 0.0, 1.0).astype(np.float32)


def render(scene, width, height=None, window=None):
    """The picture of a scene, square unless a height is given; window as for render_things."""
    height = height or width
    things = scene.things(width, height)
    return render_things(things, scene.kind.ground, scene.light, scene.texture, width, height, window)


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
    ground, light, texture = tuple(GROUNDS)[rng.integers(len(GROUNDS))], random_light(rng), int(rng.integers(2**31))
    return render_things(things, ground, light, texture, size, size, window)


def outline(shape, centre, radius, width, height):
    """Coverage of every pixel of a width x height picture by one object, float [height, width] in 0..1.

    centre (x, y) and radius are in pixels.
    """
    u, v = np.meshgrid(
        (np.arange(width) + 0.5 - centre[0]) / radius, (np.arange(height) + 0.5 - centre[1]) / radius
    )
    return np.clip(0.5 - _SHAPE_OF[shape](u, v, 0.0, 1.0)[0] * radius, 0.0, 1.0)


def outlines(scene, width, height=None, line=None, window=None):
    """The edges of a scene's objects, white on black, float32 [height, width] in 0..1; nothing of ground and shading.

    line: how wide they are, in pixels; a 64th of the shorter side unless given. A line narrower than a pixel is as much
    darker. window as for render_things.
    """
    height = height or width
    short = min(width, height)
    line = short / 64 if line is None else line
    left, top, columns, rows = window or (0, 0, width, height)
    x = (left + np.arange(columns, dtype=np.float32) + 0.5)[None, :]
    y = (top + np.arange(rows, dtype=np.float32) + 0.5)[:, None]
    picture = np.zeros((rows, columns), np.float32)
    for thing in scene.things(width, height):
        radius = thing.radius * short
        u, v = np.broadcast_arrays(*((at / short - c) / thing.radius for at, c in zip((x, y), thing.centre)))
        distance = _SHAPE_OF[thing.shape](u, v, 0.0, 1.0)[0] * radius
        edge = np.clip(0.5 * (line + 1.0) - np.abs(distance), 0.0, min(line, 1.0))
        picture = np.where(distance < 0.0, edge, np.maximum(picture, edge))  # an object hides what is behind it
    return picture.astype(np.float32)


def to_image(picture):
    """The PIL image of a float [h, w, 3] picture in 0..1."""
    return Image.fromarray((picture * 255.0 + 0.5).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description="Draw a contact sheet of random scenes and print their captions.")
    parser.add_argument("--out", default="scenes.png", help="PNG to write")
    parser.add_argument("--size", type=int, default=64, help="shorter side of one picture in pixels")
    parser.add_argument("--aspect", type=float, default=1.0, help="width over height")
    parser.add_argument("--count", type=int, default=16, help="number of pictures")
    parser.add_argument("--columns", type=int, default=4, help="pictures in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, metavar="N", help="only print N captions that are never trained on")
    args = parser.parse_args()
    if args.held_out:
        print("\n".join(held_out_captions(args.held_out)))
        return

    rng = np.random.default_rng(args.seed)
    width, height = round(args.size * max(args.aspect, 1.0)), round(args.size / min(args.aspect, 1.0))
    rows = -(-args.count // args.columns)
    sheet = np.zeros((rows * height, args.columns * width, 3), np.float32)
    for i in range(args.count):
        kind = random_kind(rng, GROUPS, PAIRS)
        r, c = divmod(i, args.columns)
        drawn = render(random_scene(rng, kind), width, height)
        sheet[r * height : (r + 1) * height, c * width : (c + 1) * width] = drawn
        print(kind.caption())
    to_image(sheet).save(args.out)


if __name__ == "__main__":
    main()
