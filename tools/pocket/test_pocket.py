"""Tests of the scenes, the reader and the training stages; about a minute on one core.

    python -m unittest test_pocket            (in this directory)
    python -m unittest test_pocket.Scenes test_pocket.Reader        without torch
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import unittest
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage

import read
import scenes

HERE = Path(__file__).resolve().parent


def scene_of(caption, seed=0):
    return scenes.random_scene(np.random.default_rng(seed), scenes.KIND_OF[caption])


def as_png(picture):
    return np.round(picture * 255).astype(np.float32) / 255


def verdict_of(picture, caption):
    return read.judge(read.read(as_png(picture)), scenes.KIND_OF[caption])


class Scenes(unittest.TestCase):
    def test_every_caption_names_one_kind(self):
        self.assertEqual(len(scenes.KIND_OF), len(scenes.GROUPS) + 2 * len(scenes.PAIRS))
        pair = scenes.KIND_OF["a small blue cube to the right of a large red ball, on a sand ground"]
        self.assertEqual(pair.caption(), "a large red ball to the left of a small blue cube, on a sand ground")
        self.assertEqual(pair.caption(("colour",), turned=True), "a blue cube and a red ball")

    def test_held_out_captions_are_never_trained_on(self):
        held = {scenes.KIND_OF[c] for c in read.held_out_captions()}
        first = {scenes.KIND_OF[c] for c in read.held_out_captions(HERE / "heldout-first.txt")}
        self.assertEqual((len(held), len(first)), (500, 200))
        self.assertFalse((held | first) & {*scenes.TRAINING_GROUPS, *scenes.TRAINING_PAIRS})
        self.assertEqual(read.held_out_captions(), scenes.held_out_captions(500))
        rng = np.random.default_rng(0)
        complete = {scenes.random_caption(rng, scenes.random_kind(rng)) for _ in range(5000)} & scenes.KIND_OF.keys()
        self.assertGreater(len(complete), 2000)
        self.assertFalse({scenes.KIND_OF[c] for c in complete} & held)

    def test_a_larger_picture_is_the_same_scene(self):
        for seed, ground in enumerate(scenes.GROUNDS):
            scene = scene_of(f"a large red ball to the left of a small blue cube, on a {ground} ground", seed)
            small, large = scenes.render(scene, 64), scenes.render(scene, 256)
            shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
            self.assertLess(np.abs(shrunk - small).mean(), 0.02, ground)

    def test_a_larger_picture_has_more_texture(self):
        def roughness(picture):  # of the ground in a corner, between neighbouring 64ths of the side and finer
            side = len(picture) // 4
            corner = picture[:side, :side].mean(axis=-1)
            return corner.std() / corner.mean()

        for ground in ("grey", "black", "sand", "wooden"):
            scene = scene_of(f"one small red ball at the bottom, on a {ground} ground")
            coarse, fine = roughness(scenes.render(scene, 64)), roughness(scenes.render(scene, 256))
            self.assertGreater(fine, 1.3 * coarse, ground)

    def test_a_window_is_a_part_of_the_picture(self):
        scene = scene_of("three large cones on the right, on a wooden ground".replace("cones", "green cones"))
        whole = scenes.render(scene, 96, 160)
        np.testing.assert_array_equal(scenes.render(scene, 96, 160, (40, 30, 50, 70)), whole[30:100, 40:90])

    def test_lengths_follow_the_shorter_side(self):
        scene = scene_of("a large red ball to the left of a small blue cube, on a black ground")
        for width, height in ((64, 256), (256, 64), (128, 128)):
            first, second = scene.things(width, height)
            gap = second.centre[0] - first.centre[0]
            self.assertAlmostEqual(gap, scenes.APART, delta=0.061)
            self.assertAlmostEqual((first.centre[1] * min(width, height)) / height, 0.5, delta=0.031)

    def test_outlines_are_the_edges_of_the_objects(self):
        for caption in (
            "three large green cones on the right, on a wooden ground",
            "one small red ball at the bottom, on a black ground",
        ):
            scene = scene_of(caption)
            for width, height in ((64, 64), (200, 120), (96, 300)):
                lines = scenes.outlines(scene, width, height, line=1.0)
                self.assertEqual((lines.shape, lines.dtype, lines.min()), ((height, width), np.float32, 0.0))
                self.assertLessEqual(lines.max(), 1.0)
                short = min(width, height)
                covers = [
                    scenes.outline(t.shape, np.array(t.centre) * short, t.radius * short, width, height)
                    for t in scene.things(width, height)
                ]
                cover = np.max(covers, axis=0)
                edge = ndimage.binary_dilation(cover > 0.5) & ~ndimage.binary_erosion(cover > 0.5)
                self.assertFalse((lines[~edge] > 0.6).any(), (caption, width))
                _, count = ndimage.label(lines > 0.2, np.ones((3, 3)))
                self.assertEqual(count, len(covers))  # each one closed, none touches another
                holes = ndimage.binary_fill_holes(lines > 0.2)
                self.assertLess(np.abs(holes.sum() / cover.sum() - 1.0), 0.35)

    def test_outlines_follow_the_size(self):
        scene = scene_of("a large red ball to the left of a small blue cube, on a sand ground")
        small, large = scenes.outlines(scene, 64), scenes.outlines(scene, 256)
        shrunk = large.reshape(64, 4, 64, 4).mean(axis=(1, 3))
        self.assertLess(np.abs(shrunk - small).mean(), 0.004)
        whole, window = (scenes.outlines(scene, 96, 160, 2.0, window) for window in (None, (40, 30, 50, 70)))
        np.testing.assert_array_equal(window, whole[30:100, 40:90])
        self.assertAlmostEqual(scenes.outlines(scene, 64, line=0.25).max(), 0.25, delta=0.01)

    def test_an_object_hides_the_outline_behind_it(self):
        scene = scene_of("a large red ball to the left of a small blue cube, on a sand ground")
        ball, cube = scene.things(64, 64)
        over = replace(scene, shifts=((scenes.APART - 0.05, 0.0), (0.0, 0.0)))
        x, y = np.array(over.things(64, 64)[1].centre) * 64
        inside = scenes.outlines(over, 64)[round(y) - 3 : round(y) + 3, round(x) - 3 : round(x) + 3]
        self.assertEqual(inside.max(), 0.0)

    def test_scattered_scenes_are_within_the_picture_and_not_held_out(self):
        rng = np.random.default_rng(0)
        for width, height in ((64, 64), (128, 32)):
            for _ in range(300):
                kind = scenes.random_kind(rng)
                scene = scenes.scattered_scene(rng, kind, width, height)
                things, short = scene.things(width, height), min(width, height)
                for thing in things:
                    for c, side in zip(thing.centre, (width, height)):
                        self.assertTrue(1.1 * thing.radius < c < side / short - 1.1 * thing.radius)
                if (width, height) == (64, 64):
                    picture = scenes.render(scene, width, height)
                    seen = read.read(as_png(picture)).objects
                    self.assertEqual(sorted(o.shape for o in seen), sorted(t.shape for t in things), scene)
                if isinstance(kind, scenes.Pair):
                    first, second = sorted(things, key=lambda t: t.centre)
                    step = np.subtract(second.centre, first.centre)
                    if step[0] > abs(step[1]):
                        sizes = ["small" if t.radius < 0.105 else "large" for t in (first, second)]
                        ends = [(size, t.colour, t.shape) for size, t in zip(sizes, (first, second))]
                        like = scenes.Pair(*ends[0], "left", *ends[1], kind.ground)
                        self.assertFalse(scenes.held_out(like))


class Reader(unittest.TestCase):
    def test_own_error_is_under_one_percent(self):
        for size, count in (((64, 64), 200), ((128, 128), 100), ((192, 192), 50), ((256, 64), 50), ((128, 512), 50)):
            with contextlib.redirect_stdout(io.StringIO()):
                verdicts = read.self_test(*size, count)
            self.assertLess(np.mean([not v.right for v in verdicts]), 0.01, size)
            self.assertLess(np.mean([v.position_error for v in verdicts]), 0.03, size)
            self.assertLess(max(v.misfit for v in verdicts), 0.02, size)

    def test_a_lozenge_is_a_misfit(self):
        y, x = np.mgrid[0:64, 0:64]
        picture = np.full((64, 64, 3), 0.45, np.float32)
        picture[np.abs(x - 32) + np.abs(y - 32) < 9] = (0.8, 0.1, 0.1)
        (seen,) = read.read(picture).objects
        self.assertGreater(seen.misfit, 0.02)

    def test_objects_are_where_they_were_drawn(self):
        scene = scene_of("a large red ball above a small white cone, on a checkered ground")
        for width, height in ((64, 64), (200, 300), (256, 64)):
            seen = {o.colour: o for o in read.read(as_png(scenes.render(scene, width, height))).objects}
            for thing in scene.things(width, height):
                short = min(width, height)
                at = np.array(seen[thing.colour].centre) / short
                self.assertLess(np.linalg.norm(at - thing.centre), 0.01)
                self.assertAlmostEqual(seen[thing.colour].radius, thing.radius, delta=0.008)

    def test_each_attribute_can_be_wrong(self):
        drawn = "a large red ball to the left of a small blue cube, on a sand ground"
        picture = scenes.render(scene_of(drawn), 64)
        self.assertTrue(verdict_of(picture, drawn).right)
        for caption, wrong in (
            ("a small red ball to the left of a small blue cube, on a sand ground", {"size"}),
            ("a large red ball to the left of a small green cube, on a sand ground", {"colour"}),
            ("a large red ball to the left of a small blue cone, on a sand ground", {"shape"}),
            ("a large red ball to the right of a small blue cube, on a sand ground", {"place"}),
            ("a large red ball above a small blue cube, on a sand ground", {"place"}),
            ("a large red ball to the left of a small blue cube, on a grey ground", {"ground"}),
        ):
            verdict = verdict_of(picture, caption)
            self.assertEqual({n for n in read.Verdict.ATTRIBUTES if not getattr(verdict, n)}, wrong, caption)

    def test_swapped_colours_are_wrong(self):
        picture = scenes.render(scene_of("a large blue ball to the left of a small red cube, on a sand ground"), 64)
        verdict = verdict_of(picture, "a large red ball to the left of a small blue cube, on a sand ground")
        self.assertFalse(verdict.objects)

    def test_duplicates_and_missing(self):
        two, three = (f"{n} small green cones at the top, on a wooden ground" for n in ("two", "three"))
        verdict = verdict_of(scenes.render(scene_of(three), 128), two)
        self.assertEqual((verdict.duplicates, verdict.missing, verdict.number, verdict.colour), (1, 0, False, True))
        verdict = verdict_of(scenes.render(scene_of(two), 128), three)
        self.assertEqual((verdict.duplicates, verdict.missing, verdict.number, verdict.colour), (0, 1, False, False))

    def test_joined_objects_are_two(self):
        scene = scene_of("two large yellow balls in the centre, on a black ground")
        left, right = scene.things(64, 64)
        close = replace(right, centre=(left.centre[0] + 2.02 * left.radius, left.centre[1]))
        over = replace(right, centre=(left.centre[0] + 1.5 * left.radius, left.centre[1]), colour="green")
        for things in ((left, close), (left, over)):
            picture = scenes.render_things(things, "black", scene.light, 0, 64, 64)
            self.assertEqual([o.colour for o in read.read(as_png(picture)).objects], [t.colour for t in things])

    def test_an_empty_picture(self):
        reading = read.read(np.full((64, 64, 3), 0.45, np.float32))
        verdict = read.judge(reading, scenes.KIND_OF["one large red ball at the top, on a grey ground"])
        self.assertEqual((reading.objects, verdict.missing, verdict.position_error), ((), 1, None))

    def test_an_unknown_caption_is_named(self):
        with self.assertRaisesRegex(ValueError, "a red dog"):
            read.kind_of("a red dog")


class Training(unittest.TestCase):
    """A few seconds of each stage: that they fit together, resume and export, not that they learn."""

    def run_train(self, *arguments):
        done = subprocess.run([sys.executable, "train.py", *arguments], cwd=HERE, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return done.stdout

    def test_all_stages_resume_and_the_model_draws(self):
        with tempfile.TemporaryDirectory() as place:
            work, out, pictures = (f"{place}/{name}" for name in ("work", "model", "pictures"))
            few = ("--pictures", "32", "--scenes", "64", "--close-ups", "16", "--aspects", "8")
            few += ("--vae-batch", "4", "--unet-batch", "4", "--device", "cpu")
            self.run_train("all", "--work", work, "--out", out, "--minutes", "0.1", *few)
            again = self.run_train("all", "--work", work, "--out", out, "--minutes", "0.15", *few)
            for name in ("latents", "close-ups", "44x92", "128x32"):
                self.assertTrue(Path(work, f"{name}.safetensors").exists(), name)
            for name in ("vae", "unet", "decoder"):
                self.assertIn(f"resumed {name}.ckpt", again)
            size = sum(file.stat().st_size for file in Path(out).rglob("*.safetensors"))
            self.assertLess(size, 24e6)
            warm = f"{place}/warm"
            self.run_train("unet", "--work", work, "--minutes", "0.16", "--batch", "4", "--device", "cpu", "--bf16")
            self.run_train("vae", "--work", warm, "--minutes", "0.02", "--warm", out, "--pictures", "8")
            told = self.run_train(
                "eval", "--model", out, "--pictures", pictures, "--count", "2", "--steps", "2", "--device", "cpu"
            )
            self.assertIn("wholly right", told)
            self.assertEqual(read.load(f"{pictures}/001.png").shape, (64, 64, 3))


if __name__ == "__main__":
    unittest.main()
