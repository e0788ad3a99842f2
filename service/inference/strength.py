"""Counterfactuals beyond the boundary: images that a person believes, at a multiple of the nearest distance.

The nearest counterfactual lies at the boundary, where the model itself is undecided. From there the transport goes on:
within the ball of `strength` times its distance around the image as sent, and within the box of pixels, the margin
`f_i - f_j` to the class j that was reached is lowered as far as a few gradients can.

The lowest point of a linear function in ball and box is `clip(x_0 - lambda g)` with one scalar lambda. The first point
is that of the way to the nearest counterfactual, extended to the ball; each further one is that of the mean of this way
and all gradients so far (dual averaging: Nesterov 2009), because one gradient alone overshoots the kinks of a network.
The point with the lowest margin is classified by the path that serves predictions and is the answer if its class is
certified; otherwise the answer is the nearest counterfactual.

Axes: N batch, M images with a strength above 1, C channels, H and W of the image as sent, K classes, D = C H W. Pixels
are in units of 1 / 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.inference.closest import LEVELS, bounded, l2_distance, lowest_levels, rows_dot
from service.inference.counterfactual import Counterfactual, Differentiable
from service.pixels.images import to_unit
from service.shapes import Float64

# Chosen on test images of the shipped models; docs/counterfactuals.md has the results.
GRADIENTS = 8
# Weight of the way in that mean, in units of the first gradient: under a global maximum it knows kinks that eight
# gradients do not reach.
_WAY = 2.0
# A distance at the reach is within it, whatever its last bits are.
_ROUNDING = 1.0 + 1e-12


def strengthen(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    class_id_N: Sequence[int],
    found: Sequence[Counterfactual],
    strength_N: Sequence[float],
    n_classes: int,
) -> list[Counterfactual]:
    """Return counterfactuals of the same classes at up to `strength` times the distance.

    A counterfactual with the strength 1, or that did not reach its class, is returned as it is.

    Args:
        model: see `find_counterfactuals`.
        image_NCHW: pixels in [0, 1].
        class_id_N: predicted classes.
        found: the nearest counterfactuals.
        strength_N: at least 1.
        n_classes: K.
    """
    answers = list(found)
    rows = [n for n, one in enumerate(found) if strength_N[n] > 1.0 and one.reached]
    if not rows:
        return answers
    image_MCHW = image_NCHW[rows]
    target_M = np.array([found[n].class_id for n in rows])
    nearest_MD = np.array([found[n].pixels_CHW for n in rows], np.float64).reshape(len(rows), -1)
    reach_M = _ROUNDING * LEVELS * np.array([strength_N[n] * found[n].distance for n in rows])
    rival_M = np.array([class_id_N[n] for n in rows])
    level_MD = _descend(model, image_MCHW, target_M, rival_M, nearest_MD, reach_M, n_classes)
    pixels_MCHW = level_MD.astype(np.uint8).reshape(image_MCHW.shape)
    _, radii = model.classify(to_unit(pixels_MCHW))
    distance_M = l2_distance(image_MCHW, pixels_MCHW)
    certain_M = radii.certified_N & (radii.class_id_N == target_M) & (LEVELS * distance_M <= reach_M)
    certain_M &= distance_M >= [found[n].distance for n in rows]
    for m, n in enumerate(rows):
        nearest = found[n]
        answers[n] = replace(nearest, nearest_distance=nearest.distance)
        if certain_M[m]:
            answers[n] = replace(answers[n], pixels_CHW=pixels_MCHW[m], distance=float(distance_M[m]))
    return answers


def _descend(
    model: Differentiable,
    image_MCHW: np.ndarray,
    target_M: np.ndarray,
    rival_M: np.ndarray,
    nearest_MD: np.ndarray,
    reach_M: np.ndarray,
    n_classes: int,
) -> np.ndarray:
    """Return the 8-bit images with the lowest margins found, the nearest counterfactual where there is no lower one."""
    row_M = np.arange(len(target_M))
    start_MD = image_MCHW.reshape(len(row_M), -1) * LEVELS
    best_MD, lowest_M = nearest_MD, np.zeros(len(row_M))
    slope_MD = start_MD - nearest_MD
    for step in range(GRADIENTS):
        level_MD = lowest_levels(start_MD, slope_MD, reach_M)
        weights_MK = np.zeros((len(row_M), n_classes))
        weights_MK[row_M, rival_M] = 1.0
        weights_MK[row_M, target_M] = -1.0
        logits_MK, gradient_MCHW = model.margin_gradient((level_MD / LEVELS).reshape(image_MCHW.shape), weights_MK)
        others_MK = logits_MK.copy()
        others_MK[row_M, target_M] = -np.inf
        rival_M = others_MK.argmax(axis=1)
        margin_M = others_MK[row_M, rival_M] - logits_MK[row_M, target_M]
        difference_MD = level_MD - start_MD
        lower_M = (margin_M < lowest_M) & (rows_dot(difference_MD, difference_MD) <= reach_M**2)
        best_MD[lower_M], lowest_M = level_MD[lower_M], np.where(lower_M, margin_M, lowest_M)
        gradient_MD = bounded(gradient_MCHW.reshape(len(row_M), -1))
        if step == 0:
            square_M = rows_dot(gradient_MD, gradient_MD) / rows_dot(slope_MD, slope_MD)
            slope_MD = _WAY * np.sqrt(square_M)[:, None] * slope_MD
        slope_MD = slope_MD + gradient_MD
    return best_MD
