"""Figures of each class, mistakes, reliability and the difference from the card, computed by hand."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from models.evaluation.details import (
    Answers,
    against_the_card,
    confusion,
    details,
    median_interval,
    per_class,
    reliability,
    worst_mistakes,
)
from models.evaluation.tables import LARGEST_MATRIX, confused_pairs, detail_lines
from service.artefact.card import Card, CertifiedAccuracy, InputShape
from service.evidence.intervals import clopper_pearson

LABELS = ("cat", "dog", "emu")


def answers(label: list[int], predicted: list[int], radius: list[float]) -> Answers:
    return Answers(LABELS, np.array(label), np.array(predicted), np.array(radius))


SIX = answers([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0.5, 0.1, 0.3, 0.2, 0.4, 0.0])


def card(accuracy: float | None = 0.9, n: int = 1000, median: float | None = 0.25) -> Card:
    return Card(
        name="pets",
        labels=list(LABELS),
        input=InputShape(channels=1, height=4, width=4),
        accuracy=accuracy,
        certified_accuracy=[CertifiedAccuracy(epsilon=0.15, value=0.5, n=n)],
        evaluation=None if median is None else {"median_radius": median},
    )


def test_confusion_counts_true_classes_in_rows() -> None:
    assert confusion(SIX).tolist() == [[2, 1, 0], [2, 1, 0], [0, 0, 0]]


def test_figures_of_a_class_are_of_its_images_and_null_without_any() -> None:
    cat, dog, emu = per_class(SIX, [0.15])
    assert (cat["n"], cat["recall"], cat["precision"]) == (3, 2 / 3, 2 / 4)
    assert cat["certified_accuracy"] == [{"epsilon": 0.15, "value": 1 / 3}]
    assert (dog["recall"], dog["precision"], dog["median_radius"]) == (1 / 3, 1 / 2, 0.2)
    assert emu == {
        "label": "emu",
        "n": 0,
        "recall": None,
        "precision": None,
        "certified_accuracy": [{"epsilon": 0.15, "value": None}],
        "median_radius": None,
    }


def test_worst_mistake_is_the_one_with_the_largest_radius() -> None:
    assert worst_mistakes(SIX) == [4, 2, 5]
    assert worst_mistakes(SIX, 1) == [4]


def test_groups_of_reliability_hold_every_image_once_in_the_order_of_radii() -> None:
    random = np.random.default_rng(0)
    radius = random.random(103)
    many = Answers(LABELS, np.zeros(103, np.int64), (random.random(103) > radius).astype(np.int64), radius)
    groups = reliability(many)
    assert len(groups) == 5
    assert sum(group["n"] for group in groups) == 103
    assert sum(group["right"] for group in groups) == int(many.right_N.sum())
    assert [group["from"] for group in groups] == sorted(group["from"] for group in groups)
    assert all(group["low"] <= group["accuracy"] <= group["high"] for group in groups)
    assert len(reliability(SIX)) == 1


@pytest.mark.parametrize("n", [1, 5, 6, 7, 40, 2001])
def test_interval_of_the_median_covers_it_with_95_percent(n: int) -> None:
    low, high = median_interval(np.arange(1.0, n + 1))
    rank = int(low)
    assert high == n + 1 - rank
    tail = 2 * sum(comb(n, k) for k in range(rank)) / 2**n
    assert tail <= 0.05 or rank == 1
    assert tail + 2 * comb(n, rank) / 2**n > 0.05 or rank > n // 2


def test_difference_from_the_card_is_lower_higher_or_not_shown() -> None:
    def verdicts(right: int, n: int, radius: float, **changes: object) -> list[str]:
        measured = Answers(LABELS, np.zeros(n, np.int64), (np.arange(n) >= right).astype(np.int64), np.full(n, radius))
        return [row["verdict"] for row in against_the_card(measured, card(**changes), [0.15], same_images=False)]  # type: ignore[arg-type]

    assert verdicts(140, 200, 0.1) == ["lower", "lower", "lower"]
    assert verdicts(199, 200, 0.3) == ["higher", "higher", "higher"]
    assert verdicts(9, 10, 0.25)[0] == "no difference shown"
    assert verdicts(9, 10, 0.25)[2] == "no difference shown"
    assert verdicts(9, 10, 0.25, accuracy=None, median=None)[::2] == ["not in the card", "not in the card"]


def test_interval_of_a_difference_holds_the_intervals_of_both_shares() -> None:
    measured = Answers(LABELS, np.zeros(50, np.int64), (np.arange(50) >= 40).astype(np.int64), np.full(50, 0.3))
    row = against_the_card(measured, card(), [], same_images=False)[0]
    low, high = clopper_pearson(40, 50)
    card_low, card_high = clopper_pearson(900, 1000)
    assert row["difference"] == pytest.approx(-0.1)
    assert (row["low"], row["high"]) == (low, high)
    assert low - card_high < row["difference_low"] < low - 0.9
    assert high - 0.9 < row["difference_high"] < high - card_low


def test_same_images_differ_from_the_card_without_an_interval() -> None:
    rows = against_the_card(SIX, card(accuracy=0.5, n=6), [0.15], same_images=True)
    assert [row["verdict"] for row in rows] == ["as in the card", "differs from the card", "as in the card"]
    assert {row["difference_low"] for row in rows[:2]} == {None}


def test_tables_hold_every_figure_and_escape_labels() -> None:
    piped = Answers(("c|t", "dog", "emu"), SIX.label_N, SIX.class_N, SIX.radius_N)
    text = "\n".join(detail_lines(details(piped, card(), [0.15], same_images=False), "mistakes.png"))
    assert "| c\\|t | 2 | 1 | 0 |" in text
    assert "| emu | 0 | - | - | - | - |" in text
    assert "3 images are classified wrong" in text
    assert "![mistakes](mistakes.png)" in text
    assert "| number 4 | dog | c\\|t | 0.4000 |" in text
    assert "90.00% (n = 1000)" in text
    right = Answers(LABELS, SIX.label_N, SIX.label_N, SIX.radius_N)
    assert "No image is classified wrong" in "\n".join(detail_lines(details(right, card(), [], same_images=True), None))


def test_many_classes_are_listed_by_their_confusions() -> None:
    labels = tuple(f"class {k}" for k in range(LARGEST_MATRIX + 1))
    many = Answers(labels, np.array([0, 0, 1, 2]), np.array([3, 3, 2, 2]), np.ones(4))
    found = details(many, card(), [0.1], same_images=False)
    assert confused_pairs(found["confusion"]) == [("class 0", "class 3", 2), ("class 1", "class 2", 1)]
    text = "\n".join(detail_lines(found, "mistakes.png"))
    assert "| class 0 | class 3 | 2 |" in text
    assert "Confusion matrix" not in text
