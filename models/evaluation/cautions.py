"""Warnings of the page: reasons to doubt a figure, each with a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.evaluation.details import Answers
from models.training.history import EpochFigures
from service.artefact.card import Card

FEW_IMAGES = 100
"""Images below which a figure is said to be uncertain."""
FEW_OF_A_CLASS = 20
GAP = 0.1
"""Difference of shares that is worth a sentence."""


def cautions(card: Card, answers: Answers, figures: Mapping[str, Any], history: Sequence[EpochFigures]) -> list[str]:
    """Return sentences, the most important first.

    Args:
        card: of the artefact.
        answers: about the measured images, at least one.
        figures: of `details.details` about these answers.
        history: of the training; may be empty.
    """
    n, accuracy = len(answers.label_N), float(answers.right_N.mean())
    return [
        *_against_the_card(figures["against_the_card"]),
        *_guessing(answers, accuracy),
        *_overfit(history, accuracy),
        *_images(card),
        *(
            [f"{n} images are few: the accuracy is known to some points only, see its interval. Measure more images."]
            if n < FEW_IMAGES
            else []
        ),
        *_classes(figures["classes"], accuracy),
        *_mistakes(answers),
        *_nothing_proved(answers, [entry["epsilon"] for entry in figures["classes"][0]["certified_accuracy"]]),
        *_rising(history),
    ]


def _against_the_card(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lower = [row for row in rows if row["verdict"] == "lower"]
    if not lower:
        return []
    names = ", ".join(
        row["quantity"] if row["epsilon"] is None else f"{row['quantity']} at {row['epsilon']:g}" for row in lower
    )
    return [
        f"Lower than in the card, beyond chance: {names}. These images differ from those of the training; train on "
        "such images, too."
    ]


def _guessing(answers: Answers, accuracy: float) -> list[str]:
    counts_K = np.bincount(answers.label_N, minlength=len(answers.labels))
    largest = int(counts_K.argmax())
    share = float(counts_K[largest] / counts_K.sum())
    # Of one class alone every accuracy is below its share.
    if (counts_K > 0).sum() < 2 or accuracy > share + 0.02:
        return []
    return [
        f"The accuracy of {accuracy:.1%} is hardly above the {share:.1%} of an answer that is always "
        f"{answers.labels[largest]}: the network has learned little. Train longer, or check the labels."
    ]


def _overfit(history: Sequence[EpochFigures], accuracy: float) -> list[str]:
    if not history or history[-1].training is None or history[-1].training.accuracy - accuracy < GAP:
        return []
    return [
        f"The network is right on {history[-1].training.accuracy:.1%} of its training images and {accuracy:.1%} of "
        "these: it has learned images by heart. Use more images, augmentation, or fewer epochs."
    ]


def _images(card: Card) -> list[str]:
    found: list[str] = []
    shared, left_out = card.data.get("n_in_train_and_test"), card.data.get("n_left_out")
    if shared:
        found.append(f"{shared} test images are training images, too: the figures of the card are too good.")
    if left_out:
        found.append(f"{left_out} files were left out of the training, since the service would refuse them.")
    counts: Mapping[str, int] = (card.data.get("counts") or {}).get("train") or {}
    if counts and min(counts.values()) * 5 < max(counts.values()):
        rare = min(counts, key=lambda label: counts[label])
        found.append(
            f"The classes are unbalanced: {rare} has {counts[rare]} training images, the largest class "
            f"{max(counts.values())}. Look at the recall of each class, not at the accuracy."
        )
    return found


def _classes(classes: Sequence[Mapping[str, Any]], accuracy: float) -> list[str]:
    found = [f"No image of {one['label']} was measured: nothing is known about it." for one in classes if not one["n"]]
    few = [one["label"] for one in classes if 0 < one["n"] < FEW_OF_A_CLASS]
    if few:
        found.append(f"Fewer than {FEW_OF_A_CLASS} images of {', '.join(few)}: the recall there is hardly known.")
    weak = [one for one in classes if one["n"] >= FEW_OF_A_CLASS and one["recall"] < accuracy - GAP]
    if weak:
        names = ", ".join(f"{one['label']} ({one['recall']:.1%})" for one in weak)
        found.append(f"The recall of {names} is more than ten points below the accuracy: collect more such images.")
    return found


def _mistakes(answers: Answers) -> list[str]:
    wrong_M = answers.radius_N[~answers.right_N]
    beyond = int((wrong_M > np.median(answers.radius_N)).sum())
    if not beyond:
        return []
    return [
        f"{beyond} of {len(wrong_M)} mistakes have a radius above the median: a large radius does not mean a right "
        "answer. Check the labels of the worst mistakes."
    ]


def _nothing_proved(answers: Answers, epsilons: Sequence[float]) -> list[str]:
    empty = [epsilon for epsilon in epsilons if not answers.certified(epsilon)]
    if not empty:
        return []
    return [
        f"No right answer is proved within {', '.join(f'{epsilon:g}' for epsilon in empty)} (L2). For larger radii "
        "train with a larger margin (--set loss.min_margin=...), which costs accuracy."
    ]


def _rising(history: Sequence[EpochFigures]) -> list[str]:
    """Return a warning where the loss fell by more than a tenth in the last tenth of at least ten epochs."""
    if len(history) < 10:
        return []
    before, last = history[-1 - len(history) // 10].loss, history[-1].loss
    if before <= 0 or last >= 0.9 * before:
        return []
    return ["The loss was still falling in the last epochs: a longer training will improve the figures."]
