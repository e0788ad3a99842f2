"""Drawings of a page: curves as inline SVG, and images, differences and gradients as 8-bit pictures.

Axes: C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float64, UInt8

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 34
_MARKED = 40
"""Points up to which each is marked."""
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.2rem }
.chart { max-width: 36rem } .chart svg { width: 100%; height: auto; display: block }
.chart text { font: 10.5px system-ui, sans-serif; fill: var(--dim) }
.chart .axis { stroke: var(--line); stroke-width: 1 } .chart polyline { fill: none; stroke-width: 2 }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0; font-size: .88em; color: var(--dim) }
.legend i { display: inline-block; width: 1.1em; height: .25em; margin-right: .4em; vertical-align: middle;
  border-radius: 2px }
:root { --c0: #0072b2; --c1: #c65300; --c2: #00805c; --c3: #9a4f86; --c4: #7a6a00; --c5: #4b5a68 }
.s0 { stroke: var(--c0); fill: var(--c0); background: var(--c0) }
.s1 { stroke: var(--c1); fill: var(--c1); background: var(--c1) }
.s2 { stroke: var(--c2); fill: var(--c2); background: var(--c2) }
.s3 { stroke: var(--c3); fill: var(--c3); background: var(--c3) }
.s4 { stroke: var(--c4); fill: var(--c4); background: var(--c4) }
.s5 { stroke: var(--c5); fill: var(--c5); background: var(--c5) }
@media (prefers-color-scheme: dark) { :root { --c0: #56b4e9; --c1: #f0904a; --c2: #3cc79a; --c3: #d79ac6;
  --c4: #d9c64a; --c5: #a9b6c2 } }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """Places with rising first coordinate."""


def chart(title: str, curves: Sequence[Curve], x_label: str, *, shares: bool = False, whole: bool = False) -> str:
    """Return a chart as HTML: title, SVG and legend.

    Args:
        title: over the chart.
        curves: at most six have colours of their own.
        x_label: below the horizontal axis.
        shares: whether the values are shares of 1, drawn from 0 to 100 %.
        whole: whether the horizontal axis counts.
    """
    places = [place for curve in curves for place in curve.points if math.isfinite(place[1])]
    xs, ys = [place[0] for place in places] or [0.0], [place[1] for place in places] or [0.0]
    left, right = min(xs), max(xs)
    low, high = (0.0, 1.0) if shares else (min(ys), max(ys))
    right, high = right if right > left else left + 1.0, high if high > low else low + 1.0
    wide, tall = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + wide * (x - left) / (right - left), _TOP + tall * (high - y) / (high - low)

    parts: list[str] = []
    for tick in _ticks(low, high):
        y = at(left, tick)[1]
        text = f"{100 * tick:.0f} %" if shares else f"{tick:.3g}"
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in _ticks(left, right):
        if whole and not tick.is_integer():
            continue
        x = at(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 14}" text-anchor="middle">{tick:.4g}</text>')
    middle = _LEFT + wide / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    for number, curve in enumerate(curves):
        drawn = [at(x, y) for x, y in curve.points if math.isfinite(y)]
        kind = f"s{min(number, 5)}"
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        parts.append(f'<polyline class="{kind}" points="{line}"/>')
        if len(drawn) <= _MARKED:
            parts += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="1"/>' for x, y in drawn]
    names = "".join(
        f'<span><i class="s{min(number, 5)}"></i>{escape(curve.name)}</span>' for number, curve in enumerate(curves)
    )
    return (
        f'<div class="chart"><h3>{escape(title)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg><div class="legend">{names}</div></div>'
    )


def picture(image_CHW: Float64[np.ndarray, "C H W"]) -> UInt8[np.ndarray, "D H W"]:
    """Return an image in [0, 1] as a grey or RGB picture; of other numbers of channels the mean."""
    shown = image_CHW if len(image_CHW) in (1, 3) else image_CHW.mean(axis=0, keepdims=True)
    return np.rint(255 * np.clip(shown, 0.0, 1.0)).astype(np.uint8)


def difference_picture(difference_CHW: Float64[np.ndarray, "C H W"]) -> tuple[UInt8[np.ndarray, "D H W"], float]:
    """Return a signed difference around mid-grey, and the change of a channel that is drawn black or white."""
    largest = max(float(np.abs(difference_CHW).max()), 1 / 255)
    return picture(0.5 + difference_CHW / (2 * largest)), largest


def size_picture(gradient_CHW: Float64[np.ndarray, "C H W"]) -> UInt8[np.ndarray, "3 H W"]:
    """Return the size of a gradient, its norm over the channels, from black over red to white; white is its largest."""
    size_HW = np.sqrt(np.square(gradient_CHW).sum(axis=0))
    share_HW = np.sqrt(size_HW / max(float(size_HW.max()), 1e-300))
    return picture(np.stack([np.clip(3 * share_HW - part, 0.0, 1.0) for part in (0, 1, 2)]))


def _ticks(low: float, high: float) -> list[float]:
    """Return at most seven round numbers between the ends."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    for factor in (1, 2, 2.5, 5, 10, 20):
        first, last = math.ceil(low / (step * factor) - 1e-9), math.floor(high / (step * factor) + 1e-9)
        if last - first < 7:
            return [float(number * step * factor) for number in range(first, last + 1)]
    return [low, high]
