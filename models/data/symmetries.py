"""Symmetries of a set of images, found in the images alone.

Axes: N images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from models.data.augmentation import SYMMETRIES, Symmetry, moved
from models.data.labelled import LabelledImages

ALIKE = 0.4
"""Share of nearer images from which on moved images count as alike."""
FEWEST_IMAGES = 20
"""Images to compare below which nothing is said."""


def symmetries_of(images: LabelledImages) -> list[Symmetry]:
    """Return the symmetries under which the images of each class look alike.

    If a class is as likely to hold an image as the moved one, then the moved image is nearer to the nearest other image
    of its class than the image itself in half of all cases. Mirrored digits seldom are (5 of 100 in MNIST), mirrored
    cells are.

    Args:
        images: a sample of the training set, some hundred small ones.
    """
    pixels_NCHW = images.pixels()
    uncompared_NN = (images.labels_N[:, None] != images.labels_N).fill_diagonal_(True)
    compared_N = ~uncompared_NN.all(1)
    if int(compared_N.sum()) < FEWEST_IMAGES:
        return []

    def nearest(changed_NCHW: torch.Tensor) -> Float[torch.Tensor, " N"]:
        distance_NN = torch.cdist(changed_NCHW.flatten(1), pixels_NCHW.flatten(1))
        return distance_NN.masked_fill(uncompared_NN, torch.inf).amin(1)[compared_N]

    own_N = nearest(pixels_NCHW)
    found: list[Symmetry] = []
    for symmetry in SYMMETRIES:
        if symmetry == "transpose" and pixels_NCHW.shape[2] != pixels_NCHW.shape[3]:
            continue
        moved_N = nearest(moved(pixels_NCHW, symmetry))
        if ((moved_N < own_N).double() + 0.5 * (moved_N == own_N).double()).mean() >= ALIKE:
            found.append(symmetry)
    return found
