"""How sharp and how textured a picture is beside ground truth at its own size, in decibels.

    h = Y - G * Y           Y luma (mean of R, G, B) in 0..1, G a Gaussian of 1 pixel
    sharpness               10 log10 ((mean of h^2 + q) / (the same of ground truth))
    texture                 the same with the median over 8x8 blocks of the blocks' means of h^2 in place of the mean

0 dB: as much fine detail as the true rendering at that size has; -3 dB: half; -10 dB: a tenth. Outlines dominate the
mean; blocks with an outline are few, so the median is that of the ground's texture. q = (1/255)^2 / 12, what rounding
to 8 bits leaves in a flat picture, keeps flat pictures finite. Noise counts as detail: read beside the crop distances.
"""

import numpy as np
from scipy import ndimage

ROUNDING = (1 / 255) ** 2 / 12
BLOCK = 8


def energies(picture):
    """(mean, median over blocks) of h^2 of a picture f32 [h, w, 3] in 0..1; sides of 8 pixels or more."""
    luma = np.asarray(picture, np.float64).mean(axis=2)
    square = np.square(luma - ndimage.gaussian_filter(luma, 1.0, mode="reflect"))
    rows, columns = (side // BLOCK * BLOCK for side in square.shape)
    blocks = square[:rows, :columns].reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).mean(axis=(1, 3))
    return float(square.mean()), float(np.median(blocks))


def relative(picture, truths):
    """(sharpness, texture) in dB of a picture beside the mean energies of true renderings at its size."""
    mine = np.array(energies(picture))
    true = np.mean([energies(t) for t in truths], axis=0)
    sharpness, texture = 10 * np.log10((mine + ROUNDING) / (true + ROUNDING))
    return float(sharpness), float(texture)
