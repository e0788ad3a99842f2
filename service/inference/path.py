"""The path from the image as sent to its counterfactual: 8-bit images at equal steps of a straight line.

Each image is classified by the path that serves predictions. So posting one back gives the stated class and radius, up
to the rounding by which the logits of two batches may differ.

Axes: N batch, P images of one path, M images of all paths, C channels, H and W of the image as sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.inference.closest import LEVELS, l2_distance
from service.inference.counterfactual import Counterfactual, Differentiable
from service.pixels.images import to_unit
from service.shapes import Float64, UInt8

# Images in one forward pass, unless the batch has more.
_TOGETHER = 16


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
        model: classifies, at most as many images at once as the batch has, or 16.
        image_NCHW: pixels in [0, 1].
        found: the counterfactuals, each the last image of its path.
        count_N: at least 2.
    """
    paths = [
        _line(image_CHW, one.pixels_CHW, count)
        for image_CHW, one, count in zip(image_NCHW, found, count_N, strict=True)
    ]
    if not paths:
        return []
    pixels_MCHW = np.concatenate(paths)
    most = max(len(image_NCHW), _TOGETHER)
    measured: list[tuple[int, float, float]] = []
    for start in range(0, len(pixels_MCHW), most):
        logits_LK, radii = model.classify(to_unit(pixels_MCHW[start : start + most]))
        row_L = np.arange(len(logits_LK))
        margin_L = logits_LK[row_L, radii.class_id_N] - logits_LK[row_L, radii.runner_up_N]
        measured += zip(radii.class_id_N.tolist(), margin_L.tolist(), radii.radius_N.tolist(), strict=True)
    distances = l2_distance(np.repeat(image_NCHW, list(count_N), axis=0), pixels_MCHW).tolist()
    ends = np.cumsum(count_N).tolist()
    return [
        tuple(Waypoint(pixels_MCHW[m], *measured[m], distances[m]) for m in range(end - count, end))
        for end, count in zip(ends, count_N, strict=True)
    ]


def _line(image_CHW: np.ndarray, last_CHW: np.ndarray, count: int) -> np.ndarray:
    """Return `count` images at equal steps, uint8, P x C x H x W."""
    first_CHW = np.rint(image_CHW * LEVELS)
    share_P = np.linspace(0.0, 1.0, count)[:, None, None, None]
    return np.rint(first_CHW + share_P * (last_CHW - first_CHW)).astype(np.uint8)
