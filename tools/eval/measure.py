"""What a row of the ablation is measured by, picture by picture and as a set."""

import hashlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

import distances
import features
import pictures
import sharpness
from common import EvalError

HERE = Path(__file__).resolve().parent
POCKET = HERE.parent / "pocket"
sys.path.insert(0, str(POCKET))

import read  # noqa: E402
import scenes  # noqa: E402

CROPS = pictures.Crops(side=features.SIDE, count=4, seed=0)
TRUTHS = 3  # true renderings of every caption: the first is measured as a row itself, the others are the reference
SINGLE = (
    "objects",
    "duplicates",
    "missing",
    "position_error",
    "sharpness",
    "texture",
)  # of a picture; the rest are of sets


def kind_of(caption):
    """The scene a caption asks for; EvalError for one that scenes.py cannot make."""
    if caption not in scenes.KIND_OF:
        raise EvalError(f"caption {caption!r} is not a complete caption of tools/pocket/scenes.py; use its heldout.txt")
    return scenes.KIND_OF[caption]


def true_rendering(caption, index, number, size):
    """f32 [h, w, 3], rounded to 8 bits as a PNG is; the scene depends on the caption's index and `number` alone."""
    scene = scenes.random_scene(np.random.default_rng([index, number]), kind_of(caption))
    return np.round(scenes.render(scene, *size) * 255).astype(np.float32) / 255


def measure_picture(job):
    """{name: value} of one picture, its features and its crops'. job: (path, caption, index, size).

    A path of None is the caption's first true rendering.
    """
    path, caption, index, size = job
    truths = [true_rendering(caption, index, k, size) for k in range(TRUTHS)]
    if path is None:
        picture = truths[0]
    else:
        picture = pictures.load(path).astype(np.float32) / 255
        if picture.shape[:2] != (size[1], size[0]):
            raise EvalError(
                f"{path} is {picture.shape[1]}x{picture.shape[0]}, the row asks for {size[0]}x{size[1]}; delete it"
            )
    verdict = read.judge(read.read(picture), kind_of(caption))
    sharp, texture = sharpness.relative(picture, truths[1:])
    error = verdict.position_error
    return {
        "objects": float(verdict.objects),
        "duplicates": float(verdict.duplicates),
        "missing": float(verdict.missing),
        "position_error": float("nan") if error is None else error,
        "sharpness": sharp,
        "texture": texture,
        "whole": features.whole_features([picture])[0],
        "crops": features.crop_features([picture], [f"{index}"], CROPS),
        "true_whole": features.whole_features(truths[1:]),
        "true_crops": features.crop_features(truths[1:], [f"{index}-{k}" for k in range(1, TRUTHS)], CROPS),
    }


def measure(folder, ids, captions, size, workers=None):
    """{name: array over captions} of the pictures ID.png of a folder, or with folder None of true renderings.

    whole [N, 60], crops [N * 4, 60]; true_whole and true_crops are the reference's, of the same captions and size.
    """
    paths = [None if folder is None else Path(folder) / f"{i}.png" for i in ids]
    jobs = [(path, caption, k, tuple(size)) for k, (path, caption) in enumerate(zip(paths, captions))]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
        found = list(pool.map(measure_picture, jobs, chunksize=4))
    out = {name: np.array([f[name] for f in found]) for name in SINGLE}
    out["whole"] = np.stack([f["whole"] for f in found])
    for name in ("crops", "true_whole", "true_crops"):
        out[name] = np.concatenate([f[name] for f in found])
    return out


def summary(values, native=None):
    """{metric: [value, low, high]} of measure()'s values; native: the native-size pictures' values, for the b forms."""
    out = {name: distances.bootstrap_mean(values[name]) for name in SINGLE}
    each = CROPS.count
    out["fd_r"] = distances.bootstrap_frechet(values["whole"], values["true_whole"])
    out["kd_r"] = distances.bootstrap_kernel(values["whole"], values["true_whole"])
    out["fd_crop"] = distances.bootstrap_frechet(values["crops"], values["true_crops"], each=each)
    out["kd_crop"] = distances.bootstrap_kernel(values["crops"], values["true_crops"], each=each)
    if native is not None:
        out["fd_b"] = distances.bootstrap_frechet(values["whole"], native["whole"], paired=True)
        out["kd_b"] = distances.bootstrap_kernel(values["whole"], native["whole"], paired=True)
    return {name: [float(v) for v in value] for name, value in out.items()}


def version(*modules):
    """Hex digest of the sources of these modules of tools/eval and tools/pocket: another text may measure otherwise."""
    paths = [here / f"{name}.py" for name in modules for here in (HERE, POCKET) if (here / f"{name}.py").exists()]
    return hashlib.sha256(json.dumps([path.read_text() for path in paths]).encode()).hexdigest()[:16]


MEASURING = ("measure", "features", "sharpness", "pictures", "read", "scenes")  # decide measure()
SUMMARISING = (*MEASURING, "distances")  # decide summary()
