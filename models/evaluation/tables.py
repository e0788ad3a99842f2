"""Markdown tables of `models.evaluation.details`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_MATRIX = 20
"""Classes up to which the confusion matrix is printed; beyond, the most frequent confusions."""


def detail_lines(details: Mapping[str, Any], mistakes_picture: str | None) -> list[str]:
    """Return the lines of all tables.

    Args:
        details: of `details.details`.
        mistakes_picture: file of the picture of the mistakes; null where there is no mistake.
    """
    return [
        *_against_the_card(details["against_the_card"]),
        *_confusion(details["confusion"]),
        *_classes(details["classes"]),
        *_mistakes(details["mistakes"], mistakes_picture),
        *_reliability(details["reliability"]),
    ]


def confused_pairs(confusion: Mapping[str, Any], most: int = 15) -> list[tuple[str, str, int]]:
    """Return true class, predicted class and number of images of the most frequent confusions.

    Args:
        confusion: `labels` and `counts` of `details.details`.
        most: number of pairs.
    """
    labels, counts = confusion["labels"], confusion["counts"]
    pairs = [
        (labels[i], labels[j], count) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:most]


def percent(share: float | None) -> str:
    """Return a share with two digits, or a dash for an unknown one."""
    return "-" if share is None else f"{share:.2%}"


def difference_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return card, measured figure with interval, difference with interval, and verdict, as text."""
    is_share = row["quantity"] != "median radius"

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}" if is_share else f"{value:.4f}"

    def signed(value: float) -> str:
        return f"{100 * value:+.2f}" if is_share else f"{value:+.4f}"

    card = text(row["card"]) + (f" (n = {row['card_n']})" if row["card_n"] and row["card"] is not None else "")
    measured = f"{text(row['measured'])} ({text(row['low'])} to {text(row['high'])})"
    difference = "-" if row["difference"] is None else signed(row["difference"])
    if row["difference_low"] is not None:
        difference += f" ({signed(row['difference_low'])} to {signed(row['difference_high'])})"
    return card, measured, difference, row["verdict"]


def quantity_of(row: Mapping[str, Any]) -> str:
    """Return the name of a figure that is compared with the card."""
    return row["quantity"] if row["epsilon"] is None else f"{row['quantity']} at {row['epsilon']:g}"


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(cells[0])} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in cells[1:])]


def _against_the_card(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "",
        "## Against the card",
        "",
        f"Measured here: n = {rows[0]['n']}. Intervals of 95 %, each for itself: Clopper-Pearson of shares, order "
        "statistics of the median; differences of shares in points. All radii without reference images.",
        "",
        *table_lines(
            ["", "card", "measured", "measured less card", ""],
            [[quantity_of(row), *difference_cells(row)] for row in rows],
        ),
    ]


def _confusion(confusion: Mapping[str, Any]) -> list[str]:
    labels, counts = confusion["labels"], confusion["counts"]
    if len(labels) > LARGEST_MATRIX:
        return [
            "",
            "## Confusions",
            "",
            *table_lines(
                ["true", "predicted", "images"],
                [[true, predicted, str(count)] for true, predicted, count in confused_pairs(confusion)],
            ),
        ]
    return [
        "",
        "## Confusion matrix",
        "",
        "Rows: true class; columns: predicted class.",
        "",
        *table_lines(["", *labels], [[label, *map(str, row)] for label, row in zip(labels, counts, strict=True)]),
    ]


def class_cells(classes: Sequence[Mapping[str, Any]], certified: str, digits: int) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table of classes.

    Args:
        classes: of `details.details`.
        certified: word before the epsilon of a column.
        digits: of the median radius.
    """
    epsilons = [entry["epsilon"] for entry in classes[0]["certified_accuracy"]]
    rows = [
        [
            one["label"],
            str(one["n"]),
            percent(one["recall"]),
            percent(one["precision"]),
            *(percent(entry["value"]) for entry in one["certified_accuracy"]),
            "-" if one["median_radius"] is None else f"{one['median_radius']:.{digits}f}",
        ]
        for one in classes
    ]
    return ["class", "n", "recall", "precision", *(f"{certified} {e:g}" for e in epsilons), "median radius"], rows


def _classes(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["", "## Classes", "", *table_lines(*class_cells(classes, "certified at", 4))]


def _mistakes(mistakes: Mapping[str, Any], picture: str | None) -> list[str]:
    if picture is None:
        return ["", "## Mistakes", "", "No image is classified wrong."]
    return [
        "",
        "## Mistakes",
        "",
        f"{mistakes['n']} images are classified wrong; those with the largest radius first.",
        "",
        f"![mistakes]({picture})",
        "",
        *table_lines(
            ["image", "true", "predicted", "radius"],
            [
                [one.get("file", f"number {one['index']}"), one["true"], one["predicted"], f"{one['radius']:.4f}"]
                for one in mistakes["worst"]
            ],
        ),
    ]


def _reliability(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "",
        "## Reliability of radii",
        "",
        "Accuracy of images in groups of equal size, from the smallest radii to the largest.",
        "",
        *table_lines(
            ["radius", "n", "right", "accuracy"],
            [
                [
                    f"{group['from']:.4f} to {group['to']:.4f}",
                    str(group["n"]),
                    str(group["right"]),
                    f"{group['accuracy']:.2%} ({group['low']:.2%} to {group['high']:.2%})",
                ]
                for group in groups
            ],
        ),
    ]
