"""Distances between two sets of feature vectors, in f64, and their bootstrap.

Frechet distance of two Gaussians (Frechet 1957; as FID: Heusel et al. 2017, arXiv:1706.08500):
    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
Kernel distance (as KID: Binkowski et al. 2018, arXiv:1801.01401): the unbiased estimate of the squared maximum mean
discrepancy under k(x, y) = (x.y / D + 1)^3,
    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
"""

import numpy as np

from common import EvalError


def _features(name, x, least):
    x = np.asarray(x, np.float64)
    if x.ndim != 2:
        raise EvalError(f"{name} has shape {list(x.shape)}, expected [pictures, features]")
    if len(x) < least:
        raise EvalError(f"{name} holds {len(x)} feature vectors, at least {least} are needed; add pictures")
    if not np.isfinite(x).all():
        raise EvalError(
            f"{name} holds features that are not finite, the first in row {np.argwhere(~np.isfinite(x))[0][0]}"
        )
    return x


def gaussian(x):
    """(mean [D], covariance [D, D]) of features [N, D]; the covariance with N - 1, as numpy's and the libraries'."""
    x = _features("features", x, 2)
    return x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def _root(c):
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(c)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_of_gaussians(m1, c1, m2, c2):
    """Frechet distance of two Gaussians; symmetric eigenvalue problems only, so singular covariances are fine."""
    root = _root(c1)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c2 @ root), 0.0)).sum()
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2.0 * cross)


def frechet_distance(x, y):
    """Frechet distance of features x [N, D] and y [M, D].

    Biased upwards for few samples, the more so the larger D; with N or M <= D a covariance is singular.
    """
    x, y = _features("x", x, 2), _features("y", y, 2)
    if x.shape[1] != y.shape[1]:
        raise EvalError(f"x has {x.shape[1]} features, y has {y.shape[1]}: they come from different extractors")
    return frechet_of_gaussians(*gaussian(x), *gaussian(y))


def polynomial_kernel(x, y):
    """[N, M] of (x.y / D + 1)^3."""
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def kernel_distance(x, y, block=2048):
    """Unbiased squared MMD of x [N, D] and y [M, D], over all pairs; in blocks, so 10 000 pictures need no 800 MB."""
    x, y = _features("x", x, 2), _features("y", y, 2)

    def total(a, b):
        return sum(polynomial_kernel(a[i : i + block], b).sum() for i in range(0, len(a), block))

    def own(a):
        diagonal = ((np.square(a).sum(axis=1) / a.shape[1] + 1.0) ** 3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return float(own(x) + own(y) - 2.0 * total(x, y) / (len(x) * len(y)))


def kernel_distance_of_subsets(x, y, subsets=100, size=1000, seed=0):
    """(mean, standard deviation) of the kernel distance over random subsets, each drawn without repetition."""
    x, y = _features("x", x, 2), _features("y", y, 2)
    if not 2 <= size <= min(len(x), len(y)):
        raise EvalError(f"kernel distance: subsets of {size} of {len(x)} and {len(y)} pictures; give a size between")
    rng = np.random.default_rng(seed)
    values = [
        kernel_distance(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def resamples(count, times, seed):
    """[times, count] indices drawn with repetition; the same for all rows with one seed, which pairs them."""
    return np.random.default_rng(seed).integers(count, size=(times, count))


def interval(values, level=0.95):
    """(low, high): the percentile interval; NaN (a resample of one caption has no pair) is left out."""
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def bootstrap_mean(values, times=1000, seed=0, level=0.95):
    """(mean, low, high) of one value a caption; NaN (nothing to measure there) is left out of every mean."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).any():
        return float("nan"), float("nan"), float("nan")
    drawn = values[resamples(len(values), times, seed)]
    good = np.isfinite(drawn)
    counts = good.sum(axis=1)
    means = np.where(good, drawn, 0.0).sum(axis=1)[counts > 0] / counts[counts > 0]
    return float(np.nanmean(values)), *interval(means, level)


def bootstrap_difference(a, b, times=1000, seed=0, level=0.95):
    """(mean(a) - mean(b), low, high), paired: a[i] and b[i] are of the same caption and resampled together."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise EvalError(f"paired difference of {len(a)} and {len(b)} captions: both rows need the same captions")
    return bootstrap_mean(a - b, times, seed, level)


def _centred(estimate, values, level):
    """Percentile interval of the resamples, moved so that their mean lies on the estimate.

    A resample has fewer different pictures than the sample, so its distance is larger by a bias that says nothing of
    the uncertainty. What is left is the spread.
    """
    low, high = interval(np.asarray(values) - np.nanmean(values) + estimate, level)
    return estimate, low, high


def _captions(x, y, each, paired):
    """Number of captions that rows of x, `each` a caption, belong to; with paired those of y too."""
    if len(x) % each or (paired and len(y) != len(x)):
        raise EvalError(f"{len(x)} and {len(y)} feature vectors, {each} a caption: every caption needs as many")
    return len(x) // each


def _drawn(captions, each, times, seed):
    """Rows of every resample of so many captions, `each` rows a caption."""
    for resample in resamples(captions, times, seed):
        yield (resample[:, None] * each + np.arange(each)).ravel()


def bootstrap_frechet(x, y, times=200, seed=0, level=0.95, paired=False, each=1):
    """(distance, low, high); captions are resampled, rows c * each ... c * each + each - 1 of x are caption c's.

    y is a fixed reference, or with paired has the same captions, which are then resampled together.
    """
    x, y = _features("x", x, 2), _features("y", y, 2)
    fixed = gaussian(y)
    values = []
    for drawn in _drawn(_captions(x, y, each, paired), each, times, seed):
        values.append(frechet_of_gaussians(*gaussian(x[drawn]), *(gaussian(y[drawn]) if paired else fixed)))
    return _centred(frechet_distance(x, y), values, level)


def bootstrap_frechet_difference(a, b, y, times=200, seed=0, level=0.95, each=1):
    """(distance of a to y - distance of b to y, low, high), paired: captions are resampled in a and b together.

    y is a fixed reference; rows as in bootstrap_frechet.
    """
    a, b, y = (_features(name, x, 2) for name, x in (("a", a), ("b", b), ("y", y)))
    fixed = gaussian(y)
    values = []
    for drawn in _drawn(_captions(a, b, each, paired=True), each, times, seed):
        of_a, of_b = (frechet_of_gaussians(*gaussian(x[drawn]), *fixed) for x in (a, b))
        values.append(of_a - of_b)
    return _centred(frechet_distance(a, y) - frechet_distance(b, y), values, level)


def weighted_kernel_distance(kxx, kyy, kxy, w, v):
    """Kernel distance where picture i of x is there w[i] times and j of y v[j] times; no picture pairs with itself.

    NaN where only one picture of a set is there.
    """

    def own(kernel, weights):
        inner = weights @ kernel @ weights - np.square(weights) @ np.diagonal(kernel)
        pairs = weights.sum() ** 2 - np.square(weights).sum()
        return inner / pairs if pairs > 0 else np.nan

    return own(kxx, w) + own(kyy, v) - 2.0 * w @ kxy @ v / (w.sum() * v.sum())


def bootstrap_kernel(x, y, times=200, seed=0, level=0.95, paired=False, each=1):
    """(distance, low, high) of the kernel distance over all pairs, resampled as in bootstrap_frechet.

    A picture drawn twice is a pair with itself, which the unbiased estimate leaves out: such pairs get no weight.
    """
    x, y = _features("x", x, 2), _features("y", y, 2)
    kernels = [polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)]
    ones = np.ones(len(y))
    values = []
    count = _captions(x, y, each, paired)
    for captions in resamples(count, times, seed):
        weights = np.repeat(np.bincount(captions, minlength=count).astype(np.float64), each)
        values.append(weighted_kernel_distance(*kernels, weights, weights if paired else ones))
    return _centred(kernel_distance(x, y), values, level)
