"""FID, KID, IS and CLIP-T of the command against the libraries called directly and against f64 formulas."""

import unittest
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from helpers import EVAL, TempCase, loaded, random_clip, random_inception, run_score, write_pictures
from PIL import Image

import distances
import inception
import pictures
import score
from inception import FeatureSet, Inception, features_of

SMALL = ("--layer", "64", "--allow-few", "--kid-subset-size", "4", "--kid-subsets", "5", "--batch", "5")


def setUpModule():
    """One file of random weights for all tests: 95 MB."""
    import tempfile
    from pathlib import Path

    global WEIGHTS, HOLDER
    torch.set_num_threads(1)
    HOLDER = tempfile.TemporaryDirectory()
    WEIGHTS = random_inception(Path(HOLDER.name) / "weights.pth")


def tearDownModule():
    HOLDER.cleanup()


class Features(TempCase):
    def test_trunk_is_the_librarys_network(self):
        """Bit for bit, on pictures that need no resize."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        library = FeatureExtractorInceptionV3(
            "library", ["64", "192", "768", "2048", "logits_unbiased"], feature_extractor_weights_path=str(WEIGHTS)
        )
        rng = np.random.default_rng(0)
        batch = rng.integers(0, 256, (1, 299, 299, 3), np.uint8)
        want = library(torch.from_numpy(batch).permute(0, 3, 1, 2))
        x = torch.stack([inception.resize(p, "tensorflow") for p in batch])
        for layer, features in zip(("64", "192", "768", "2048"), want):
            got, logits = Inception(WEIGHTS, layer)(x)
            np.testing.assert_array_equal(got, features.numpy())
        np.testing.assert_allclose(logits, want[4].numpy(), rtol=1e-5, atol=1e-6)

    def test_resizes(self):
        picture = np.random.default_rng(1).integers(0, 256, (40, 620, 3), np.uint8)
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].double()
        want = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
        np.testing.assert_allclose(inception.resize(picture, "torch"), want[0], atol=1e-4)  # positions in f32
        # PIL's bicubic is torch's with antialias; the clean form clamps it to 0..255
        want = torch.nn.functional.interpolate(x, (299, 299), mode="bicubic", align_corners=False, antialias=True)
        np.testing.assert_allclose(inception.resize(picture, "clean"), want[0].clamp(0, 255) / 128 - 1, atol=1e-5)
        # TensorFlow 1: source = target * scale, the upper neighbour clamped
        rows, columns = np.arange(299) * (40 / 299), np.arange(299) * (620 / 299)
        grid = picture.astype(np.float64)
        y0, x0 = rows.astype(int), columns.astype(int)
        y1, x1 = np.minimum(y0 + 1, 39), np.minimum(x0 + 1, 619)
        fy, fx = (rows - y0)[:, None, None], (columns - x0)[None, :, None]
        above = grid[y0][:, x0] * (1 - fx) + grid[y0][:, x1] * fx
        below = grid[y1][:, x0] * (1 - fx) + grid[y1][:, x1] * fx
        want = ((above * (1 - fy) + below * fy) / 128 - 1).transpose(2, 0, 1)
        np.testing.assert_allclose(inception.resize(picture, "tensorflow"), want, atol=1e-4)
        with self.refused("nearest", "clean"):
            inception.resize(picture, "nearest")


class Scores(TempCase):
    def test_fid_and_kid_as_the_library_and_as_the_formula(self):
        from torch_fidelity import calculate_metrics

        a = write_pictures(self.dir / "a", 7, seed=1)
        b = write_pictures(self.dir / "b", 6, size=(33, 57), seed=2, shift=30)
        args = ("--generated", a, "--real", b, "--inception", WEIGHTS, "--resize", "tensorflow", *SMALL)
        found = run_score(*args)["metrics"]
        library = calculate_metrics(
            input1=str(a), input2=str(b), cuda=False, fid=True, kid=True, kid_subset_size=4, kid_subsets=5, cache=False,
            feature_extractor_weights_path=str(WEIGHTS), feature_layer_fid="64", feature_layer_kid="64", verbose=False,
            batch_size=5, save_cpu_ram=True,
        )  # fmt: skip
        # the library takes the mean of f32 features in f32
        self.assertAlmostEqual(found["fid_r"] / library["frechet_inception_distance"], 1, delta=1e-4)
        self.assertAlmostEqual(found["kid_r"]["mean"] / library["kernel_inception_distance_mean"], 1, delta=1e-3)
        self.assertAlmostEqual(found["kid_r"]["std"] / library["kernel_inception_distance_std"], 1, delta=1e-3)
        network = loaded(Inception, WEIGHTS, "64")
        x, y = (features_of(pictures.list_folder(d), network, "tensorflow").features for d in (a, b))
        (m1, c1), (m2, c2) = distances.gaussian(x), distances.gaussian(y)
        root = scipy.linalg.sqrtm(c1 @ c2 + 0j).real  # singular: scipy's roots of zero are good to 1e-8 each
        want = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * root)
        self.assertAlmostEqual(found["fid_r"] / want, 1, delta=1e-3)
        self.assertAlmostEqual(found["fid_r"] / distances.frechet_distance(x, y), 1, delta=1e-3)
        self.assertAlmostEqual(found["kid_r"]["all"], distances.kernel_distance(x, y), delta=1e-12)

    def test_published_resizes_and_base(self):
        """FID after torch's bilinear, KID after the clean bicubic, as the published code's two libraries."""
        a = write_pictures(self.dir / "a", 4, size=(400, 400), seed=1)
        b = write_pictures(self.dir / "b", 4, size=(100, 100), seed=2)
        args = ("--generated", a, "--base", b, "--inception", WEIGHTS, *SMALL)
        found = run_score(*args)["metrics"]
        torch_only = run_score(*args, "--resize", "torch")["metrics"]
        clean = run_score(*args, "--resize", "clean")["metrics"]
        self.assertEqual(found, {"fid_b": torch_only["fid_b"], "kid_b": clean["kid_b"]})
        self.assertNotEqual(torch_only["fid_b"], clean["fid_b"])

    def test_crop_form_is_the_plain_form_of_the_crops(self):
        crops = pictures.Crops(side=24, count=2, seed=7)
        folders = {name: write_pictures(self.dir / name, 4, seed=i) for i, name in enumerate(("a", "b"))}
        for name, folder in folders.items():
            out = self.dir / f"{name}-crops"
            out.mkdir()
            for path in sorted(folder.iterdir()):
                picture = np.asarray(Image.open(path))
                for i, (x, y) in enumerate(crops.boxes(path.stem, 48, 40)):
                    self.assertTrue(0 <= x <= 24 and 0 <= y <= 16)
                    Image.fromarray(picture[y : y + 24, x : x + 24]).save(out / f"{path.stem}-{i}.png")
        one = (
            "--generated",
            folders["a"],
            "--real",
            folders["b"],
            "--crop-size",
            24,
            "--crops",
            2,
            "--seed",
            7,
            "--resize",
            "torch",
        )
        found = run_score(*one, "--inception", WEIGHTS, *SMALL)["metrics"]
        by_hand = ("--generated", self.dir / "a-crops", "--real", self.dir / "b-crops", "--resize", "torch")
        want = run_score(*by_hand, "--inception", WEIGHTS, *SMALL)["metrics"]
        self.assertAlmostEqual(found["fid_crop_r"], want["fid_r"], delta=1e-9)
        self.assertAlmostEqual(found["kid_crop_r"]["mean"], want["kid_r"]["mean"], delta=1e-12)
        self.assertNotEqual(found["fid_crop_r"], found["fid_r"])

    def test_crops_depend_on_seed_and_id_only(self):
        boxes = pictures.Crops(8, 4, 1).boxes("p", 100, 90)
        self.assertEqual(boxes, pictures.Crops(8, 4, 1).boxes("p", 100, 90))
        self.assertNotEqual(boxes, pictures.Crops(8, 4, 2).boxes("p", 100, 90))
        self.assertNotEqual(boxes, pictures.Crops(8, 4, 1).boxes("q", 100, 90))
        self.assertEqual(pictures.Crops(8, 2, 0).boxes("p", 8, 8), [(0, 0), (0, 0)])
        left, top = zip(*pictures.Crops(8, 400).boxes("p", 30, 20))
        self.assertEqual((min(left), max(left), min(top), max(top)), (0, 22, 0, 12))
        with self.refused("'p'", "7x8", "8x8", "--crop-size"):
            pictures.Crops(8, 1).boxes("p", 7, 8)

    def test_inception_score_closed_forms(self):
        def of(logits, splits):
            return score.inception_score(FeatureSet(None, np.float32(logits), {}, len(logits), "x", ""), splits)

        self.assertAlmostEqual(of(np.zeros((20, 10)), 2)["mean"], 1.0, delta=1e-12)  # uniform: says nothing
        one_hot = np.tile(np.eye(10), (3, 1)) * 200
        self.assertAlmostEqual(of(one_hot, 1)["mean"], 10.0, delta=1e-6)  # every class, surely
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(30, 5))
        p = np.exp(np.float32(logits).astype(np.float64))
        p /= p.sum(axis=1, keepdims=True)
        want = np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())
        self.assertAlmostEqual(of(logits, 1)["mean"], want, delta=1e-6)
        sorted_by_class = np.repeat(np.eye(2), 20, axis=0) * 200
        self.assertGreater(of(sorted_by_class, 2)["mean"], 1.5)  # shuffled: both halves have both
        with self.refused("3 pictures", "--is-splits 4"):
            of(np.zeros((3, 5)), 4)

    def test_full_layer_has_an_inception_score(self):
        a = write_pictures(self.dir / "a", 2, seed=1)
        found = run_score("--generated", a, "--inception", WEIGHTS, "--is-splits", 1, "--resize", "tensorflow")
        network = loaded(Inception, WEIGHTS)
        logits = features_of(pictures.list_folder(a), network, "tensorflow").logits.astype(np.float64)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        want = np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())
        self.assertAlmostEqual(found["metrics"]["is"]["mean"], want, delta=1e-9)
        self.assertIn("not the published file", found["notes"][0])


class ClipT(TempCase):
    def test_is_the_mean_cosine_of_the_library(self):
        from transformers import CLIPModel, CLIPProcessor

        model_dir = random_clip(self.dir / "clip")
        folder = write_pictures(self.dir / "a", 5, seed=3)
        prompts = ["a red ball", "two cubes on a sand ground", "a", "three large white cones", "blue"]
        lines = [f'{{"id": "p{i:03d}", "prompt": "{p}"}}' for i, p in enumerate(prompts)]
        (self.dir / "m.jsonl").write_text("\n".join(lines))
        args = ("--generated", folder, "--clip", model_dir, "--captions", self.dir / "m.jsonl")
        found = run_score(*args, "--batch", 2)
        model = CLIPModel.from_pretrained(model_dir).eval()
        processor = CLIPProcessor.from_pretrained(model_dir, use_fast=False)
        want = []
        for path, prompt in zip(sorted(folder.iterdir()), prompts):
            inputs = processor(text=[prompt], images=Image.open(path), return_tensors="pt", padding=True)
            with torch.no_grad():
                out = model(**inputs)
            want.append((out.logits_per_image / model.logit_scale.exp()).item())
        self.assertGreater(np.std(want), 1e-3)
        self.assertAlmostEqual(found["metrics"]["clip_t"], np.mean(want), delta=1e-5)
        self.assertEqual(found["notes"], [])

    def test_long_captions_are_cut_and_counted(self):
        model_dir = random_clip(self.dir / "clip")
        folder = write_pictures(self.dir / "a", 1)
        (self.dir / "m.jsonl").write_text(f'{{"id": "p000", "prompt": "{"ball " * 40}"}}')
        found = run_score("--generated", folder, "--clip", model_dir, "--captions", self.dir / "m.jsonl")
        self.assertIn("1 of 1 captions are longer than CLIP's 20 tokens", found["notes"][0])


class Cache(TempCase):
    def setUp(self):
        super().setUp()
        self.folder = write_pictures(self.dir / "a", 4)
        self.network = Inception(WEIGHTS, "64")  # not shared: its calls are counted
        self.calls = 0
        inner = self.network.trunk

        def counted(x):
            self.calls += 1
            return inner(x)

        self.network.trunk = counted

    def features(self, how="torch", crops=None):
        return features_of(pictures.list_folder(self.folder), self.network, how, crops, self.dir / "cache")

    def test_is_used_while_nothing_changes(self):
        first = self.features()
        again = self.features()
        self.assertEqual(self.calls, 1)
        np.testing.assert_array_equal(first.features, again.features)
        self.features("clean")
        self.features(crops=pictures.Crops(16, 1))
        self.assertEqual(self.calls, 3)
        Image.new("RGB", (48, 40)).save(self.folder / "p003.png")
        changed = self.features()
        self.assertEqual(self.calls, 4)
        self.assertFalse(np.array_equal(first.features, changed.features))

    def test_file_of_other_pictures_is_not_used(self):
        first = self.features()
        (path,) = (self.dir / "cache").iterdir()
        old = path.read_bytes()
        path.unlink()
        write_pictures(self.folder, 4, seed=8)
        changed = self.features()
        (path,) = (self.dir / "cache").iterdir()
        path.write_bytes(old)  # under the changed folder's name
        np.testing.assert_array_equal(self.features().features, changed.features)
        self.assertFalse(np.array_equal(first.features, changed.features))

    def test_damaged_file_is_named(self):
        self.features()
        (path,) = (self.dir / "cache").iterdir()
        path.write_bytes(path.read_bytes()[:100])
        with self.refused(path, "delete it"):
            self.features()

    def test_npz_in_place_of_a_folder(self):
        b = write_pictures(self.dir / "b", 5, seed=9)
        args = ("--inception", WEIGHTS, "--resize", "torch", *SMALL)
        saved = self.dir / "b.npz"
        run_score("--generated", b, *args, "--save-features", saved)
        with_folder = run_score("--generated", self.folder, "--real", b, *args)["metrics"]
        with_file = run_score("--generated", self.folder, "--real", saved, *args)["metrics"]
        self.assertEqual(with_folder, with_file)
        with np.load(saved) as file:  # what pytorch-fid reads
            self.assertEqual((file["mu"].shape, file["sigma"].shape), ((64,), (64, 64)))
        with self.refused(saved, "resize", "'torch'", "'clean'"):
            run_score("--generated", self.folder, "--real", saved, *args, "--resize", "clean")
        np.savez(saved, mu=np.zeros(64), sigma=np.eye(64))
        with self.refused(saved, "not written by tools/eval/score"):
            run_score("--generated", self.folder, "--real", saved, *args)


class Errors(TempCase):
    def test_each_names_the_thing_its_value_and_what_to_do(self):
        a = write_pictures(self.dir / "a", 5)
        b = write_pictures(self.dir / "b", 5, seed=1)
        judged = ("--generated", a, "--real", b, "--inception", WEIGHTS)
        cases = [
            ((), ["nothing to judge", "--generated"]),
            (("--generated", a), ["--inception", "--clip"]),
            (("--real", b, "--candidates", a), ["--real needs --generated"]),
            (("--generated", a, "--real", b), ["--inception FILE", "pt_inception-2015-12-05-6726825d.pth", "GitHub"]),
            (("--generated", a, "--inception", "/no/such"), ["/no/such", "pt_inception-2015-12-05-6726825d.pth"]),
            (("--generated", self.dir / "no", "--inception", WEIGHTS), [self.dir / "no", "not a folder"]),
            ((*judged, "--layer", "64"), ["a has 5 pictures", "more than 64", "--allow-few"]),
            (
                (*judged, "--layer", "64", "--allow-few", "--resize", "torch"),
                ["a has 5 pictures", "1000", "--kid-subset-size"],
            ),
            ((*judged, *SMALL, "--crop-size", "41"), ["'p000'", "48x40", "41x41"]),
            ((*judged, "--batch", "0"), ["--batch 0", "at least 1"]),
            ((*judged, "--kid-subset-size", "1"), ["--kid-subset-size 1"]),
            (("--generated", a, "--clip", "/no/clip", "--captions", "x"), ["cannot read x"]),
            (("--generated", a, "--clip", "/no/clip"), ["--clip needs --captions"]),
            ((*judged, "--crop-size", "8", "--real", self.dir / "x.npz"), ["x.npz", "no such file"]),
            ((*judged, "--device", "nonsense"), ["--device nonsense", "cpu"]),
            ((*judged, "--save-features", "x.npz"), ["--save-features", "--resize"]),
        ]
        for arguments, parts in cases:
            with self.subTest(arguments), self.refused(*parts):
                run_score(*arguments)

    def test_too_few_pictures_are_refused_before_the_network_runs(self):
        a = write_pictures(self.dir / "a", 5)
        never = mock.patch.object(inception, "features_of", side_effect=AssertionError("the network ran"))
        with never, self.refused("a has 5 pictures", "more than 64"):
            run_score("--generated", a, "--real", a, "--inception", WEIGHTS, "--layer", "64")
        with never, self.refused("a has 5 pictures", "--is-splits 10"):
            run_score("--generated", a, "--inception", WEIGHTS)

    def test_weights_of_something_else(self):
        a = write_pictures(self.dir / "a", 2)
        other = self.dir / "other.pth"
        for content in ({"x": torch.zeros(2)}, [1, 2]):
            torch.save(content, other)
            with self.refused(other, "does not hold this network's weights"):
                run_score("--generated", a, "--inception", other)
        other.write_bytes(b"nothing")
        with self.refused(other, "does not hold this network's weights"):
            run_score("--generated", a, "--inception", other)

    def test_incomplete_clip_directory(self):
        a = write_pictures(self.dir / "a", 1)
        model_dir = random_clip(self.dir / "clip")
        args = ("--generated", a, "--clip", model_dir, "--captions", self.dir / "m.jsonl")
        (self.dir / "m.jsonl").write_text('{"id": "p00", "prompt": "x"}')
        with self.refused("1 of the 1 captions have no picture", "'p00'", "--allow-missing"):
            run_score(*args)
        with self.refused("'p000'", "no caption"):
            run_score(*args, "--allow-missing")
        (self.dir / "m.jsonl").write_text('{"id": "p000", "prompt": "x"}')
        (model_dir / "model.safetensors").write_bytes(b"junk")
        with self.refused(model_dir, "does not load"):
            run_score(*args)
        (model_dir / "model.safetensors").unlink()
        with self.refused(model_dir, "lacks model.safetensors", "clip-vit-base-patch32"):
            run_score(*args)

    def test_pictures(self):
        a = write_pictures(self.dir / "a", 4)
        args = ("--generated", a, "--inception", WEIGHTS, *SMALL)
        whole = (a / "p001.png").read_bytes()
        (a / "p001.png").write_bytes(whole[: len(whole) // 2])
        with self.refused("p001.png", "not a readable picture"):
            run_score(*args, "--real", a)
        Image.new("RGB", (40, 40)).save(a / "p001.png")
        with self.refused("p001.png is 40x40", "p000.png is 48x40", "--any-size"):
            run_score(*args, "--real", a)
        Image.new("RGB", (40, 40)).save(a / "p001.jpg")
        with self.refused("p001.jpg and p001.png", "one id"):
            pictures.list_folder(a)
        for path in a.iterdir():
            path.unlink()
        with self.refused(a, "no pictures"):
            pictures.list_folder(a)

    def test_command_ends_with_one_line_and_status_2(self):
        import subprocess

        done = subprocess.run([EVAL / "score", "--generated", "/no"], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertTrue(done.stderr.startswith("tools/eval/score: "))


if __name__ == "__main__":
    unittest.main()
