"""Figures of an evaluation class by class: confusion, mistakes, reliability of radii, and the difference from the card.

Radii are those without reference images (`proof=fast`): L2, pixels in [0, 1]. Intervals are of 95 %, each for itself.

Axes: N images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from service.artefact.card import Card
from service.evidence.intervals import clopper_pearson

MISTAKES = 12
"""Mistakes that a report shows."""
GROUPS = 10
"""Groups of images by their radius, at most."""
FEWEST_IN_A_GROUP = 20


@dataclass(frozen=True)
class Answers:
    """Answers of the served model about labelled images."""

    labels: tuple[str, ...]
    """Of the K classes."""
    label_N: Int64[np.ndarray, " N"]
    """True classes."""
    class_N: Int64[np.ndarray, " N"]
    """Predicted classes."""
    radius_N: Float64[np.ndarray, " N"]
    """Certified radii of the predictions."""

    @property
    def right_N(self) -> np.ndarray:
        """Whether each predicted class is the true one."""
        return self.class_N == self.label_N

    def certified(self, epsilon: float) -> int:
        """Return the number of images that are right with a radius above epsilon."""
        return int((self.right_N & (self.radius_N > epsilon)).sum())


def details(answers: Answers, card: Card, epsilons: Sequence[float], *, same_images: bool) -> dict[str, Any]:
    """Return all figures of this module as JSON values.

    Args:
        answers: of all measured images, at least one.
        card: of the artefact, before this evaluation changes it.
        epsilons: L2 radii, pixels in [0, 1].
        same_images: whether the figures of the card are about these images.
    """
    return {
        "confusion": {"labels": list(answers.labels), "counts": confusion(answers).tolist()},
        "classes": per_class(answers, epsilons),
        "mistakes": {
            "n": int((~answers.right_N).sum()),
            "worst": [
                {
                    "index": n,
                    "true": answers.labels[answers.label_N[n]],
                    "predicted": answers.labels[answers.class_N[n]],
                    "radius": float(answers.radius_N[n]),
                }
                for n in worst_mistakes(answers)
            ],
        },
        "reliability": reliability(answers),
        "against_the_card": against_the_card(answers, card, epsilons, same_images=same_images),
    }


def confusion(answers: Answers) -> Int64[np.ndarray, "K K"]:
    """Return the number of images of each true class (row) and predicted class (column)."""
    counts_KK = np.zeros((len(answers.labels),) * 2, np.int64)
    np.add.at(counts_KK, (answers.label_N, answers.class_N), 1)
    return counts_KK


def per_class(answers: Answers, epsilons: Sequence[float]) -> list[dict[str, Any]]:
    """Return the figures of each class; null where there is no image to compute them from.

    `recall`, `certified_accuracy` and `median_radius` are of the images of the class, `precision` of the images that
    are predicted to be of it.

    Args:
        answers: of all measured images.
        epsilons: L2 radii.
    """
    found: list[dict[str, Any]] = []
    for k, label in enumerate(answers.labels):
        member_N, right_N = answers.label_N == k, (answers.label_N == k) & answers.right_N
        n, predicted = int(member_N.sum()), int((answers.class_N == k).sum())
        found.append(
            {
                "label": label,
                "n": n,
                "recall": _share(int(right_N.sum()), n),
                "precision": _share(int(right_N.sum()), predicted),
                "certified_accuracy": [
                    {"epsilon": epsilon, "value": _share(int((right_N & (answers.radius_N > epsilon)).sum()), n)}
                    for epsilon in epsilons
                ],
                "median_radius": float(np.median(answers.radius_N[member_N])) if n else None,
            }
        )
    return found


def worst_mistakes(answers: Answers, most: int = MISTAKES) -> list[int]:
    """Return the indices of wrong answers, those with the largest radius first."""
    wrong_M = np.flatnonzero(~answers.right_N)
    return wrong_M[np.argsort(-answers.radius_N[wrong_M], kind="stable")][:most].tolist()


def reliability(answers: Answers) -> list[dict[str, Any]]:
    """Return the accuracy of images in groups of equal size, from the smallest radii to the largest."""
    n = len(answers.label_N)
    order_N = np.argsort(answers.radius_N, kind="stable")
    groups = max(1, min(GROUPS, n // FEWEST_IN_A_GROUP))
    found: list[dict[str, Any]] = []
    for members in np.array_split(order_N, groups):
        right = int(answers.right_N[members].sum())
        low, high = clopper_pearson(right, len(members))
        found.append(
            {
                "from": float(answers.radius_N[members[0]]),
                "to": float(answers.radius_N[members[-1]]),
                "n": len(members),
                "right": right,
                "accuracy": right / len(members),
                "low": low,
                "high": high,
            }
        )
    return found


def against_the_card(
    answers: Answers, card: Card, epsilons: Sequence[float], *, same_images: bool
) -> list[dict[str, Any]]:
    """Return accuracy, certified accuracy and median radius beside those of the card, with intervals.

    `low` and `high` are the interval of the measured figure: Clopper and Pearson for shares, order statistics for the
    median. `difference` is measured less card; the interval of a difference of shares combines those of both (MOVER:
    Newcombe, Statistics in Medicine 17, 1998, with Clopper-Pearson limits). `verdict` is `lower` or `higher` where that
    interval excludes 0; for the median, where the interval of the measured median excludes that of the card, whose
    own interval the card does not state.

    Args:
        answers: of all measured images.
        card: of the artefact.
        epsilons: L2 radii.
        same_images: whether the figures of the card are about these images; then there is no sampling error.
    """
    n = len(answers.label_N)
    certified = {entry.epsilon: entry for entry in card.certified_accuracy}
    card_n = next((entry.n for entry in card.certified_accuracy), card.data.get("n_test"))
    rows: list[dict[str, Any]] = []
    shares: list[tuple[str, float | None, int, float | None, int | None]] = [
        ("accuracy", None, int(answers.right_N.sum()), card.accuracy, card_n)
    ]
    for epsilon in epsilons:
        entry = certified.get(epsilon)
        value, others = (None, None) if entry is None else (entry.value, entry.n)
        shares.append(("certified accuracy", epsilon, answers.certified(epsilon), value, others))
    for quantity, epsilon, count, value, others in shares:
        low, high = clopper_pearson(count, n)
        row = {"quantity": quantity, "epsilon": epsilon, "card": value, "card_n": others}
        row |= {"measured": count / n, "n": n, "low": low, "high": high}
        rows.append(row | _compared(count, n, value, others, same_images=same_images))
    low, high = median_interval(answers.radius_N)
    median, stated = float(np.median(answers.radius_N)), (card.evaluation or {}).get("median_radius")
    rows.append(
        {
            "quantity": "median radius",
            "epsilon": None,
            "card": stated,
            "card_n": None if stated is None else card_n,
            "measured": median,
            "n": n,
            "low": low,
            "high": high,
            "difference": None if stated is None else median - stated,
            "difference_low": None if stated is None else low - stated,
            "difference_high": None if stated is None else high - stated,
            "verdict": _verdict(median, stated, low, high, same_images=same_images),
        }
    )
    return rows


def median_interval(value_N: Float64[np.ndarray, " N"]) -> tuple[float, float]:
    """Return a 95 % interval of the median of a population, from order statistics of a sample.

    Rank r from both ends, where P(X < r) <= 2.5 % for X binomial with n and 1/2; the whole range where n < 6.
    """
    n, ordered = len(value_N), np.sort(value_N)
    rank, tail = 0, 0.0
    while rank < n:
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1) - n * math.log(2))
        if tail > 0.025:
            break
        rank += 1
    rank = max(rank, 1)
    return float(ordered[rank - 1]), float(ordered[n - rank])


def _compared(count: int, n: int, value: float | None, others: int | None, *, same_images: bool) -> dict[str, Any]:
    if value is None or not others:
        return {"difference": None, "difference_low": None, "difference_high": None, "verdict": "not in the card"}
    measured = count / n
    difference = measured - value
    if same_images:
        verdict = "as in the card" if count == round(value * others) and n == others else "differs from the card"
        return {"difference": difference, "difference_low": None, "difference_high": None, "verdict": verdict}
    low, high = clopper_pearson(count, n)
    card_low, card_high = clopper_pearson(round(value * others), others)
    least = difference - math.hypot(measured - low, card_high - value)
    most = difference + math.hypot(high - measured, value - card_low)
    verdict = "lower" if most < 0 else "higher" if least > 0 else "no difference shown"
    return {"difference": difference, "difference_low": least, "difference_high": most, "verdict": verdict}


def _verdict(median: float, stated: float | None, low: float, high: float, *, same_images: bool) -> str:
    if stated is None:
        return "not in the card"
    if same_images:
        return "as in the card" if math.isclose(median, stated, rel_tol=1e-9) else "differs from the card"
    return "lower" if high < stated else "higher" if low > stated else "no difference shown"


def _share(count: int, n: int) -> float | None:
    return count / n if n else None
