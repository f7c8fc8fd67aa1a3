"""Ground-truth scenes and known damage to them, for test_features and as a report.

tools/eval/setup tools/eval/tests/corruptions.py      distances of growing damage, as a Markdown table
"""

import dataclasses
import sys

import numpy as np
from helpers import ROOT
from scipy import ndimage

sys.path.insert(0, str(ROOT / "tools" / "pocket"))

import scenes  # noqa: E402

import distances  # noqa: E402
import features  # noqa: E402
import pictures  # noqa: E402

CROPS = pictures.Crops(64, 2)


def some_scenes(count, seed):
    """(scenes, generator): random held-in scenes."""
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng, scenes.random_kind(rng)) for _ in range(count)]


def render(drawn, size, extra=0, purple=0.0, seed=0):
    """Pictures of scenes, with `extra` more objects each somewhere, or each object purple with a probability.

    Purple, not just another colour: colours exchanged among captions leave the set of pictures what it was, and no
    distance of sets can see it. The reader of tools/pocket does.
    """
    rng = np.random.default_rng(seed)
    out = []
    for scene in drawn:
        things = scene.things(size, size)
        copies = []
        for place, pick in zip(rng.uniform(0.15, 0.85, (4, 2)), rng.integers(0, 99, 4)):
            copies.append(dataclasses.replace(things[pick % len(things)], centre=tuple(place)))
        chances = rng.random(len(things))
        things = [dataclasses.replace(t, colour="purple") if p < purple else t for t, p in zip(things, chances)]
        out.append(
            scenes.render_things(things + copies[:extra], scene.kind.ground, scene.light, scene.texture, size, size)
        )
    return out


def blurred(drawn, sigma):
    return [ndimage.gaussian_filter(p, (sigma, sigma, 0)) for p in drawn]


def noisy(drawn, deviation):
    rng = np.random.default_rng(5)
    return [np.clip(p + rng.normal(0, deviation, p.shape), 0, 1).astype(np.float32) for p in drawn]


def upscaled(drawn, size):
    """Rendered at 64 and enlarged: what a method without detail of its own leaves."""
    return [features.resized(p, size) for p in render(drawn, 64)]


def damage(drawn, size):
    """{name: [pictures without damage, with a little, with more, ...]}."""
    clean = render(drawn, size)
    return {
        "blur, sigma 0.5, 1, 2, 4 pixels": [clean] + [blurred(clean, s) for s in (0.5, 1, 2, 4)],
        "noise, deviation 0.01, 0.03, 0.1, 0.3": [clean] + [noisy(clean, s) for s in (0.01, 0.03, 0.1, 0.3)],
        "1, 2, 3, 4 superfluous objects": [render(drawn, size, extra=k) for k in range(5)],
        "25, 50, 75, 100 % of the objects purple": [render(drawn, size, purple=p) for p in (0, 0.25, 0.5, 0.75, 1)],
    }


def measured(count, size):
    """{damage: {form: [distances]}} to other scenes; forms: Frechet and kernel, whole and crop."""
    truth = render(some_scenes(count, 1), size)
    ids = [str(i) for i in range(count)]
    forms = {"whole": features.whole_features, "crop": lambda p: features.crop_features(p, ids, CROPS)}
    references = {form: extract(truth) for form, extract in forms.items()}
    found = {}
    for name, levels in damage(some_scenes(count, 2), size).items():
        found[name] = {}
        for form, extract in forms.items():
            sets = [extract(level) for level in levels]
            found[name][f"{form} Frechet"] = [distances.frechet_distance(s, references[form]) for s in sets]
            found[name][f"{form} kernel"] = [distances.kernel_distance(s, references[form]) for s in sets]
    return found


if __name__ == "__main__":
    for size in (64, 256):
        print(f"\n{size}x{size}\n\n| damage | distance | none | | | | |\n|---|---|---|---|---|---|---|")
        for name, rows in measured(150, size).items():
            for row, values in rows.items():
                print(f"| {name} | {row} | {' | '.join(f'{v:.3g}' for v in values)} |")
