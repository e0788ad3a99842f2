"""Sections of the page after a training or an evaluation, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from models.evaluation.details import Answers
from models.evaluation.drawings import Curve, chart, difference_picture, picture, size_picture
from models.evaluation.figures import Mistake, Panel
from models.evaluation.novelty import novelty_cells, novelty_text
from models.evaluation.tables import LARGEST_MATRIX, class_cells, confused_pairs, difference_cells, quantity_of
from models.training.history import EpochFigures
from models.training.scores import Scores
from service.evidence.document import image, table

UNIT = "L2, pixels in [0, 1]"
STYLE = """
@media (prefers-color-scheme: dark) { :root { --line: #39444e; --soft: #222b33; --ink: #e3e8ec; --dim: #9aa7b3;
  --mark: #4db3d6; --paper: #14191e } }
h3 { font-size: .95rem; margin: .6rem 0 .3rem } .scroll { overflow-x: auto }
.scroll td:first-child { white-space: nowrap }
pre { background: var(--soft); padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .86em;
  line-height: 1.5 }
.warnings li { margin: .4rem 0 } .warnings { border-left: 4px solid var(--c1); padding: .2rem 0 .2rem 1.6rem }
.matrix { width: auto } .matrix td { text-align: right; font-variant-numeric: tabular-nums; min-width: 3.2rem }
.matrix th { white-space: nowrap } .matrix tbody th { text-align: right } .matrix td.right { font-weight: 650 }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem }
.gallery figcaption { font-size: .85em; font-weight: 400; line-height: 1.4 }
.gallery figcaption b { display: block }
img { image-rendering: pixelated; width: 100%; aspect-ratio: var(--ratio, 1); border: 1px solid var(--line);
  display: block; margin-bottom: .4rem }
.rows { display: grid; gap: .8rem } .row { display: grid; grid-template-columns: repeat(4, minmax(0, 8.5rem)) 1fr;
  gap: .6rem; align-items: start; border-bottom: 1px solid var(--line); padding-bottom: .6rem }
.row p { margin: 0; font-size: .88em; line-height: 1.5 } .row div p { font-size: .78em; color: var(--dim) }
@media (max-width: 40rem) { body { padding: 1.2rem .9rem 3rem }
  .row { grid-template-columns: repeat(4, minmax(0, 1fr)) }
  .row > p { grid-column: 1 / -1 } .gallery { grid-template-columns: repeat(auto-fill, minmax(6.6rem, 1fr)) }
  h1 { font-size: 1.35rem; overflow-wrap: anywhere } tbody th { white-space: normal }
  th, td { padding: .3rem .35rem } td.n, th.n { font-size: .8em }
  .claims { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)) } }
"""


def curves_of_training(history: Sequence[EpochFigures]) -> str:
    """Return the charts of loss, and of accuracy and certified accuracy of training and held-out images."""
    charts = [
        chart("Loss of the training images", [Curve("loss", [(f.epoch, f.loss) for f in history])], "epoch", whole=True)
    ]
    for title, scores in (
        ("Training images, during each epoch", [(f.epoch, f.training) for f in history]),
        ("Held-out images, after each epoch", [(f.epoch, f.validation) for f in history]),
    ):
        known = [(epoch, one) for epoch, one in scores if one is not None]
        if known:
            charts.append(chart(title, _score_curves(known), "epoch", shares=True, whole=True))
    return f'<div class="charts">{"".join(charts)}</div>'


def _score_curves(known: Sequence[tuple[int, Scores]]) -> list[Curve]:
    curves = [Curve("accuracy", [(epoch, one.accuracy) for epoch, one in known])]
    return curves + [
        Curve(f"certified at {epsilon:g}", [(epoch, one.certified[epsilon]) for epoch, one in known])
        for epsilon in known[-1][1].certified
    ]


def curve_over_radius(answers: Answers, epsilons: Sequence[float]) -> str:
    """Return the chart of certified accuracy against the radius.

    Args:
        answers: of all measured images.
        epsilons: L2 radii that the chart includes at least.
    """
    farthest = max([float(np.quantile(answers.radius_N, 0.995)), *epsilons, 1e-3])
    grid = np.linspace(0.0, farthest, 161)
    n = len(answers.radius_N)
    points = [(float(epsilon), answers.certified(float(epsilon)) / n) for epsilon in grid]
    return (
        '<div class="charts">'
        + chart(
            f"Right and proved, of {n} images",
            [Curve("certified accuracy", points)],
            f"radius ({UNIT})",
            shares=True,
        )
        + _accuracy_by_radius(answers)
        + "</div>"
    )


def _accuracy_by_radius(answers: Answers) -> str:
    order_N = np.argsort(-answers.radius_N, kind="stable")
    right_N = np.cumsum(answers.right_N[order_N])
    n = len(order_N)
    shown = np.unique(np.linspace(max(1, n // 50), n, 80).astype(int))
    points = [(m / n, float(right_N[m - 1] / m)) for m in shown.tolist()]
    return chart(
        "Accuracy of answers with the largest radii",
        [Curve("accuracy", points)],
        "share of the images that are answered",
        shares=True,
    )


def confusion_matrix(confusion: Mapping[str, Any]) -> str:
    """Return the confusion matrix with cells as dark as their share of the row, or the most frequent confusions."""
    labels, counts = confusion["labels"], confusion["counts"]
    if len(labels) > LARGEST_MATRIX:
        rows = [(true, predicted, str(count)) for true, predicted, count in confused_pairs(confusion)]
        return f'<div class="scroll">{table(["true", "predicted", "images"], rows, (2,), narrow=True)}</div>'
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    body = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(_cell(row, i, j) for j in range(len(row)))}</tr>"
        for i, (label, row) in enumerate(zip(labels, counts, strict=True))
    )
    return (
        '<p class="dim">Rows: true class; columns: predicted class.</p><div class="scroll"><table class="matrix">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(row: Sequence[int], i: int, j: int) -> str:
    share = row[j] / max(sum(row), 1)
    colour = "0, 114, 178" if i == j else "213, 94, 0"
    kind = ' class="right"' if i == j else ""
    return f'<td{kind} style="background: rgba({colour}, {0.6 * share:.3f})">{row[j] or "·"}</td>'


def class_table(classes: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the figures of each class."""
    head, rows = class_cells(classes, "certified", 3)
    return f'<div class="scroll">{table(head, rows, range(1, len(head)), narrow=True)}</div>'


def novelty_section(figures: Mapping[str, Any]) -> str:
    """Return the figures of a novelty model against each set of novel images."""
    head, rows = novelty_cells(figures)
    cells = table(head, rows, range(1, len(head)), narrow=True)
    return f'<p>{escape(novelty_text(figures))}</p><div class="scroll">{cells}</div>'


def reliability_table(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of accuracy in groups of similar radii."""
    rows = [
        [
            f"{group['from']:.3f} to {group['to']:.3f}",
            f"{group['right']} of {group['n']}",
            f"{group['accuracy']:.1%}",
            f"{group['low']:.1%} to {group['high']:.1%}",
        ]
        for group in groups
    ]
    head = ["radius", "right", "accuracy", "95 % interval"]
    return f'<div class="scroll">{table(head, rows, (1, 2, 3), narrow=True)}</div>'


def card_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of measured figures beside those of the card."""
    head = ["", "card", "measured", "measured less card", ""]
    return f'<div class="scroll">{table(head, [[quantity_of(row), *difference_cells(row)] for row in rows])}</div>'


def mistake_gallery(mistakes: Sequence[tuple[Mistake, str]]) -> str:
    """Return the pictures of wrong answers, each with the name of its file where it is known."""
    return f'<div class="gallery">{"".join(_mistake(*mistake) for mistake in mistakes)}</div>'


def _mistake(mistake: Mistake, file: str) -> str:
    name = f'<span class="dim">{escape(file)}</span>' if file else ""
    return (
        f"<figure>{_sized(picture(mistake.image_CHW), f'{mistake.true_label}, classified {mistake.label}')}<figcaption>"
        f"<b>{escape(mistake.label)}</b>true: {escape(mistake.true_label)}<br>radius {mistake.radius:.3f}<br>{name}"
        "</figcaption></figure>"
    )


def example_rows(panels: Iterable[Panel]) -> str:
    """Return a row for each example: image, counterfactual, difference, size of the gradient of the margin."""
    return f'<div class="rows">{"".join(_row(panel) for panel in panels)}</div>'


def _row(panel: Panel) -> str:
    difference, largest = difference_picture(panel.other_CHW - panel.image_CHW)
    shown = (
        (picture(panel.image_CHW), "image"),
        (picture(panel.other_CHW), "counter­factual"),
        (difference, f"difference, ±{largest:.2g}"),
        (size_picture(panel.gradient_CHW), "gradient"),
    )
    nearest = "" if panel.runner_up == panel.other_label else f"<br>Next class by margin: {escape(panel.runner_up)}."
    pictures = "".join(f"<div>{_sized(pixels, text)}<p>{text}</p></div>" for pixels, text in shown)
    return (
        f'<div class="row">{pictures}<p><b>{escape(panel.label)}</b>, radius {panel.radius:.3f}: proved that no nearer '
        f"image has another class.<br><b>{escape(panel.other_label)}</b> at distance {panel.distance:.3f}, the nearest "
        f"image that was found.{nearest}</p></div>"
    )


def _sized(pixels: np.ndarray, text: str) -> str:
    _, height, width = pixels.shape
    return f'<div style="--ratio: {width} / {height}">{image(pixels, text)}</div>'
