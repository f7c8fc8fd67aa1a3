"""Frechet and kernel distance and their bootstrap: closed forms, plain loops, scipy, torch-fidelity."""

import unittest

import numpy as np
import scipy.linalg
from helpers import TempCase

import distances


def features(n, d, seed, scale=1.0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale / np.sqrt(d) + shift


class Frechet(TempCase):
    def test_closed_form_of_commuting_covariances(self):
        q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
        a, b = np.array([1.0, 4.0, 9.0, 0.25, 2.0]), np.array([4.0, 1.0, 0.5, 0.25, 0.1])
        mean = np.array([1.0, -2.0, 0.0, 0.5, 3.0])
        got = distances.frechet_of_gaussians(mean, q @ np.diag(a) @ q.T, 0 * mean, q @ np.diag(b) @ q.T)
        want = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
        self.assertAlmostEqual(got, want, delta=1e-10)

    def test_one_feature(self):
        x, y = np.array([[1.0], [3.0], [8.0]]), np.array([[0.0], [2.0]])
        want = (4 - 1) ** 2 + (np.std(x, ddof=1) - np.std(y, ddof=1)) ** 2
        self.assertAlmostEqual(distances.frechet_distance(x, y), want, delta=1e-12)

    def test_as_scipy_sqrtm_and_torch_fidelity(self):
        import torch
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

        x, y = features(200, 24, 1), features(150, 24, 2, 1.3, 0.2)
        (m1, c1), (m2, c2) = distances.gaussian(x), distances.gaussian(y)
        root = scipy.linalg.sqrtm(c1 @ c2)
        want = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * root.real)
        got = distances.frechet_distance(x, y)
        self.assertAlmostEqual(got, want, delta=1e-9 * want)
        stats = [fid_features_to_statistics(torch.from_numpy(z)) for z in (x, y)]
        library = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        self.assertAlmostEqual(got, library, delta=1e-9 * want)

    def test_of_a_set_and_itself_is_zero_even_when_singular(self):
        x = features(6, 24, 3)
        self.assertAlmostEqual(distances.frechet_distance(x, x), 0.0, delta=1e-6)

    def test_errors_name_the_shape_and_the_count(self):
        with self.refused("x", "[3]", "[pictures, features]"):
            distances.frechet_distance(np.zeros(3), np.zeros((4, 3)))
        with self.refused("1 feature vectors", "2"):
            distances.frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))
        with self.refused("3 features", "4"):
            distances.frechet_distance(np.zeros((5, 3)), np.zeros((5, 4)))
        with self.refused("not finite", "row 2"):
            distances.frechet_distance(np.array([[0.0], [1.0], [np.nan]]), np.zeros((5, 1)))


class Kernel(TempCase):
    def test_as_plain_loops_whatever_the_block(self):
        x, y = features(7, 3, 1), features(5, 3, 2, 1.2)

        def k(a, b):
            return (float(np.dot(a, b)) / 3 + 1) ** 3

        own = [np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]) for z in (x, y)]
        want = sum(own) - 2 * np.mean([k(a, b) for a in x for b in y])
        for block in (1, 2, 3, 100):
            self.assertAlmostEqual(distances.kernel_distance(x, y, block), want, delta=1e-12)

    def test_of_whole_subsets_as_torch_fidelity(self):
        import torch
        from torch_fidelity.metric_kid import kid_features_to_metric

        x, y = features(40, 6, 1), features(40, 6, 2, 1.1, 0.1)
        both = [torch.from_numpy(z) for z in (x, y)]
        library = kid_features_to_metric(*both, kid_subsets=1, kid_subset_size=40, rng_seed=1, verbose=False)
        got = distances.kernel_distance(x, y)
        self.assertAlmostEqual(got, library["kernel_inception_distance_mean"], delta=1e-10)
        mean, std = distances.kernel_distance_of_subsets(x, y, subsets=3, size=40, seed=5)
        self.assertAlmostEqual(mean, got, delta=1e-10)
        self.assertAlmostEqual(std, 0.0, delta=1e-10)

    def test_is_unbiased(self):
        """Over many pairs of sets of one distribution the mean is zero within four standard errors."""
        rng = np.random.default_rng(0)
        values = [distances.kernel_distance(rng.normal(size=(8, 3)), rng.normal(size=(6, 3))) for _ in range(4000)]
        self.assertLess(abs(np.mean(values)), 4 * np.std(values) / np.sqrt(len(values)))

    def test_subset_larger_than_the_set(self):
        with self.refused("subsets of 9", "8 and 20"):
            distances.kernel_distance_of_subsets(np.zeros((8, 2)), np.zeros((20, 2)), size=9)


class Bootstrap(TempCase):
    def test_of_a_mean_covers_it_as_often_as_stated(self):
        rng = np.random.default_rng(1)
        covered = 0
        for i in range(400):
            _, low, high = distances.bootstrap_mean(rng.normal(size=60), times=300, seed=i)
            covered += low <= 0.0 <= high
        self.assertGreater(covered, 400 * 0.90)
        self.assertLess(covered, 400 * 0.99)

    def test_is_seeded(self):
        x = np.arange(20.0)
        self.assertEqual(distances.bootstrap_mean(x, seed=3), distances.bootstrap_mean(x, seed=3))
        self.assertNotEqual(distances.bootstrap_mean(x, seed=3), distances.bootstrap_mean(x, seed=4))

    def test_nan_is_left_out(self):
        mean, low, high = distances.bootstrap_mean([1.0, np.nan, 1.0, 1.0])
        self.assertEqual((mean, low, high), (1.0, 1.0, 1.0))
        self.assertTrue(np.isnan(distances.bootstrap_mean([np.nan, np.nan])).all())

    def test_paired_difference_is_tighter_than_two_intervals(self):
        rng = np.random.default_rng(0)
        shared = rng.normal(size=100) * 5
        mean, low, high = distances.bootstrap_difference(shared + 1 + rng.normal(size=100) * 0.1, shared)
        self.assertTrue(0.9 < low < mean < high < 1.1)
        with self.refused("3 and 2 captions"):
            distances.bootstrap_difference([1, 2, 3], [1, 2])

    def test_paired_difference_of_distances(self):
        truth = features(400, 4, 0)
        near = np.repeat(features(40, 4, 1), 2, axis=0)  # two rows a caption
        far = near + np.array([0.5, 0, 0, 0])
        want = distances.frechet_distance(far, truth) - distances.frechet_distance(near, truth)
        value, low, high = distances.bootstrap_frechet_difference(far, near, truth, each=2)
        self.assertAlmostEqual(value, want, delta=1e-12)
        self.assertTrue(low < value < high)
        spread = [h - l for _, l, h in (distances.bootstrap_frechet(x, truth, each=2) for x in (far, near))]
        self.assertLess(high - low, sum(spread))
        back = distances.bootstrap_frechet_difference(near, far, truth, each=2)
        np.testing.assert_allclose(back, (-value, -high, -low), atol=1e-12)
        np.testing.assert_array_equal(distances.bootstrap_frechet_difference(far, far, truth, each=2), 0)
        with self.refused("80 and 78 feature vectors, 2 a caption"):
            distances.bootstrap_frechet_difference(far, near[:78], truth, each=2)

    def test_weighted_kernel_distance_is_that_of_repeated_pictures(self):
        x, y = features(5, 3, 1), features(4, 3, 2)
        w, v = np.array([2.0, 0.0, 1.0, 3.0, 1.0]), np.array([1.0, 0.0, 2.0, 1.0])
        kernels = [distances.polynomial_kernel(*z) for z in ((x, x), (y, y), (x, y))]

        def mean_of_pairs(kernel, weights):
            drawn = np.repeat(np.arange(len(weights)), weights.astype(int))
            return np.mean([kernel[i, j] for i in drawn for j in drawn if i != j])

        cross = np.mean([kernels[2][i, j] for i in np.repeat(range(5), [2, 0, 1, 3, 1]) for j in (0, 2, 2, 3)])
        want = mean_of_pairs(kernels[0], w) + mean_of_pairs(kernels[1], v) - 2 * cross
        self.assertAlmostEqual(distances.weighted_kernel_distance(*kernels, w, v), want, delta=1e-12)
        ones = distances.weighted_kernel_distance(*kernels, np.ones(5), np.ones(4))
        self.assertAlmostEqual(ones, distances.kernel_distance(x, y), delta=1e-12)

    def test_two_captions_are_enough(self):
        """Half of the resamples are one picture twice and have no pair."""
        x, y = features(2, 3, 1), features(5, 3, 2)
        self.assertTrue(np.isfinite(distances.bootstrap_kernel(x, y)).all())

    def test_rows_of_a_caption_stay_together(self):
        """Two equal rows a caption: the intervals of single rows, up to N - 1 against N."""
        x, y = features(300, 3, 1, 1.0, 0.5), features(50, 3, 2)
        for function in (distances.bootstrap_frechet, distances.bootstrap_kernel):
            one = np.diff(function(x, y, times=50)[1:])
            two = np.diff(function(np.repeat(x, 2, axis=0), y, times=50, each=2)[1:])
            self.assertAlmostEqual(float(two[0] / one[0]), 1, delta=0.05)
            with self.refused("300 and 50 feature vectors", "7 a caption"):
                function(x, y, each=7)

    def test_interval_lies_about_the_estimate(self):
        """Few pictures, many features: every resample is further from y than the sample; the interval is moved back."""
        x, y = features(15, 10, 1), features(200, 10, 2)
        for function in (distances.bootstrap_frechet, distances.bootstrap_kernel):
            estimate, low, high = function(x, y)
            self.assertTrue(low < estimate < high)
            self.assertLess(abs((low + high) / 2 - estimate), 0.3 * (high - low))

    def test_intervals_hold_the_estimate_and_shrink_with_more_pictures(self):
        widths = []
        for n in (40, 640):
            x, y = features(n, 4, 1, 1.0, 0.3), features(n, 4, 2)
            for function in (distances.bootstrap_frechet, distances.bootstrap_kernel):
                for paired in (False, True):
                    estimate, low, high = function(x, y, times=100, paired=paired)
                    self.assertTrue(low < estimate < high)
                    widths.append(high - low)
        for small, large in zip(widths[:4], widths[4:]):
            self.assertLess(large, small)


if __name__ == "__main__":
    unittest.main()
