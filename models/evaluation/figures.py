"""The figures of a report: each function draws plain arrays into one PNG file.

Distances and radii are L2, pixels in [0, 1]. Lines differ in colour (palette of Okabe and Ito, which colour-blind
readers can distinguish) and in dashes.

Axes: N images, M attacked images, C channels, H height, W width; G images of a gallery.
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


@dataclass(frozen=True)
class Attacked:
    """Certificate and nearest adversarial image of each attacked image."""

    right_M: Bool[np.ndarray, " M"]
    radius_M: Float64[np.ndarray, " M"]
    distance_M: Float64[np.ndarray, " M"]
    """To the nearest image of another class of all attacks; infinite where every attack failed."""


@dataclass(frozen=True)
class Panel:
    """One column of a gallery."""

    image_CHW: Float64[np.ndarray, "C H W"]
    label: str
    radius: float
    other_CHW: Float64[np.ndarray, "C H W"]
    other_label: str
    distance: float
    gradient_CHW: Float64[np.ndarray, "C H W"]
    """Of the margin between the predicted class and `runner_up`."""
    runner_up: str


def plot_certified_accuracy(
    right_N: Bool[np.ndarray, " N"],
    radius_N: Float64[np.ndarray, " N"],
    attacked: Attacked | None,
    epsilons: Sequence[float],
    path: Path,
) -> None:
    """Draw the share of images that are right and certified, and of those that are right and not flipped, over epsilon.

    The band between the curves covers images that are neither proved nor flipped. Both curves refer to the attacked
    images; where they are a part of the test set, the certified share of the whole set is drawn too.

    Args:
        right_N: whether the predicted class is right.
        radius_N: certified radii.
        attacked: the attacked images; default: only the certified share is drawn.
        epsilons: radii to be marked.
        path: of the PNG file.
    """
    farthest = float(np.quantile(radius_N, 0.99))
    if attacked is not None and np.isfinite(attacked.distance_M).any():
        farthest = max(farthest, float(np.quantile(attacked.distance_M[np.isfinite(attacked.distance_M)], 0.99)))
    farthest = max(farthest, *epsilons, 1e-3)
    grid = np.linspace(0.0, farthest, 400)
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    if attacked is None:
        axes.plot(grid, share_beyond(right_N, radius_N, grid), color=BLUE, label=f"certified, n = {len(radius_N):,}")
    else:
        count = f"n = {len(attacked.radius_M):,}"
        proved = share_beyond(attacked.right_M, attacked.radius_M, grid)
        unflipped = share_beyond(attacked.right_M, attacked.distance_M, grid)
        axes.fill_between(
            grid, proved, unflipped, color=GREY, alpha=0.22, linewidth=0, label="neither proved nor flipped"
        )
        axes.plot(grid, unflipped, color=ORANGE, linestyle="--", label=f"robust under all attacks, {count}")
        axes.plot(grid, proved, color=BLUE, label=f"certified, {count}")
        if len(radius_N) != len(attacked.radius_M):
            label = f"certified, all n = {len(radius_N):,}"
            axes.plot(
                grid, share_beyond(right_N, radius_N, grid), color=BLUE, linestyle=":", linewidth=1.2, label=label
            )
    for epsilon in epsilons:
        axes.axvline(epsilon, color=GREY, linewidth=0.6, alpha=0.6)
        axes.annotate(f"{epsilon:.3g}", (epsilon, 1), xytext=(2, 1), textcoords="offset points", fontsize=7, color=GREY)
    axes.set(xlabel=f"epsilon ({UNIT})", ylabel="share of test images, %", ylim=(0, 101), xlim=(0, farthest))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    _save(figure, path)


def plot_radii(right_N: Bool[np.ndarray, " N"], radius_N: Float64[np.ndarray, " N"], path: Path) -> None:
    """Draw the histogram of the certified radii, right and wrong answers apart.

    Args:
        right_N: whether the predicted class is right.
        radius_N: certified radii.
        path: of the PNG file.
    """
    bins = np.linspace(0.0, max(float(radius_N.max()), 1e-3), 41)
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
    median = float(np.median(radius_N))
    axes.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:.3g}")
    axes.set(xlabel=f"certified radius ({UNIT})", ylabel="test images", xlim=(0, bins[-1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_tightness(attacked: Attacked, path: Path) -> None:
    """Draw the radius over the distance of the nearest attack, one point for each image, and their quotients."""
    found_M = np.isfinite(attacked.distance_M)
    radius_M, distance_M = attacked.radius_M[found_M], attacked.distance_M[found_M]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    farthest = 1.05 * max(float(distance_M.max(initial=0.0)), 1e-3)
    left.fill_between([0, farthest], [0, farthest], [farthest, farthest], color=ORANGE, alpha=0.15, linewidth=0)
    left.annotate("refuted: no point may be here", (0.03 * farthest, 0.93 * farthest), fontsize=8, color=ORANGE)
    left.plot([0, farthest], [0, farthest], color=ORANGE, linestyle="--", linewidth=1)
    left.scatter(distance_M, radius_M, s=6, color=BLUE, alpha=0.5, linewidths=0)
    left.set(
        xlabel=f"nearest attack ({UNIT})",
        ylabel=f"certified radius ({UNIT})",
        xlim=(0, farthest),
        ylim=(0, farthest),
        aspect="equal",
    )
    quotient_M = radius_M / np.maximum(distance_M, 1e-300)
    right.hist(quotient_M, bins=np.linspace(0, 1, 51).tolist(), color=BLUE)
    if len(quotient_M):
        low, median, high = np.quantile(quotient_M, [0.05, 0.5, 0.95])
        right.axvline(median, color="black", linestyle="--", linewidth=1, label=f"median {median:.3f}")
        for value, name in ((low, "5 %"), (high, "95 %")):
            right.axvline(value, color=GREY, linestyle=":", linewidth=1.2, label=f"{name} {value:.3f}")
        right.legend(fontsize=8, loc="upper left")
    right.set(
        xlabel="radius / distance of the nearest attack", ylabel=f"images (of n = {len(quotient_M):,})", xlim=(0, 1)
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
        top.set_title(f"{panel.label}\nradius {panel.radius:.2f}", fontsize=8)
        bottom.set_title(f"{panel.other_label}\ndistance {panel.distance:.2f}", fontsize=8)
    if shown is not None:
        bar = figure.colorbar(shown, ax=list(axes[1]), fraction=0.05, aspect=12, pad=0.01)
        bar.set_label("change of a pixel\n([0, 1])", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        note = ""
    else:
        note = f"\nDifference: mid-grey is zero, black and white are {largest:.2g} of a channel in [0, 1]"
    figure.suptitle(f"Image, difference, counterfactual. Radius and distance: {UNIT}{note}", fontsize=9)
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
