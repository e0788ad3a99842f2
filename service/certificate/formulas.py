"""Functions of one real number, composed of elementary ones: proved bounds of values and slopes on an interval.

Interval arithmetic with first derivatives (Moore, *Interval Analysis*, 1966): a piece of the interval has an enclosure
of the values and one of the slopes there, and the pieces that decide the bound are halved until they tell no more. A
function whose derivative lies in `[-s, s]` wherever it exists, in all pieces, is s-Lipschitz on the interval: all of
them are absolutely continuous. Results of numpy's exp, tanh and erf are widened by more than their inaccuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.certificate.rounding import down, up

Array = NDArray[np.float64]

MOST_PARTS = 40
"""Elementary functions of one composition: beyond, it counts as several."""
_INACCURACY = 128.0 * 2.0**-53
"""Of numpy's functions, relative to the result or absolute, twice the assumption of `rules.activations`."""
_TOLERANCE = 1e-4
"""Relative distance between bound and supremum at which the search ends."""
_MOST_PIECES = 1 << 13
_MOST_ROUNDS = 40


class Interval(NamedTuple):
    """Lower and upper bounds of numbers."""

    low: Array
    high: Array


class Jet(NamedTuple):
    """Enclosures of a function and of its slopes, for each piece."""

    value: Interval
    slope: Interval


@dataclass(frozen=True, eq=False)
class Formula:
    """A function of one number."""

    kind: str
    """`x`, `constant`, `sum`, `product`, or the name of an operator."""
    operands: tuple[Formula, ...] = ()
    numbers: tuple[float, ...] = ()
    parts: int = 1

    @property
    def curved(self) -> bool:
        """Whether a product of two functions is in it."""
        return self.kind == "product" or any(one.curved for one in self.operands)


IDENTITY = Formula("x")


def constant(value: float) -> Formula:
    """Return the function of one value."""
    return Formula("constant", numbers=(value,))


def compose(kind: str, *operands: Formula, numbers: tuple[float, ...] = ()) -> Formula | None:
    """Return an elementary function of others; null where it would have too many parts.

    Args:
        kind: see `Formula`.
        operands: the others.
        numbers: parameters of the elementary function.
    """
    parts = 1 + sum(one.parts for one in operands)
    return Formula(kind, operands, numbers, parts) if parts <= MOST_PARTS else None


def slope_bound(formula: Formula, low: float, high: float) -> float:
    """Return a Lipschitz constant of a function on `[low, high]`, rounded up; infinity where there is no bound.

    Args:
        formula: the function.
        low: of its argument.
        high: of its argument.
    """
    return _supremum(formula, low, high, lambda jet: jet.slope)


def value_bound(formula: Formula, low: float, high: float) -> float:
    """Return a bound of the absolute value of a function on `[low, high]`; infinity where there is no bound.

    Args:
        formula: the function.
        low: of its argument.
        high: of its argument.
    """
    return _supremum(formula, low, high, lambda jet: jet.value)


def _supremum(formula: Formula, least: float, most: float, of: Callable[[Jet], Interval]) -> float:
    if not (math.isfinite(least) and math.isfinite(most)):
        return math.inf
    grid = np.concatenate([np.linspace(0.0, 8.0, 65), 2.0 ** np.arange(4.0, 60.0)])
    edges = np.unique(np.clip(np.concatenate([-grid, grid, [least, most]]), least, most))
    low, high = (edges[:-1], edges[1:]) if len(edges) > 1 else (edges, edges)
    settled = reached = 0.0
    upper = _magnitude(of(_jet(formula, low, high)))
    for _ in range(_MOST_ROUNDS):
        middle = 0.5 * low + 0.5 * high
        at_middle = of(_jet(formula, middle, middle))
        # The magnitude at the middle of each piece is not below this.
        seen = np.maximum(at_middle.low, -at_middle.high)
        reached = max(reached, float(np.max(np.nan_to_num(seen, nan=0.0, posinf=0.0), initial=0.0)))
        undecided = upper > reached * (1.0 + _TOLERANCE)
        settled = max(settled, float(np.max(upper[~undecided], initial=0.0)))
        low, middle, high, upper = low[undecided], middle[undecided], high[undecided], upper[undecided]
        if not low.size or 2 * low.size > _MOST_PIECES:
            break
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
        upper = _magnitude(of(_jet(formula, low, high)))
    return max(settled, float(np.max(upper, initial=0.0)))


def _magnitude(interval: Interval) -> Array:
    """Return the largest absolute value; infinity where it is not known."""
    largest = np.maximum(np.abs(interval.low), np.abs(interval.high))
    return np.where(np.isnan(interval.low) | np.isnan(interval.high), np.inf, largest)


# --- arithmetic of enclosures -----------------------------------------------------------------------------------------


def _outwards(low: Array, high: Array) -> Interval:
    """Return an enclosure of numbers that were rounded once; where there is no number, of all numbers."""
    low = np.where(np.isnan(low), -np.inf, np.nextafter(low, -np.inf))
    return Interval(low, np.where(np.isnan(high), np.inf, np.nextafter(high, np.inf)))


def _plus(one: Interval, other: Interval) -> Interval:
    return _outwards(one.low + other.low, one.high + other.high)


def _times(one: Interval, other: Interval) -> Interval:
    corners = np.stack([a * b for a in one for b in other])
    # A corner that is no number, 0 times infinity, leaves everything open.
    return _outwards(corners.min(axis=0), corners.max(axis=0))


def _jet(formula: Formula, low: Array, high: Array) -> Jet:
    known: dict[int, Jet] = {}
    with np.errstate(all="ignore"):
        return _enclosed(formula, Interval(low, high), known)


def _enclosed(formula: Formula, x: Interval, known: dict[int, Jet]) -> Jet:
    if id(formula) not in known:
        known[id(formula)] = _of(formula, x, known)
    return known[id(formula)]


def _of(formula: Formula, x: Interval, known: dict[int, Jet]) -> Jet:
    zero, one = np.zeros_like(x.low), np.ones_like(x.low)
    if formula.kind == "x":
        return Jet(x, Interval(one, one))
    if formula.kind == "constant":
        (number,) = formula.numbers
        return Jet(Interval(number * one, number * one), Interval(zero, zero))
    jets = [_enclosed(operand, x, known) for operand in formula.operands]
    if formula.kind == "sum":
        left, right = jets
        return Jet(_plus(left.value, right.value), _plus(left.slope, right.slope))
    if formula.kind == "product":
        left, right = jets
        slope = _plus(_times(left.slope, right.value), _times(left.value, right.slope))
        return Jet(_times(left.value, right.value), slope)
    (inner,) = jets
    outer = ELEMENTARY[formula.kind](inner.value, *formula.numbers)
    return Jet(outer.value, _times(outer.slope, inner.slope))


# --- elementary functions ---------------------------------------------------------------------------------------------


def _widened(low: Array, high: Array, least: float, most: float) -> Interval:
    """Return an enclosure of results of numpy's functions, whose exact values lie between `least` and `most`."""
    low = low - _INACCURACY * np.maximum(1.0, np.abs(low))
    high = high + _INACCURACY * np.maximum(1.0, np.abs(high))
    return Interval(np.clip(low, least, most), np.clip(high, least, most))


def _bell(x: Interval, shape: Callable[[Array], Array], peak: float) -> Interval:
    """Return the enclosure of a positive even function that falls with `|x|`, from its relative accuracy.

    Args:
        x: where.
        shape: the function of `|x|`, within half of `_INACCURACY`, relative or, where it underflows, 1e-300.
        peak: its value at 0, rounded up.
    """
    far = np.maximum(np.abs(x.low), np.abs(x.high))
    near = np.where((x.low <= 0.0) & (x.high >= 0.0), 0.0, np.minimum(np.abs(x.low), np.abs(x.high)))
    low, high = shape(far) * (1.0 - _INACCURACY) - 1e-300, shape(near) * (1.0 + _INACCURACY) + 1e-300
    return Interval(np.maximum(low, 0.0), np.minimum(high, peak))


def _logistic(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


def _logistic_slope(x: Array) -> Array:
    small = np.exp(-x)
    return small / ((1.0 + small) * (1.0 + small))


def _sigmoid(x: Interval) -> Jet:
    return Jet(_widened(_logistic(x.low), _logistic(x.high), 0.0, 1.0), _bell(x, _logistic_slope, 0.25))


def _tanh(x: Interval) -> Jet:
    slope = _bell(x, lambda t: 4.0 * _logistic_slope(2.0 * t), 1.0)
    return Jet(_widened(np.tanh(x.low), np.tanh(x.high), -1.0, 1.0), slope)


_ERF = np.vectorize(math.erf, otypes=[np.float64])
_ERF_PEAK = up(2.0 / down(math.sqrt(down(math.pi))))


def _gauss(x: Array) -> Array:
    # A square is off by one rounding, and its exponential by as much times the square: 800 u at most where it counts.
    return _ERF_PEAK * np.exp(-x * x)


def _erf(x: Interval) -> Jet:
    slope = _bell(x, _gauss, _ERF_PEAK)
    off = 1024.0 * 2.0**-53
    wider = Interval(slope.low * (1.0 - off), np.minimum(slope.high * (1.0 + off), _ERF_PEAK))
    return Jet(_widened(_ERF(x.low), _ERF(x.high), -1.0, 1.0), wider)


def _softplus(x: Interval) -> Jet:
    value = _widened(np.logaddexp(0.0, x.low), np.logaddexp(0.0, x.high), 0.0, np.inf)
    return Jet(value, _widened(_logistic(x.low), _logistic(x.high), 0.0, 1.0))


def _clip(x: Interval, least: float, most: float) -> Jet:
    value = Interval(np.clip(x.low, least, most), np.clip(x.high, least, most))
    inside = (x.low >= least) & (x.high <= most)
    outside = (x.high < least) | (x.low > most)
    return Jet(value, Interval(np.where(inside, 1.0, 0.0), np.where(outside, 0.0, 1.0)))


def _scaled(x: Interval, factor: float) -> Jet:
    number = np.full_like(x.low, factor)
    return Jet(_times(x, Interval(number, number)), Interval(number, number))


def _divided(x: Interval, divisor: float) -> Jet:
    quotients = x.low / divisor, x.high / divisor
    number = np.full_like(x.low, 1.0 / divisor)
    return Jet(_outwards(np.minimum(*quotients), np.maximum(*quotients)), _outwards(number, number))


ELEMENTARY: dict[str, Callable[..., Jet]] = {
    "Clip": _clip,
    "Div": _divided,
    "Erf": _erf,
    "Mul": _scaled,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Tanh": _tanh,
}
"""Each by the enclosure of its argument and its parameters; Mul and Div by a number."""
