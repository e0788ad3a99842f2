"""Figures of an evaluation, from the answers about a test set and the results of attacks.

Axes: N images, M attacked images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from models.evaluation import figures
from models.evaluation.attacks import AttackResult
from service.inference.classifier import Prediction
from service.inference.counterfactual import Counterfactual

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Measured:
    """Answers about the whole test set."""

    image_NCHW: Float64[np.ndarray, "N C H W"]
    label_N: Int64[np.ndarray, " N"]
    predictions: list[Prediction]
    counterfactuals: list[Counterfactual]
    posted_back_N: Int64[np.ndarray, " N"]
    """Class of each counterfactual when it is sent as a single image."""


def summarise(measured: Measured, epsilons: Sequence[float]) -> dict[str, Any]:
    """Return the figures of a test set; shares refer to all its images."""
    radius_N = np.array([prediction.radius for prediction in measured.predictions])
    class_N = np.array([prediction.class_id for prediction in measured.predictions])
    distance_N = np.array([answer.distance for answer in measured.counterfactuals])
    reached_N = np.array([answer.reached for answer in measured.counterfactuals])
    answer_class_N = np.array([answer.class_id for answer in measured.counterfactuals])
    steps_N = np.array([answer.steps for answer in measured.counterfactuals])
    right_N = class_N == measured.label_N
    return {
        "n": len(radius_N),
        "accuracy": float(right_N.mean()),
        "certified_accuracy": [{"epsilon": e, "value": float((right_N & (radius_N > e)).mean())} for e in epsilons],
        "median_radius": float(np.median(radius_N)),
        "radius_quantiles": _quantiles(radius_N),
        "abstentions": int((radius_N == 0).sum()),
        "counterfactuals": {
            "n": len(distance_N),
            "reached": float(reached_N.mean()),
            "nearer_than_radius": count_nearer_than_radius(measured),
            "other_class_when_posted_back": int((measured.posted_back_N != answer_class_N).sum()),
            "median_distance": float(np.median(distance_N)),
            "median_radius_over_distance": float(np.median(radius_N / distance_N)),
            "mean_steps": float(steps_N.mean()),
        },
    }


def summarise_attacks(
    measured: Measured, attacked_M: np.ndarray, nearest: AttackResult, epsilons: Sequence[float]
) -> dict[str, Any]:
    """Return certificate and attacks side by side, both on the attacked images.

    `robust_accuracy`: share of images that are right and for which no attack found another class within epsilon, an
    upper bound of every certified accuracy on these images. `tightness`: radius / distance of the nearest attack, over
    certified images that were flipped.

    Args:
        measured: answers about the whole test set.
        attacked_M: indices of the attacked images.
        nearest: union of all attacks.
        epsilons: L2 radii, pixels in [0, 1].
    """
    known = attacked_images(measured, attacked_M, nearest)
    tight_M = (known.radius_M > 0) & np.isfinite(known.distance_M)
    quotient_M = known.radius_M[tight_M] / known.distance_M[tight_M]
    return {
        "robust_accuracy": [
            {
                "epsilon": epsilon,
                "certified": float((known.right_M & (known.radius_M > epsilon)).mean()),
                "under_attack": float((known.right_M & (known.distance_M > epsilon)).mean()),
                "n": len(attacked_M),
            }
            for epsilon in epsilons
        ],
        "tightness": {
            "n": len(quotient_M),
            "median": float(np.median(quotient_M)) if len(quotient_M) else None,
            "quantiles": _quantiles(quotient_M),
        },
    }


def attacked_images(measured: Measured, attacked_M: np.ndarray, nearest: AttackResult) -> figures.Attacked:
    """Return whether the attacked images are right, their radii and the distances of the nearest attack.

    Args:
        measured: answers about the whole test set.
        attacked_M: indices of the attacked images.
        nearest: union of all attacks.
    """
    class_M = np.array([measured.predictions[m].class_id for m in attacked_M])
    return figures.Attacked(class_M == measured.label_N[attacked_M], nearest.radius_N, nearest.distance_N)


def count_nearer_than_radius(measured: Measured) -> int:
    """Return the number of counterfactuals whose distance is below the radius.

    The arithmetic is exact: squares of 8-bit differences over 255^2.
    """
    count = 0
    for image_CHW, prediction, answer in zip(
        measured.image_NCHW, measured.predictions, measured.counterfactuals, strict=True
    ):
        difference = np.rint(image_CHW * 255).astype(np.int64) - answer.pixels_CHW
        square = Fraction(int((difference * difference).sum()), 255 * 255)
        count += square < Fraction(prediction.radius) ** 2 or answer.distance < prediction.radius
    return count


def _quantiles(value_N: np.ndarray) -> dict[str, float]:
    return {f"{share:g}": float(np.quantile(value_N, share)) for share in QUANTILES} if len(value_N) else {}
