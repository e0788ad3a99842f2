"""The figures of a report: each function draws plain arrays into one PNG file.

Distances and radii are L2, pixels in [0, 1]. Two radii of an image are drawn: the one that is proved at the image as
sent, and the largest that was found with reference images. Lines differ in colour (palette of Okabe and Ito, which
colour-blind readers can distinguish) and in dashes.

Axes: N images, E epsilons, C channels, H height, W width; G images of a gallery.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Bool, Float64

matplotlib.use("Agg")
from matplotlib import pyplot

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
SIGNED = "RdBu_r"
UNIT = "L2, pixels in [0, 1]"
DPI = 120


FAST, BEST = "certified, fast", "certified, with reference images"


@dataclass(frozen=True)
class Proved:
    """Both radii of each image."""

    right_N: Bool[np.ndarray, " N"]
    """Whether the predicted class is right."""
    radius_N: Float64[np.ndarray, " N"]
    """Without reference images."""
    best_N: Float64[np.ndarray, " N"]
    """The largest with reference images."""


@dataclass(frozen=True)
class Attacked(Proved):
    """Both radii and the nearest adversarial image of each attacked image."""

    distance_N: Float64[np.ndarray, " N"]
    """To the nearest image of another class of all attacks; infinite where every attack failed."""


@dataclass(frozen=True)
class EarlierAttacks(Proved):
    """Both radii of the images that an earlier evaluation attacked, and their robust accuracy."""

    epsilon_E: Float64[np.ndarray, " E"]
    share_E: Float64[np.ndarray, " E"]
    """Of images that are right and were not flipped within epsilon."""


@dataclass(frozen=True)
class Panel:
    """One column of a gallery."""

    image_CHW: Float64[np.ndarray, "C H W"]
    label: str
    radius: float
    """Without reference images."""
    best: float
    """The largest with reference images."""
    other_CHW: Float64[np.ndarray, "C H W"]
    other_label: str
    distance: float
    gradient_CHW: Float64[np.ndarray, "C H W"]
    """Of the margin between the predicted class and `runner_up`."""
    runner_up: str


@dataclass(frozen=True)
class Mistake:
    """A wrong answer."""

    image_CHW: Float64[np.ndarray, "C H W"]
    true_label: str
    label: str
    """Of the predicted class."""
    radius: float


def plot_certified_accuracy(
    proved: Proved,
    attacked: Attacked | EarlierAttacks | None,
    epsilons: Sequence[float],
    path: Path,
) -> None:
    """Draw the share of images that are right and certified, and of those that are right and not flipped, over epsilon.

    The band between the curves covers images that are neither proved, with reference images, nor flipped. The curves
    refer to the attacked images; where they are a part of the test set, the certified shares of the whole set are drawn
    too.

    Args:
        proved: both radii of the test set.
        attacked: the attacked images, or shares of an earlier evaluation; null: only the certified shares are drawn.
        epsilons: radii to be marked.
        path: of the PNG file.
    """
    farthest = float(np.quantile(proved.best_N, 0.99))
    if isinstance(attacked, Attacked) and np.isfinite(attacked.distance_N).any():
        farthest = max(farthest, float(np.quantile(attacked.distance_N[np.isfinite(attacked.distance_N)], 0.99)))
    farthest = max(farthest, *epsilons, 1e-3)
    grid = np.linspace(0.0, farthest, 400)
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    if isinstance(attacked, Attacked):
        certified = share_beyond(attacked.right_N, attacked.best_N, grid)
        unflipped = share_beyond(attacked.right_N, attacked.distance_N, grid)
        label = f"robust under all attacks, n = {len(attacked.radius_N):,}"
        axes.fill_between(
            grid, certified, unflipped, color=GREY, alpha=0.22, linewidth=0, label="neither proved nor flipped"
        )
        axes.plot(grid, unflipped, color=ORANGE, linestyle="--", label=label)
    elif attacked is not None:
        label = f"robust under all attacks, n = {len(attacked.radius_N):,}"
        axes.plot(attacked.epsilon_E, 100 * attacked.share_E, "x", color=ORANGE, markersize=4, label=label)
    _certified_curves(axes, attacked or proved, grid, thin=False)
    if attacked is not None and len(proved.radius_N) != len(attacked.radius_N):
        _certified_curves(axes, proved, grid, thin=True)
    for epsilon in epsilons:
        axes.axvline(epsilon, color=GREY, linewidth=0.6, alpha=0.6)
        axes.annotate(f"{epsilon:.3g}", (epsilon, 1), xytext=(2, 1), textcoords="offset points", fontsize=7, color=GREY)
    axes.set(xlabel=f"epsilon ({UNIT})", ylabel="share of test images, %", ylim=(0, 101), xlim=(0, farthest))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    _save(figure, path)


def _certified_curves(axes: Any, proved: Proved, grid: np.ndarray, *, thin: bool) -> None:
    count = f"{'all ' if thin else ''}n = {len(proved.radius_N):,}"
    for name, radius_N, colour, dashes in ((BEST, proved.best_N, GREEN, "-."), (FAST, proved.radius_N, BLUE, "-")):
        axes.plot(
            grid,
            share_beyond(proved.right_N, radius_N, grid),
            color=colour,
            linestyle=":" if thin else dashes,
            linewidth=1.2 if thin else 1.5,
            # Above the fast one, which is seen through the dashes where both are equal.
            zorder=3 if radius_N is proved.best_N else 2,
            label=f"{name}, {count}",
        )


def plot_radii(proved: Proved, path: Path) -> None:
    """Draw the histogram of the radii without reference images, right and wrong answers apart, and that of the best."""
    right_N, radius_N = proved.right_N, proved.radius_N
    bins = np.linspace(0.0, max(float(proved.best_N.max()), 1e-3), 41)
    figure, axes = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    wrong = f"wrong answers, n = {int((~right_N).sum()):,}"
    axes.hist(
        [radius_N[right_N], radius_N[~right_N]],
        bins=bins.tolist(),
        stacked=True,
        color=[BLUE, ORANGE],
        label=[f"right answers, n = {int(right_N.sum()):,}", wrong],
    )
    for patch in axes.containers[1]:  # type: ignore[union-attr]
        patch.set_hatch("////")
    axes.hist(
        proved.best_N,
        bins=bins.tolist(),
        histtype="step",
        color=GREEN,
        linewidth=1.5,
        label="all answers, with reference images",
    )
    for radii_N, colour, name in (
        (radius_N, "black", "median"),
        (proved.best_N, GREEN, "median with reference images"),
    ):
        median = float(np.median(radii_N))
        axes.axvline(median, color=colour, linestyle="--", linewidth=1, label=f"{name} {median:.3g}")
    axes.set(xlabel=f"certified radius ({UNIT})", ylabel="test images", xlim=(0, bins[-1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_tightness(attacked: Attacked, path: Path) -> None:
    """Draw both radii over the distance of the nearest attack, one point for each image, and the quotients."""
    found_N = np.isfinite(attacked.distance_N)
    distance_N = attacked.distance_N[found_N]
    kinds = ((FAST, attacked.radius_N[found_N], BLUE, "o"), (BEST, attacked.best_N[found_N], GREEN, "^"))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    farthest = 1.05 * max(float(distance_N.max(initial=0.0)), 1e-3)
    left.fill_between([0, farthest], [0, farthest], [farthest, farthest], color=ORANGE, alpha=0.15, linewidth=0)
    left.annotate("refuted: no point may be here", (0.03 * farthest, 0.93 * farthest), fontsize=8, color=ORANGE)
    left.plot([0, farthest], [0, farthest], color=ORANGE, linestyle="--", linewidth=1)
    for name, radius_N, colour, marker in kinds:
        left.scatter(distance_N, radius_N, s=8, color=colour, marker=marker, alpha=0.5, linewidths=0, label=name)
        quotient_N = radius_N / np.maximum(distance_N, 1e-300)
        median = f", median {np.median(quotient_N):.3f}" if len(quotient_N) else ""
        right.hist(
            quotient_N,
            bins=np.linspace(0, 1, 51).tolist(),
            histtype="stepfilled",
            facecolor=(colour, 0.3),
            edgecolor=colour,
            label=f"{name}{median}",
        )
    left.legend(fontsize=8, loc="lower right")
    right.legend(fontsize=8, loc="upper left")
    left.set(
        xlabel=f"nearest attack ({UNIT})",
        ylabel=f"certified radius ({UNIT})",
        xlim=(0, farthest),
        ylim=(0, farthest),
        aspect="equal",
    )
    right.set(
        xlabel="radius / distance of the nearest attack", ylabel=f"images (of n = {len(distance_N):,})", xlim=(0, 1)
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_counterfactuals(panels: Sequence[Panel], path: Path) -> None:
    """Draw image, signed difference and counterfactual; an RGB difference is drawn around mid-grey."""
    difference = [panel.other_CHW - panel.image_CHW for panel in panels]
    largest = max([float(np.abs(part).max()) for part in difference] + [1 / 255])
    figure, axes = _gallery(3, len(panels))
    shown: Any = None
    for column, (panel, part) in enumerate(zip(panels, difference, strict=True)):
        top, middle, bottom = axes[:, column]
        _show(top, panel.image_CHW)
        if len(part) == 1:
            shown = middle.imshow(part[0], cmap=SIGNED, vmin=-largest, vmax=largest)
        else:
            _show(middle, 0.5 + part / (2 * largest))
        _show(bottom, panel.other_CHW)
        top.set_title(f"{panel.label}\nradius {panel.radius:.2f} ({panel.best:.2f})", fontsize=8)
        bottom.set_title(f"{panel.other_label}\ndistance {panel.distance:.2f}", fontsize=8)
    if shown is not None:
        bar = figure.colorbar(shown, ax=list(axes[1]), fraction=0.05, aspect=12, pad=0.01)
        bar.set_label("change of a pixel\n([0, 1])", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        note = ""
    else:
        note = f"\nDifference: mid-grey is zero, black and white are {largest:.2g} of a channel in [0, 1]"
    title = "Image, difference, counterfactual. Radius (with reference images) and distance"
    figure.suptitle(f"{title}: {UNIT}{note}", fontsize=9)
    _save(figure, path)


def plot_saliency(panels: Sequence[Panel], path: Path) -> None:
    """Draw each image and the gradient of its margin: signed for grey, its norm over the channels for RGB."""
    figure, axes = _gallery(2, len(panels))
    shown: Any = None
    for column, panel in enumerate(panels):
        top, bottom = axes[:, column]
        _show(top, panel.image_CHW)
        grey = len(panel.gradient_CHW) == 1
        map_HW = panel.gradient_CHW[0] if grey else np.sqrt(np.square(panel.gradient_CHW).sum(axis=0))
        map_HW = map_HW / max(float(np.abs(map_HW).max()), 1e-300)
        shown = bottom.imshow(map_HW, cmap=SIGNED if grey else "cividis", vmin=-1 if grey else 0, vmax=1)
        top.set_title(panel.label, fontsize=8)
        bottom.set_title(f"{panel.label} - {panel.runner_up}", fontsize=8)
    if shown is not None:
        bar = figure.colorbar(shown, ax=list(axes[1]), fraction=0.05, aspect=12, pad=0.01)
        bar.set_label("share of\nthe largest", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle("Image, and the gradient of its margin (logit of the class less that of the runner-up)", fontsize=9)
    _save(figure, path)


def plot_mistakes(mistakes: Sequence[Mistake], path: Path) -> None:
    """Draw wrong answers, six in a row, each with its true class, its predicted class and its radius."""
    columns = min(6, len(mistakes))
    figure, axes = _gallery(-(-len(mistakes) // columns), columns)
    for panel, mistake in zip(axes.ravel(), mistakes, strict=False):
        _show(panel, mistake.image_CHW)
        panel.set_title(
            f"{mistake.true_label}\nas {mistake.label}\nradius {mistake.radius:.3f}", fontsize=8, color=ORANGE
        )
    figure.suptitle(f"Wrong answers, the largest radius first ({UNIT})", fontsize=9)
    _save(figure, path)


def share_beyond(right_N: np.ndarray, beyond_N: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the percentage of images that are right with `beyond > epsilon`, for each epsilon of the grid.

    Args:
        right_N: whether the predicted class is right.
        beyond_N: radii or distances, L2.
        grid: of epsilons, L2.
    """
    return 100 * (right_N & (beyond_N > grid[:, None])).mean(axis=1)


def _gallery(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1.3 * columns + 1.2, 1.55 * rows + 0.5), layout="constrained", squeeze=False
    )
    for panel in axes.ravel():
        panel.axis("off")
    return figure, axes


def _show(axes: Any, image_CHW: np.ndarray) -> None:
    """Show a grey or RGB image; of other numbers of channels the mean."""
    if len(image_CHW) == 3:
        axes.imshow(np.clip(np.moveaxis(image_CHW, 0, -1), 0, 1))
    else:
        axes.imshow(image_CHW.mean(axis=0), cmap="gray", vmin=0, vmax=1)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
