"""The ablation's tables: which rows, made with which flags of `megafuse generate`, measured how.

Wu et al., WACV 2025, arXiv:2408.11001. A table here does on the pocket model what one there does on SD 1.5.
"""

from dataclasses import dataclass

STEPS = 50
NATIVE = (64, 64)


@dataclass(frozen=True)
class Row:
    """One row of a table. Equal flags and size in two tables are one run."""

    name: str
    size: tuple  # (width, height) in pixels
    flags: tuple
    x: float | None = None  # place on a plot's axis
    enlarged: bool = False  # the native row's pictures, resized to `size`; `flags` are the native row's


@dataclass(frozen=True)
class Table:
    """`baseline`: the row whose captions the others are compared with one by one. `axis`: what Row.x is."""

    key: str
    title: str
    rows: tuple
    baseline: str
    axis: str | None = None
    quick: bool = False  # part of --quick


def sized(width, height=None):
    return (width, height or width)


def plain(size):
    return ("--method", "plain", "--size", f"{size[0]}x{size[1]}", "--steps", str(STEPS))


def relayed(stages, *flags, reschedule=False, dilation=1):
    """MegaFusion by stages [(width, height, steps)]; everything the method's name would choose is said."""
    text = ",".join(f"{w}x{h}:{n}" for w, h, n in stages)
    options = ("--reschedule", "true" if reschedule else "false", "--dilation", str(dilation))
    return ("--method", "megafusion", "--stages", text, *options, *flags)


def square(*stages):
    return [(side, side, steps) for side, steps in stages]


# The paper's share: 40 of 50 steps at the native size, sides growing linearly (src/methods/stages.rs).
PAPER = {
    2: square((64, 40), (96, 5), (128, 5)),
    3: square((64, 40), (108, 4), (148, 3), (192, 3)),
    4: square((64, 40), (128, 4), (192, 3), (256, 3)),
}
ASPECTS = {  # of the area of 128x128
    "1:4": [(32, 128, 40), (48, 192, 5), (64, 256, 5)],
    "1:2": [(44, 92, 40), (68, 136, 5), (92, 180, 5)],
    "1:1": PAPER[2],
    "2:1": [(92, 44, 40), (136, 68, 5), (180, 92, 5)],
    "4:1": [(128, 32, 40), (192, 48, 5), (256, 64, 5)],
}
NATIVE_ROW = Row("native size", NATIVE, plain(NATIVE))
PLUS = {"reschedule": True, "dilation": 2}


def last(stages):
    return stages[-1][:2]


def methods(scale):
    stages = PAPER[scale]
    size = last(stages)
    late = [(*NATIVE, STEPS - 1), (*size, 1)]
    rows = (
        Row("native size, enlarged (bicubic)", size, NATIVE_ROW.flags, enlarged=True),
        Row("direct sampling", size, plain(size)),
        Row("T&R", size, relayed(stages)),
        Row("T&R + D", size, relayed(stages, dilation=2)),
        Row("T&R + R", size, relayed(stages, reschedule=True)),
        Row("T&R + D + R (++)", size, relayed(stages, **PLUS)),
        Row("T&R, one relay before the last step", size, relayed(late)),
    )
    title = f"Methods at {scale} times the side (Table 3): {size[0]}x{size[1]}"
    return Table(f"methods-{scale}x", title, rows, "T&R", quick=scale == 2)


# The other methods: name and flags beside size and steps. A further one is a line.
OTHERS = (
    ("hires fix", ("--method", "hires-fix")),
    ("hires fix, the last 0.3", ("--method", "hires-fix", "--denoise", "0.3")),
    ("HiDiffusion", ("--method", "hidiffusion")),
    # By default windows overlap by 7/8: 9 times as many at twice the side, and as long.
    ("MultiDiffusion, windows half overlapping", ("--method", "multidiffusion", "--stride", "16")),
    ("DemoFusion", ("--method", "demofusion")),
    ("DiffuseHigh", ("--method", "diffusehigh")),
    ("ScaleCrafter", ("--method", "scalecrafter")),
    ("ScaleDiff", ("--method", "scalediff")),
    ("Upsample Guidance", ("--method", "upsample-guidance")),
    ("PixelRush", ("--method", "pixelrush")),
    ("FreCaS", ("--method", "frecas")),
    ("FouriScale", ("--method", "fouriscale")),
)
CACHES = ("ucache", "easycache", "spectrum")


def others(scale):
    size = last(PAPER[scale])
    at = ("--size", f"{size[0]}x{size[1]}", "--steps", str(STEPS))
    rows = (
        Row("native size, enlarged (bicubic)", size, NATIVE_ROW.flags, enlarged=True),
        Row("direct sampling", size, plain(size)),
        Row("T&R", size, relayed(PAPER[scale])),
        *(Row(name, size, (*flags, *at)) for name, flags in OTHERS),
    )
    return Table(f"others-{scale}x", f"Other methods at {scale} times the side: {size[0]}x{size[1]}", rows, "T&R")


def caches():
    """Plain sampling where the model was trained, and T&R at twice the side."""
    rows = [Row("T&R", sized(128), relayed(PAPER[2]))]
    rows += [Row(f"T&R, {name}", sized(128), relayed(PAPER[2], "--cache", name)) for name in CACHES]
    rows += [Row("direct sampling", sized(128), plain(sized(128)))]
    rows += [Row(f"direct, {name}", sized(128), (*plain(sized(128)), "--cache", name)) for name in CACHES]
    return Table("caches", "Step caches (ours), 128x128", tuple(rows), "T&R")


def caches_native():
    rows = [Row(f"plain, {name}", NATIVE, (*plain(NATIVE), "--cache", name)) for name in CACHES]
    return Table("caches-native", "Step caches (ours) at the native size", (NATIVE_ROW, *rows), NATIVE_ROW.name)


def upsamplers():
    names = ("bilinear", "bicubic", "bicubic-gaussian", "bicubic-edge")
    rows = []
    for name in names:
        flags = () if name == "bicubic" else ("--upsampler", name)  # the default: the run of the methods' table
        rows.append(Row(name, sized(128), relayed(PAPER[2], *flags, **PLUS)))
    return Table("upsamplers", "Upsamplers of the relay (Table 4), ++ at 128x128", tuple(rows), "bicubic", quick=True)


def truncation():
    rows = []
    for steps in (20, 30, 35, 40, 45, 48, 49):
        stages = square((64, steps), (128, STEPS - steps))
        rows.append(Row(f"{steps} of {STEPS}", sized(128), relayed(stages), x=steps))
    return Table("truncation", "Steps before the relay (figure 9), T&R 64x64 to 128x128", tuple(rows), "40 of 50",
        axis="steps at 64x64")  # fmt: skip


def scale():
    rows = []
    for side in (80, 96, 112, 128):
        rows.append(Row(f"{side}x{side}", sized(side), relayed(square((64, 40), (side, 10))), x=side / NATIVE[0]))
    title = "Side length (ours), T&R with one relay before the last 10 of 50 steps"
    return Table("scale", title, tuple(rows), "128x128", axis="side / 64")


def gamma():
    stages = square((64, 40), (128, 10))
    rows = [
        Row("1 (none)", sized(128), relayed(stages), x=1),
        Row("4 (ratio of areas)", sized(128), relayed(stages, reschedule=True), x=4),
    ]
    for value in (2, 6, 8):
        rows.append(Row(str(value), sized(128), relayed(stages, "--gamma", str(value), reschedule=True), x=value))
    rows.sort(key=lambda row: row.x)
    title = "gamma of the noise re-scheduling (figure 8), T&R + R 64x64 to 128x128"
    return Table("gamma", title, tuple(rows), "1 (none)", axis="gamma")


def delta():
    rows = [Row(str(d), sized(128), relayed(PAPER[2], dilation=d), x=d) for d in (1, 2, 3, 4)]
    return Table("delta", "Dilation delta (figure 8), T&R + D at 128x128", tuple(rows), "1", axis="delta")


def guidance():
    rows = []
    for scale in (1, 2, 3, 5, 7):
        # first among the flags, as the shared one it takes the place of: an equal value is the methods' table's run
        rows.append(Row(f"{scale}", sized(128), ("--guidance", str(scale), *relayed(PAPER[2])), x=scale))
    return Table("guidance", "Guidance scale (figure 5), T&R at 128x128", tuple(rows), "2", axis="guidance scale")


def aspects():
    rows = []
    for name, stages in ASPECTS.items():
        size = last(stages)
        rows.append(Row(f"{name}, direct", size, plain(size)))
        rows.append(Row(f"{name}, T&R", size, relayed(stages)))
        rows.append(Row(f"{name}, ++", size, relayed(stages, **PLUS)))
    return Table("aspects", "Aspect ratios (width to height), area of 128x128", tuple(rows), "1:1, T&R")


def relay_noise():
    def row(name, *flags, **options):
        return Row(name, sized(128), relayed(PAPER[2], *flags, **options))

    rows = (
        row("T&R: the next step's (ours)"),
        row("T&R: the last step's (the paper's text)", "--relay-noise-offset=-1"),
        row("T&R: the published code's quirks", "--reference-compat"),
        row("++: the next step's (ours)", **PLUS),
        row("++: the last step's (the paper's text)", "--relay-noise-offset=-1", **PLUS),
        row("++: two steps less (as the code has for SDXL)", "--relay-noise-offset=2", **PLUS),
        row("++: the published code's quirks", "--reference-compat", **PLUS),
    )
    return Table(
        "relay-noise", "Noise level after a relay, at 128x128", rows, "T&R: the next step's (ours)", quick=True
    )


TABLES = (
    *(methods(scale) for scale in PAPER),
    upsamplers(),
    truncation(),
    scale(),
    gamma(),
    delta(),
    guidance(),
    aspects(),
    relay_noise(),
    *(others(scale) for scale in (2, 4)),
    caches_native(),
    caches(),
)
