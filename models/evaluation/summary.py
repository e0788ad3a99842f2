"""Figures of an evaluation, from the answers about a test set and the results of attacks.

Each image has two radii: the one that is proved at the image as sent (`proof=fast`), and the largest one that was found
with reference images (`proof=best`), under the keys `with_references` and in the arrays `best`.

Axes: N images, M attacked images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from models.evaluation import figures
from models.evaluation.attacks import AttackResult
from models.evaluation.details import Answers
from service.inference.classifier import Prediction
from service.inference.counterfactual import Counterfactual

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class ReferenceProofs:
    """Radii of the whole test set with reference images."""

    radius_N: Float64[np.ndarray, " N"]
    """The largest radius found (`proof=best` without epsilon)."""
    steps_N: Int64[np.ndarray, " N"]
    """Gradient passes of that search."""
    radius_at_epsilon: Mapping[float, Float64[np.ndarray, " N"]]
    """The radius of `proof=best` with that epsilon, where the search ends."""

    @property
    def largest_N(self) -> Float64[np.ndarray, " N"]:
        """The largest radius of any of these searches: all of them are proved."""
        return np.max([self.radius_N, *self.radius_at_epsilon.values()], axis=0)


@dataclass(frozen=True)
class Measured:
    """Answers about the whole test set."""

    image_NCHW: Float64[np.ndarray, "N C H W"]
    label_N: Int64[np.ndarray, " N"]
    predictions: list[Prediction]
    counterfactuals: list[Counterfactual]
    posted_back_N: Int64[np.ndarray, " N"]
    """Class of each counterfactual when it is sent as a single image."""
    proved: ReferenceProofs

    @property
    def right_N(self) -> Bool[np.ndarray, " N"]:
        """Whether the predicted class is right."""
        return np.array([prediction.class_id for prediction in self.predictions]) == self.label_N

    @property
    def radius_N(self) -> Float64[np.ndarray, " N"]:
        """Radii without reference images."""
        return np.array([prediction.radius for prediction in self.predictions])


def answers_of(labels: Sequence[str], measured: Measured) -> Answers:
    """Return the answers of a measurement with their labels, for the figures of each class."""
    class_N = np.array([prediction.class_id for prediction in measured.predictions], np.int64)
    return Answers(tuple(labels), measured.label_N, class_N, measured.radius_N)


def summarise(measured: Measured, epsilons: Sequence[float]) -> dict[str, Any]:
    """Return the figures of a test set; shares refer to all its images."""
    right_N, radius_N, proved = measured.right_N, measured.radius_N, measured.proved
    distance_N = np.array([answer.distance for answer in measured.counterfactuals])
    reached_N = np.array([answer.reached for answer in measured.counterfactuals])
    answer_class_N = np.array([answer.class_id for answer in measured.counterfactuals])
    steps_N = np.array([answer.steps for answer in measured.counterfactuals])
    return {
        "n": len(radius_N),
        "accuracy": float(right_N.mean()),
        "certified_accuracy": [
            {
                "epsilon": e,
                "value": float((right_N & (radius_N > e)).mean()),
                "with_references": float((right_N & (proved.radius_at_epsilon.get(e, proved.radius_N) > e)).mean()),
            }
            for e in epsilons
        ],
        "median_radius": float(np.median(radius_N)),
        "radius_quantiles": _quantiles(radius_N),
        "abstentions": int((radius_N == 0).sum()),
        "counterfactuals": {
            "n": len(distance_N),
            "reached": float(reached_N.mean()),
            "nearer_than_radius": count_nearer_than_radius(measured),
            "nearer_than_radius_with_references": len(inside_largest_radius(measured)),
            "other_class_when_posted_back": int((measured.posted_back_N != answer_class_N).sum()),
            "median_distance": float(np.median(distance_N)),
            "median_radius_over_distance": float(np.median(radius_N / distance_N)),
            "mean_steps": float(steps_N.mean()),
        },
        "with_references": {
            "median_radius": float(np.median(proved.radius_N)),
            "radius_quantiles": _quantiles(proved.radius_N),
            "median_radius_over_distance": float(np.median(proved.radius_N / distance_N)),
            "mean_gradient_passes": float(proved.steps_N.mean()),
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
    tight_M = (known.radius_N > 0) & np.isfinite(known.distance_N)
    quotient_M, best_quotient_M = (
        radius_M[tight_M] / known.distance_N[tight_M] for radius_M in (known.radius_N, known.best_N)
    )
    return {
        "robust_accuracy": [
            {
                "epsilon": epsilon,
                "certified": float((known.right_N & (known.radius_N > epsilon)).mean()),
                "certified_with_references": float((known.right_N & (known.best_N > epsilon)).mean()),
                "under_attack": float((known.right_N & (known.distance_N > epsilon)).mean()),
                "n": len(attacked_M),
            }
            for epsilon in epsilons
        ],
        "tightness": {"n": len(quotient_M), **_tightness(quotient_M), "with_references": _tightness(best_quotient_M)},
    }


def counterfactuals_of_attacked(measured: Measured, attacked_M: np.ndarray) -> dict[str, Any]:
    """Return the counterfactual search on the attacked images as an entry like those of attacks.

    `flipped_at_any_distance` counts the images whose counterfactual has another class; distances and quotients are of
    these.

    Args:
        measured: answers about the whole test set.
        attacked_M: indices of the attacked images.
    """
    answers = [measured.counterfactuals[m] for m in attacked_M.tolist()]
    reached_M = np.array([answer.reached for answer in answers], np.bool_)
    distance_M = np.array([answer.distance for answer in answers])[reached_M]
    radius_M, best_M = measured.radius_N[attacked_M], measured.proved.radius_N[attacked_M]

    def over(radii_M: np.ndarray) -> dict[str, float | None]:
        quotient_M = radii_M[reached_M] / distance_M
        return {
            "median_radius": float(np.median(radii_M)) if len(radii_M) else None,
            "median_radius_over_distance": float(np.median(quotient_M)) if len(quotient_M) else None,
        }

    return {
        "name": "counterfactual search",
        "library": "lipcert",
        "n": len(attacked_M),
        "flipped_at_any_distance": int(reached_M.sum()),
        "median_distance": float(np.median(distance_M)) if len(distance_M) else None,
        **over(radius_M),
        "with_references": over(best_M),
    }


def attacked_images(measured: Measured, attacked_M: np.ndarray, nearest: AttackResult) -> figures.Attacked:
    """Return whether the attacked images are right, their radii and the distances of the nearest attack.

    Args:
        measured: answers about the whole test set.
        attacked_M: indices of the attacked images.
        nearest: union of all attacks.
    """
    return figures.Attacked(measured.right_N[attacked_M], nearest.radius_N, nearest.best_N, nearest.distance_N)


def count_nearer_than_radius(measured: Measured) -> int:
    """Return the number of counterfactuals whose distance is below the radius without reference images."""
    return int(_nearer_N(measured, measured.radius_N).sum())


def inside_largest_radius(measured: Measured) -> Int64[np.ndarray, " N"]:
    """Return the indices of the counterfactuals of another class inside the largest proved radius.

    Each of them refutes the proof. The search keeps a distance of the radius without reference images alone, so that an
    image that it returns for lack of another class may be inside the larger one.
    """
    class_N = np.array([prediction.class_id for prediction in measured.predictions])
    other_N = np.array([answer.class_id for answer in measured.counterfactuals]) != class_N
    return np.flatnonzero(other_N & _nearer_N(measured, measured.proved.largest_N))


def _nearer_N(measured: Measured, radius_N: np.ndarray) -> np.ndarray:
    """Return whether each counterfactual is nearer than a radius; exact: squares of 8-bit differences over 255^2."""
    nearer_N = np.zeros(len(radius_N), np.bool_)
    for n, (image_CHW, answer, radius) in enumerate(
        zip(measured.image_NCHW, measured.counterfactuals, radius_N.tolist(), strict=True)
    ):
        difference = np.rint(image_CHW * 255).astype(np.int64) - answer.pixels_CHW
        square = Fraction(int((difference * difference).sum()), 255 * 255)
        nearer_N[n] = square < Fraction(radius) ** 2 or answer.distance < radius
    return nearer_N


def _tightness(quotient_N: np.ndarray) -> dict[str, Any]:
    median = float(np.median(quotient_N)) if len(quotient_N) else None
    return {"median": median, "quantiles": _quantiles(quotient_N)}


def _quantiles(value_N: np.ndarray) -> dict[str, float]:
    return {f"{share:g}": float(np.quantile(value_N, share)) for share in QUANTILES} if len(value_N) else {}
