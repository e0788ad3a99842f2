"""The two plots beside the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.serving.artefacts import REFERENCE_CHANNELS
from benchmarks.serving.claims import REFERENCE
from benchmarks.serving.contestants import Contestant
from benchmarks.serving.plan import CLIENTS
from benchmarks.serving.report import GROWTH_PLOT, THROUGHPUT_PLOT
from benchmarks.serving.results import Results

matplotlib.use("Agg")
from matplotlib import pyplot

# Okabe and Ito's colours, which colour-blind readers tell apart; markers differ as well.
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#666666", "#999933", "#F0E442",
)  # fmt: skip
_MARKERS = "osD^vPX*<h"


def draw(results: Results, contestants: Sequence[Contestant], folder: Path) -> list[Path]:
    """Write the plots that there are figures for."""
    # Names of elements in the file are otherwise random, and times would change it without a change of the figures.
    with pyplot.rc_context({"svg.hashsalt": "lipcert", "svg.fonttype": "none"}):
        return [
            path for path in (_throughput(results, contestants, folder), _growth(results, contestants, folder)) if path
        ]


def _throughput(results: Results, contestants: Sequence[Contestant], folder: Path) -> Path | None:
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    for index, one in enumerate(contestants):
        points = [
            (clients, rate)
            for clients in CLIENTS
            if (rate := results.median(lambda cell: cell.images_per_s, one.name, REFERENCE, "single", clients))
        ]
        if points:
            _line(axes, points, one.title, index)
    raw = results.facts(REFERENCE)
    if not axes.lines or raw is None:
        pyplot.close(figure)
        return None
    rate = 1e3 * 32 / raw.raw_batch_ms
    axes.axhline(rate, color="black", linestyle="--", linewidth=1, label="ONNX Runtime, one thread, batches of 32")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="concurrent clients",
        ylabel="images a second",
        title="Single images on the reference artefact",
    )
    axes.set_xticks(CLIENTS, [str(clients) for clients in CLIENTS])
    return _save(figure, axes, folder / THROUGHPUT_PLOT)


def _growth(results: Results, contestants: Sequence[Contestant], folder: Path) -> Path | None:
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    sizes = {name: facts.multiply_adds for name in REFERENCE_CHANNELS if (facts := results.facts(name))}
    for index, one in enumerate(contestants):
        points = [
            (size / 1e6, cost)
            for name, size in sizes.items()
            if (cost := results.median(lambda cell: cell.cpu_ms_per_image, one.name, name, "single", 64))
        ]
        if len(points) > 1:
            _line(axes, points, one.title, index)
    if not axes.lines:
        pyplot.close(figure)
        return None
    raw = [
        (size / 1e6, facts.raw_batch_ms / 32)
        for name, size in sizes.items()
        if (facts := results.facts(name)) is not None
    ]
    axes.plot(*zip(*raw, strict=True), color="black", linestyle="--", linewidth=1, label="ONNX Runtime, one thread")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="multiply-adds of an image, millions",
        ylabel="processor time of an image, ms",
        title="64 clients, single images",
    )
    axes.set_xticks([size for size, _ in raw], [f"{size:.0f}" for size, _ in raw])
    axes.minorticks_off()
    return _save(figure, axes, folder / GROWTH_PLOT)


def _line(axes: Any, points: Sequence[tuple[float, float]], title: str, index: int) -> None:
    axes.plot(
        *zip(*points, strict=True),
        label=title,
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linewidth=2.4 if index == 0 else 1.2,
        markersize=5,
    )


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
