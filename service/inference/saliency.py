"""Saliency: the transport direction at the image, as the gradient of the margin that decides the radius.

A model trained with the hKR loss has gradients along its transport plan, so the gradient of the margin `f_i - f_j`
itself explains the decision; nothing is averaged or smoothed. Its L2 norm is at most `K_ij` in exact arithmetic. The
gradient graph computes it, which carries no proof.

Axes: N batch, C channels, H and W of the image as sent, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.inference.closest import bounded
from service.inference.counterfactual import Differentiable
from service.shapes import Float32, Float64

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Saliency:
    """The gradient of `f_i - f_j` at one image, i the predicted class."""

    class_id: int
    """j, the runner-up of the answer."""
    gradient_CHW: Float32[np.ndarray, "C H W"]
    """Rise of the margin per unit of a pixel in [0, 1]; entries that are not numbers are 0."""


def find_saliencies(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    class_id_N: Sequence[int],
    runner_up_N: Sequence[int],
    n_classes: int,
) -> list[Saliency]:
    """Return the saliency of each image, in one run of the gradient graph.

    Args:
        model: differentiates.
        image_NCHW: pixels in [0, 1].
        class_id_N: predicted classes i.
        runner_up_N: the classes j.
        n_classes: K.
    """
    if len(image_NCHW) == 0:
        return []
    row_N = np.arange(len(image_NCHW))
    weights_NK = np.zeros((len(image_NCHW), n_classes))
    weights_NK[row_N, class_id_N] = 1.0
    weights_NK[row_N, runner_up_N] = -1.0
    _, gradient_NCHW = model.margin_gradient(image_NCHW, weights_NK)
    single_NCHW = np.clip(bounded(gradient_NCHW), -_LARGEST, _LARGEST).astype(np.float32)
    return [Saliency(runner_up, one_CHW) for runner_up, one_CHW in zip(runner_up_N, single_NCHW, strict=True)]
