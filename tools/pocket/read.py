"""Reads back the objects and the ground of a picture in the style of scenes.py, and judges it by its caption.

No learned parts; any size and aspect ratio. The ground's colour is the median of the picture; a pixel belongs to an
object if no brightness of the ground's colour explains it, so shadows and textures stay ground. Connected pixels form
an object, parted where two colours meet or where a neck joins two bodies. Its shape is the one whose outline, with the
same area and middle, differs least; its colour follows from hue and saturation.

    python read.py picture.png ...          prints what is seen
    python read.py --score DIR              scores DIR/000.png, 001.png, ... against heldout.txt, line by line
    python read.py --self-test              scores renderings of known scenes: the reader's own error

As a module:

    reading = read.read(read.load(path))                     # a Reading: objects and ground
    verdict = read.judge(reading, scenes.KIND_OF[caption])   # a Verdict: what is right, duplicates, position error
    verdict.right, verdict.objects, verdict.duplicates, verdict.position_error
"""

import argparse
import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

import scenes

HELD_OUT = Path(__file__).resolve().parent / "heldout.txt"

WORKING_SIDE = 96  # pictures whose shorter side is at least twice this are read at a half, a third, ...
GROUND_SHADES = (0.40, 1.35)  # of the ground's median: shadows and seams to the lit tiles
GROUND_DISTANCE = 0.17  # RGB distance from every shade of the ground, beyond which a pixel is an object's
MIN_AREA = 0.005  # of the squared shorter side; a small cone covers 0.013
WHITE_SATURATION = 0.30
HUES = {"red": 0.0, "yellow": 50.0, "green": 128.0, "blue": 226.0, "purple": 283.0}  # degrees, of scenes.COLOURS
BLURS = (0.0, 0.008, 0.016)  # of the shorter side: the outlines are compared sharp and a little blurred
SMALL_BELOW = 0.104  # radius in shorter sides: between 0.085 and 0.125
NECK = 0.0625  # of the shorter side: bodies joined by less than twice this are two objects
OTHER_COLOUR = 0.25  # share of a body's pixels from which a second colour is a second object


@dataclass(frozen=True)
class Seen:
    """One object. centre (x, y) in pixels of the picture, radius in shorter sides.

    misfit: mean squared difference of the object's coverage from its shape's outline, over the object's area. The
    shape is only the likest of the three, so a lozenge passes for a ball: the misfit tells.
    """

    shape: str
    colour: str
    size: str
    centre: tuple
    radius: float
    misfit: float

    def __str__(self):
        x, y = self.centre
        return f"{self.size} {self.colour} {self.shape} at {x:.0f},{y:.0f}"


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture of width x height pixels; the objects from the left."""

    objects: tuple
    ground: str
    width: int
    height: int

    def __str__(self):
        return "; ".join(map(str, self.objects)) + f"; {self.ground} ground"


@dataclass(frozen=True)
class Verdict:
    """How a picture compares with its caption. Each asked object is matched with the seen one most like it.

    number: as many objects as asked. size, colour, shape: those of every asked object right. place: the group nearest
    to its place among the five, or the pair in its relation. A missing object makes all of them wrong, a superfluous
    one only the number.
    """

    number: bool
    size: bool
    colour: bool
    shape: bool
    place: bool
    ground: bool
    duplicates: int  # objects beyond those asked for
    missing: int  # asked for and not there
    position_error: float | None  # mean distance of the matched objects from their places, in shorter sides
    misfit: float | None  # mean over the objects seen

    ATTRIBUTES = ("number", "size", "colour", "shape", "place", "ground")

    @property
    def objects(self):
        """Exactly the objects asked for, at their place; on any ground."""
        return self.number and self.size and self.colour and self.shape and self.place

    @property
    def right(self):
        """Wholly right: the objects and the ground."""
        return self.objects and self.ground


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path):
    """A picture file as float32 [h, w, 3] in 0..1."""
    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255.0


def shrunk(picture):
    """The picture with a shorter side of 96 to 191 pixels if it was larger; its textures average out."""
    height, width = picture.shape[:2]
    factor = min(width, height) // WORKING_SIDE
    if factor < 2:
        return picture
    to = (round(width / factor), round(height / factor))
    planes = [Image.fromarray(np.ascontiguousarray(picture[..., c])).resize(to, Image.BOX) for c in range(3)]
    return np.stack([np.asarray(p) for p in planes], axis=-1)


def from_ground(picture):
    """(distance of every pixel from the ground's colour in any shade, that colour) of a float [h, w, 3] picture."""
    ground = np.median(picture.reshape(-1, 3), axis=0)
    shade = np.clip(picture @ ground / max(ground @ ground, 1e-4), *GROUND_SHADES)
    return np.linalg.norm(picture - shade[..., None] * ground, axis=-1), ground


def nearest(value, table, distance):
    return min(table, key=lambda name: distance(value, table[name]))


def colour_classes(pixels):
    """Index into scenes.COLOURS of each of [n, 3] pixels."""
    names = list(scenes.COLOURS)
    out = []
    for r, g, b in pixels:
        hue, saturation, _ = colorsys.rgb_to_hsv(r, g, b)
        white = saturation < WHITE_SATURATION
        hued = nearest(hue * 360, HUES, lambda a, b: abs((a - b + 180) % 360 - 180))
        out.append(names.index("white" if white else hued))
    return np.array(out, int)


def nearest_piece(part, pieces):
    """The pixels of part, each given to the labelled piece nearest to it: a list of masks."""
    at = ndimage.distance_transform_edt(pieces == 0, return_distances=False, return_indices=True)
    owner = pieces[tuple(at)]
    return [part & (owner == k) for k in range(1, pieces.max() + 1)]


def inner(part):
    """The part without its blended edge, where anything is left then."""
    eroded = ndimage.binary_erosion(part)
    return eroded if eroded.any() else part


def filled(part):
    """The part without holes: a highlight on a red cone can have the colour of wood."""
    return ndimage.binary_fill_holes(part | ndimage.binary_closing(np.pad(part, 2))[2:-2, 2:-2])


def by_colour(part, picture, least):
    """The part, divided where it has two colours."""
    body = inner(part)
    classes = colour_classes(picture[body])
    count = np.bincount(classes, minlength=len(scenes.COLOURS))
    kept = [k for k in range(len(count)) if count[k] >= max(OTHER_COLOUR * count.sum(), 0.5 * least)]
    if len(kept) < 2:
        return [part]
    pieces = np.zeros(part.shape, int)
    values = np.zeros(len(classes), int)
    for label, k in enumerate(kept, 1):
        values[classes == k] = label
    pieces[body] = values
    return nearest_piece(part, pieces)


def by_neck(part, short, least):
    """The part, divided at necks thinner than 2 * NECK."""
    for steps in range(1, max(1, round(NECK * short)) + 1):
        pieces, _ = ndimage.label(ndimage.binary_erosion(part, iterations=steps))
        areas = np.bincount(pieces.ravel())[1:]
        large = np.flatnonzero(areas >= 0.3 * least) + 1
        if len(large) > 1:
            renumbered = np.zeros(pieces.shape, int)
            for label, k in enumerate(large, 1):
                renumbered[pieces == k] = label
            return nearest_piece(part, renumbered)
    return [part]


def outline_constants(shape):
    """(area over squared radius, how far the area's middle is below the centre, in radii) of a shape."""
    side, radius = 512, 128
    cover = scenes.outline(shape, (side / 2, side / 2), radius, side, side)
    return cover.sum() / radius**2, (ndimage.center_of_mass(cover)[0] + 0.5 - side / 2) / radius


OUTLINES = {shape: outline_constants(shape) for shape in scenes.SHAPES}


def read_shape(cover, short):
    """(misfit, shape, radius, centre), in pixels, of the one object whose coverage of each pixel is given."""
    row, column = (c + 0.5 for c in ndimage.center_of_mass(cover))
    best = None
    for shape, (area_over_square, below) in OUTLINES.items():
        radius = np.sqrt(cover.sum() / area_over_square)
        centre = (column, row - below * radius)
        sharp = scenes.outline(shape, centre, radius, cover.shape[1], cover.shape[0])
        for blur in BLURS:
            error = np.square(ndimage.gaussian_filter(sharp, blur * short) - cover).sum()
            if best is None or error < best[0]:
                best = (error, shape, radius, centre)
    return best[0] / cover.sum(), *best[1:]


def read_object(part, picture, distance, scale):
    """The object that a mask of pixels is."""
    short, margin = min(part.shape), 3 + min(part.shape) // 32
    rows, columns = np.nonzero(part)
    top, left = max(rows.min() - margin, 0), max(columns.min() - margin, 0)
    window = (slice(top, rows.max() + margin + 1), slice(left, columns.max() + margin + 1))
    part, picture, distance = part[window], picture[window], distance[window]
    body = inner(part)
    near = ndimage.binary_dilation(part, iterations=max(1, short // 64))
    cover = np.maximum(np.clip(distance / np.median(distance[body]), 0.0, 1.0), body) * near
    misfit, shape, radius, (x, y) = read_shape(cover, short)
    classes = np.bincount(colour_classes(picture[body]), minlength=len(scenes.COLOURS))
    return Seen(
        shape=shape,
        colour=list(scenes.COLOURS)[classes.argmax()],
        size="small" if radius / short < SMALL_BELOW else "large",
        centre=((left + x) * scale[0], (top + y) * scale[1]),
        radius=radius / short,
        misfit=float(misfit),
    )


def read(picture):
    """The Reading of a float [h, w, 3] picture in 0..1; the shorter side is 48 pixels or more."""
    height, width = picture.shape[:2]
    picture = shrunk(picture)
    short, least = min(picture.shape[:2]), MIN_AREA * min(picture.shape[:2]) ** 2
    scale = (width / picture.shape[1], height / picture.shape[0])
    distance, ground_colour = from_ground(picture)
    labels, count = ndimage.label(distance > GROUND_DISTANCE)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    parts = [filled(labels == k) for k in range(1, count + 1) if areas[k] >= least]
    parts = [q for p in parts for q in by_colour(p, picture, least)]
    parts = [q for p in parts for q in by_neck(p, short, least) if q.sum() >= least]
    return Reading(
        objects=tuple(sorted((read_object(p, picture, distance, scale) for p in parts), key=lambda o: o.centre)),
        ground=nearest(ground_colour, scenes.GROUNDS, lambda a, b: np.linalg.norm(a - np.array(b))),
        width=width,
        height=height,
    )


# ---- judging ---------------------------------------------------------------------------------------------------------


def matched(reading, asked):
    """[(asked object, seen object, their distance in shorter sides)], the most alike with each other."""
    short = min(reading.width, reading.height)
    cost, apart = (np.zeros((len(asked), len(reading.objects))) for _ in range(2))
    for i, want in enumerate(asked):
        place = scenes.expected_centre(want, reading.width, reading.height)
        for k, seen in enumerate(reading.objects):
            apart[i, k] = np.hypot(seen.centre[0] - place[0], seen.centre[1] - place[1]) / short
            unlike = (seen.colour != want.colour) + (seen.shape != want.shape) + 0.5 * (seen.size != want.size)
            cost[i, k] = 2.0 * unlike + apart[i, k]
    return [(asked[i], reading.objects[k], apart[i, k]) for i, k in zip(*linear_sum_assignment(cost))]


def in_place(reading, kind, pairs):
    """Whether all the asked objects, matched as pairs, are where the caption says."""
    short = min(reading.width, reading.height)
    centres = [np.array(seen.centre) / short for _, seen, _ in pairs]
    if isinstance(kind, scenes.Pair):
        along = np.array(scenes.RELATIONS[kind.relation][2])
        step = centres[1] - centres[0]
        return bool(step @ along > np.abs(step @ along[::-1]))
    sides = np.array((reading.width, reading.height)) / short
    places = {name: np.array(anchor) * sides for name, (_, anchor, _) in scenes.POSITIONS.items()}
    return nearest(np.mean(centres, axis=0), places, lambda a, b: np.linalg.norm(a - b)) == kind.position


def judge(reading, kind):
    """The Verdict on a Reading of a picture of this kind (scenes.Group or scenes.Pair)."""
    asked = kind.asked()
    pairs = matched(reading, asked)
    complete = len(pairs) == len(asked)
    return Verdict(
        number=len(reading.objects) == len(asked),
        size=complete and all(seen.size == want.size for want, seen, _ in pairs),
        colour=complete and all(seen.colour == want.colour for want, seen, _ in pairs),
        shape=complete and all(seen.shape == want.shape for want, seen, _ in pairs),
        place=complete and in_place(reading, kind, pairs),
        ground=reading.ground == kind.ground,
        duplicates=max(0, len(reading.objects) - len(asked)),
        missing=max(0, len(asked) - len(reading.objects)),
        position_error=float(np.mean([apart for _, _, apart in pairs])) if pairs else None,
        misfit=float(np.mean([seen.misfit for seen in reading.objects])) if reading.objects else None,
    )


# ---- command line ----------------------------------------------------------------------------------------------------


def held_out_captions(path=HELD_OUT):
    """The captions of a file, one a line."""
    return path.read_text().splitlines()


def kind_of(caption):
    """The kind of a complete caption; ValueError for any other."""
    try:
        return scenes.KIND_OF[caption]
    except KeyError:
        raise ValueError(f"not a complete caption of scenes.py: {caption!r}") from None


def print_score(verdicts, kinds):
    """Share of the verdicts with each attribute right, with all of them, and the same for groups and pairs alone."""

    def line(name, right):
        print(f"{name:16} {sum(right):5} of {len(right)}  {100 * sum(right) / max(len(right), 1):6.2f} %")

    for name in Verdict.ATTRIBUTES:
        line(name, [getattr(v, name) for v in verdicts])
    line("objects (5)", [v.objects for v in verdicts])
    line("wholly right (6)", [v.right for v in verdicts])
    for name, kind in (("  of groups", scenes.Group), ("  of pairs", scenes.Pair)):
        line(name, [v.right for v, k in zip(verdicts, kinds) if isinstance(k, kind)])
    misfits = [v.misfit for v in verdicts if v.misfit is not None]
    errors = [v.position_error for v in verdicts if v.position_error is not None]
    print(
        f"a picture: {np.mean([v.duplicates for v in verdicts]):.3f} duplicates, "
        f"{np.mean([v.missing for v in verdicts]):.3f} missing, "
        f"position error {np.mean(errors or [np.nan]):.4f} sides, misfit {np.mean(misfits or [np.nan]):.4f}"
    )


def score_directory(directory, captions, verbose=False):
    """Scores DIR/NNN.png, the picture of captions[NNN], and returns the verdicts; absent pictures are not counted."""
    paths = [directory / f"{i:03d}.png" for i in range(len(captions))]
    paths = [path for path in paths if path.exists()]
    if not paths:
        raise FileNotFoundError(f"{directory} has none of 000.png to {len(captions) - 1:03d}.png")
    kinds = [kind_of(captions[int(path.stem)]) for path in paths]
    verdicts = []
    for path, kind in zip(paths, kinds):
        reading = read(load(path))
        verdicts.append(judge(reading, kind))
        if verbose:
            wrong = [name for name in Verdict.ATTRIBUTES if not getattr(verdicts[-1], name)]
            print(f"{path.name} {' '.join(wrong) or 'right'} | asked: {captions[int(path.stem)]} | seen: {reading}")
    print_score(verdicts, kinds)
    return verdicts


def self_test(width, height, count):
    """The reader's error on renderings, rounded to 8 bits as a PNG is; returns the verdicts."""
    rng = np.random.default_rng([width, height])
    kinds = [scenes.random_kind(rng, scenes.GROUPS, scenes.PAIRS) for _ in range(count)]
    verdicts = []
    for kind in kinds:
        picture = scenes.render(scenes.random_scene(rng, kind), width, height)
        verdicts.append(judge(read(np.round(picture * 255).astype(np.float32) / 255), kind))
    print(f"{count} renderings at {width}x{height}")
    print_score(verdicts, kinds)
    return verdicts


SELF_TEST_SIZES = (  # all final sizes of tools/eval/rows.py, and 64x128
    *("64x64", "80x80", "96x96", "112x112", "128x128", "192x192", "256x256"),
    *("64x128", "92x180", "180x92", "64x256", "256x64"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="PNG files to read")
    parser.add_argument("--score", type=Path, metavar="DIR", help="score the pictures NNN.png in DIR")
    parser.add_argument("--captions", type=Path, default=HELD_OUT, help="captions of --score, one in a line")
    parser.add_argument("--verbose", action="store_true", help="with --score: also print each picture's reading")
    parser.add_argument("--self-test", action="store_true", help="measure the reader on renderings")
    parser.add_argument("--count", type=int, default=1000, help="renderings per size in --self-test")
    parser.add_argument("--sizes", nargs="+", default=SELF_TEST_SIZES, help="WIDTHxHEIGHT, for --self-test")
    args = parser.parse_args()
    for path in args.files:
        print(f"{path}: {read(load(path))}")
    if args.score:
        score_directory(args.score, held_out_captions(args.captions), args.verbose)
    if args.self_test:
        for size in args.sizes:
            self_test(*map(int, size.split("x")), args.count)


if __name__ == "__main__":
    main()
