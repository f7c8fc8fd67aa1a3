"""The feature bank: what it is made of, and that its distances grow with known damage to ground-truth scenes."""

import unittest

import corruptions
import numpy as np
from helpers import TempCase
from scipy import ndimage

import distances
import features
import pictures
import sharpness


class Bank(TempCase):
    def test_shape_and_groups(self):
        out = features.bank(np.random.default_rng(0).random((2, 64, 64, 3), np.float32))
        self.assertEqual(out.shape, (2, sum(features.GROUPS.values())))
        self.assertTrue(np.isfinite(out).all())
        with self.refused("[64, 64, 3]", "[N, 64, 64, 3]"):
            features.bank(np.zeros((64, 64, 3)))

    def test_flat_picture(self):
        """Grids are the colour, amplitudes are nothing."""
        out = features.bank(np.full((1, 64, 64, 3), 0.5, np.float32) * np.array([1, 0.5, 0.25], np.float32))[0]
        layout = out[:27].reshape(3, 9) * features.GAIN["layout"] + np.array(features.CENTRE["layout"])[:, None]
        np.testing.assert_allclose(layout, np.repeat([[1.75 / 6], [0.25], [0.25]], 9, axis=1), atol=1e-6)
        edges = out[27:39] * features.GAIN["edges"] + np.repeat(features.CENTRE["edges"], 4)
        np.testing.assert_allclose(edges, 0, atol=1e-4)

    def test_waves_are_seen_at_their_wavelength_and_direction(self):
        y, x = np.mgrid[:64, :64]
        for i, wavelength in enumerate(features.WAVELENGTHS):
            for k in range(features.DIRECTIONS):
                angle = k * np.pi / features.DIRECTIONS
                wave = 0.5 + 0.2 * np.cos(2 * np.pi / wavelength * (x * np.cos(angle) + y * np.sin(angle)))
                planes = features._amplitudes(wave.astype(np.float32), features._bank().reshape(12, 96, 96))
                seen = planes[:, 16:48, 16:48].mean(axis=(1, 2))
                self.assertEqual(int(seen.argmax()), 4 * i + k)
                self.assertAlmostEqual(seen.max(), 0.1, delta=0.012)  # half the amplitude: one of two lobes

    def test_resized_is_antialiased(self):
        fine = np.zeros((256, 256, 3), np.float32)
        fine[::2] = 1
        np.testing.assert_allclose(features.resized(fine)[4:-4], 0.5, atol=0.02)
        small = np.random.default_rng(0).random((64, 64, 3), np.float32)
        np.testing.assert_array_equal(features.resized(small), small)

    def test_crop_features_are_those_of_the_crops(self):
        picture = np.random.default_rng(0).random((80, 96, 3), np.float32)
        crops = pictures.Crops(64, 2, 3)
        (x, y), _ = crops.boxes("a", 96, 80)
        got = features.crop_features([picture], ["a"], crops)
        np.testing.assert_allclose(got[0], features.bank(picture[None, y : y + 64, x : x + 64])[0], atol=1e-6)
        with self.refused("32x32", "64x64"):
            features.crop_features([picture], ["a"], pictures.Crops(32, 2))


class Damage(TempCase):
    """40 scenes at 128x128, one crop each: the distances of growing damage to 40 other scenes grow."""

    @classmethod
    def setUpClass(cls):
        cls.ids = [str(i) for i in range(40)]
        cls.reference = cls.extract(corruptions.render(corruptions.some_scenes(40, 1), 128))
        cls.levels = corruptions.damage(corruptions.some_scenes(40, 2), 128)

    @classmethod
    def extract(cls, drawn):
        return features.crop_features(drawn, cls.ids, pictures.Crops(64, 1))

    def distances(self, name, skip=()):
        sets = [self.extract(level) for i, level in enumerate(self.levels[name]) if i not in skip]
        return [[f(s, self.reference) for s in sets] for f in (distances.frechet_distance, distances.kernel_distance)]

    def assert_growing(self, rows):
        for row in rows:
            self.assertTrue(all(a < b for a, b in zip(row, row[1:])), row)

    def test_blur(self):
        self.assert_growing(self.distances("blur, sigma 0.5, 1, 2, 4 pixels"))

    def test_noise(self):
        self.assert_growing(self.distances("noise, deviation 0.01, 0.03, 0.1, 0.3"))

    def test_superfluous_objects(self):
        self.assert_growing(self.distances("1, 2, 3, 4 superfluous objects"))

    def test_wrong_colours(self):
        self.assert_growing(self.distances("25, 50, 75, 100 % of the objects purple", skip=(1, 3)))

    def test_an_enlarged_picture_is_further_than_a_true_one(self):
        drawn = corruptions.some_scenes(40, 2)
        true, enlarged = corruptions.render(drawn, 128), corruptions.upscaled(drawn, 128)
        self.assert_growing([[distances.frechet_distance(self.extract(p), self.reference) for p in (true, enlarged)]])


class Sharpness(TempCase):
    def test_by_definition(self):
        picture = np.random.default_rng(0).random((20, 27, 3))
        luma = picture.mean(axis=2)
        high = luma - ndimage.gaussian_filter(luma, 1.0)
        blocks = [np.mean(high[a : a + 8, b : b + 8] ** 2) for a in (0, 8) for b in (0, 8, 16)]
        got = sharpness.energies(picture)
        self.assertAlmostEqual(got[0], np.mean(high**2), delta=1e-15)
        self.assertAlmostEqual(got[1], np.median(blocks), delta=1e-15)

    def test_is_zero_for_the_truth_and_falls_with_blur(self):
        (picture,) = corruptions.render(corruptions.some_scenes(1, 3), 128)
        self.assertEqual(sharpness.relative(picture, [picture]), (0.0, 0.0))
        blurred = [sharpness.relative(corruptions.blurred([picture], s)[0], [picture]) for s in (0.5, 1.0, 2.0)]
        for a, b in zip(blurred, blurred[1:]):
            self.assertLess(b[0], a[0])
            self.assertLess(b[1], a[1])
        self.assertLess(blurred[0][0], 0)
        self.assertGreater(sharpness.relative(corruptions.noisy([picture], 0.1)[0], [picture])[0], 0)

    def test_flat_pictures_are_finite(self):
        flat = np.full((16, 16, 3), 0.5)
        self.assertEqual(sharpness.relative(flat, [flat]), (0.0, 0.0))


if __name__ == "__main__":
    unittest.main()
