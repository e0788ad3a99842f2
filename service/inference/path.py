"""The path from the image as sent to its counterfactual: 8-bit images at equal steps of a straight line.

Each image is classified by the path that serves predictions. So posting one back gives the stated class and radius, up
to the rounding by which the logits of two batches may differ.

Axes: N batch, P images of one path, K classes, C channels, H and W of the image as sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.inference.closest import LEVELS, l2_distance
from service.inference.counterfactual import Counterfactual, Differentiable
from service.pixels.images import to_unit
from service.shapes import Float64, UInt8


@dataclass(frozen=True)
class Waypoint:
    """One image of a path, as measured."""

    pixels_CHW: UInt8[np.ndarray, "C H W"]
    class_id: int
    margin: float
    """`f_i - f_j` of this class i and the class j that decides the radius; computed, without proof."""
    radius: float
    """Certified, L2, proved at this image itself; 0 where nothing is certified."""
    distance: float
    """L2 distance from the image as sent, in [0, 1] pixel units."""


def find_paths(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    found: Sequence[Counterfactual],
    count_N: Sequence[int],
) -> list[tuple[Waypoint, ...]]:
    """Return a path of `count` images for each counterfactual; the first is the nearest 8-bit image to the one sent.

    Args:
        model: classifies the images of one path at once.
        image_NCHW: pixels in [0, 1].
        found: the counterfactuals, each the last image of its path.
        count_N: at least 2.
    """
    # One path at a time: together the paths of a batch have many times the pixels of its images.
    return [
        _measured(model, image_CHW, _line(image_CHW, one.pixels_CHW, count))
        for image_CHW, one, count in zip(image_NCHW, found, count_N, strict=True)
    ]


def _measured(model: Differentiable, image_CHW: np.ndarray, pixels_PCHW: np.ndarray) -> tuple[Waypoint, ...]:
    logits_PK, radii = model.classify(to_unit(pixels_PCHW))
    row_P = np.arange(len(pixels_PCHW))
    margin_P = logits_PK[row_P, radii.class_id_N] - logits_PK[row_P, radii.runner_up_N]
    distance_P = l2_distance(np.broadcast_to(image_CHW, pixels_PCHW.shape), pixels_PCHW)
    columns = (radii.class_id_N, margin_P, radii.radius_N, distance_P)
    return tuple(map(Waypoint, pixels_PCHW, *(column.tolist() for column in columns)))


def _line(image_CHW: np.ndarray, last_CHW: np.ndarray, count: int) -> np.ndarray:
    """Return `count` images at equal steps, uint8, P x C x H x W."""
    first_CHW = np.rint(image_CHW * LEVELS)
    share_P = np.linspace(0.0, 1.0, count)[:, None, None, None]
    return np.rint(first_CHW + share_P * (last_CHW - first_CHW)).astype(np.uint8)
