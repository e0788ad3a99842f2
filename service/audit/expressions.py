"""Functions of one real number, composed of elementary ones: bounds of values and slopes on an interval, in balls.

A ball stands for every number within it. The value and the slope of a function on a ball enclose all of its values and
derivatives there (Moore, *Interval Analysis*, 1966); the interval is halved where the bound is not yet close to a value
that the function has. A function whose derivative lies in [-s, s] wherever it exists is s-Lipschitz on an interval: all
functions here are continuous, and piecewise smooth with finitely many pieces.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise

from flint import arb, ctx

from service.audit.balls import larger, power, upper

MOST_PARTS = 40
"""Elementary functions of one expression; longer ones are not followed."""
_DIGITS = 64
"""Bits of the balls of a search; enclosures are valid with any number of bits."""
_MOST_HALVINGS = 4000
_SLACK = arb(1) + power(-18)

Jet = tuple[arb, arb]
"""Enclosures of values and of slopes."""
Elementary = Callable[[arb], Jet]


@dataclass(frozen=True, eq=False)
class Expression:
    """A function of one number."""

    kind: str
    """`x`, `number`, `sum`, `product` or `outer`."""
    operands: tuple[Expression, ...] = ()
    number: arb | None = None
    """The value of `number`."""
    outer: Elementary | None = None
    """The function that `outer` applies to its operand."""
    parts: int = 1

    def jet(self, x: arb, known: dict[int, Jet]) -> Jet:
        """Return enclosures of the values and slopes on a ball; `known` are those of parts that occur twice."""
        if id(self) not in known:
            known[id(self)] = self._jet(x, known)
        return known[id(self)]

    def _jet(self, x: arb, known: dict[int, Jet]) -> Jet:
        if self.kind == "x":
            return x, arb(1)
        if self.number is not None:
            return self.number, arb(0)
        jets = [operand.jet(x, known) for operand in self.operands]
        if self.outer is not None:
            ((inner, inner_slope),) = jets
            value, slope = self.outer(inner)
            return value, slope * inner_slope
        (left, left_slope), (right, right_slope) = jets
        if self.kind == "sum":
            return left + right, left_slope + right_slope
        return left * right, left_slope * right + left * right_slope


ARGUMENT = Expression("x")


def number(value: arb) -> Expression:
    """Return the function of one value."""
    return Expression("number", number=value)


def compose(kind: str, *operands: Expression | None, outer: Elementary | None = None) -> Expression | None:
    """Return a function of others.

    Args:
        kind: see `Expression`.
        operands: the others.
        outer: an elementary function.

    Returns:
        Null where an operand is, or the function would have more than `MOST_PARTS` parts.
    """
    known = tuple(one for one in operands if one is not None)
    parts = 1 + sum(one.parts for one in known)
    if len(known) < len(operands) or parts > MOST_PARTS:
        return None
    return Expression(kind, known, outer=outer, parts=parts)


def scaled(factor: arb, inner: Expression | None) -> Expression | None:
    """Return `factor f`; null where f is."""
    return compose("product", number(factor), inner)


def largest_slope(function: Expression, low: arb, high: arb) -> arb:
    """Return a Lipschitz bound of a function on an interval.

    Args:
        function: f.
        low: end of the interval.
        high: end of the interval.
    """
    return _supremum(function, low, high, 1)


def largest_value(function: Expression, low: arb, high: arb) -> arb:
    """Return a bound of the absolute values of a function on an interval.

    Args:
        function: f.
        low: end of the interval.
        high: end of the interval.
    """
    return _supremum(function, low, high, 0)


def _supremum(function: Expression, low: arb, high: arb, which: int) -> arb:
    digits, ctx.prec = ctx.prec, _DIGITS
    try:
        return _searched(function, low, high, which)
    finally:
        ctx.prec = digits


def _searched(function: Expression, low: arb, high: arb, which: int) -> arb:
    """Bound the interval piece by piece, the piece with the largest bound first."""
    order = count()
    pieces: list[tuple[float, int, arb, arb, arb]] = []
    reached = arb(0)

    def push(left: arb, right: arb) -> None:
        nonlocal reached
        bound = abs(function.jet(left.union(right), {})[which]).upper()
        middle = ((left + right) * power(-1)).mid()
        seen = abs(function.jet(middle, {})[which]).lower()
        reached = larger(reached, seen) if seen.is_finite() else reached
        # The order of the pieces decides nothing but time.
        heapq.heappush(pieces, (-float(bound), next(order), bound, left, right))

    edges = _grid(low, high)
    for left, right in pairwise(edges):
        push(left, right)
    for _ in range(_MOST_HALVINGS):
        _, _, bound, left, right = pieces[0]
        if bound < reached * _SLACK or not left < right:
            break
        heapq.heappop(pieces)
        middle = ((left + right) * power(-1)).mid()
        push(left, middle)
        push(middle, right)
    # Floats of bounds may tie where the bounds differ.
    found = arb(0)
    for _, _, bound, _, _ in pieces:
        found = larger(found, upper(bound))
    return found


def _grid(low: arb, high: arb) -> list[arb]:
    """Return ends of pieces that cover `[low, high]`: short ones near 0, where activations bend."""
    inner = [arb(k) * power(-2) for k in range(-32, 33)]
    outer = [power(k) for k in range(4, 64)]
    points = sorted(
        {float(point) for point in [*(-one for one in outer), *inner, *outer] if point > low and point < high}
    )
    return [low, *map(arb, points), high]


# --- elementary functions ---------------------------------------------------------------------------------------------


def between_ends(x: arb, function: Callable[[arb], arb]) -> arb:
    """Return the values on a ball of a function that never falls, or never rises: those between its ends."""
    return function(x.lower()).union(function(x.upper()))


def _bell(x: arb, function: Callable[[arb], arb]) -> arb:
    """Return the values on a ball of an even function that falls with |x|."""
    return function(arb(x.abs_lower())).union(function(arb(x.abs_upper())))


def logistic(x: arb) -> arb:
    """Return `1 / (1 + exp(-x))`."""
    if x.mid() < 0:
        small = x.exp()
        return small / (arb(1) + small)
    return arb(1) / (arb(1) + (-x).exp())


def log_one_plus_exp(x: arb) -> arb:
    """Return `log(1 + exp(x))`."""
    return x.exp().log1p() if x.mid() < 0 else x + (-x).exp().log1p()


def _logistic_slope(x: arb) -> arb:
    small = (-x).exp()
    return small / ((arb(1) + small) * (arb(1) + small))


def sigmoid(x: arb) -> Jet:
    """Return values and slopes of `1 / (1 + exp(-x))`: slope `y (1 - y)`, even and falling with |x|."""
    return between_ends(x, logistic), _bell(x, _logistic_slope)


def tanh(x: arb) -> Jet:
    """Return values and slopes of tanh: slope `1 - tanh(x)^2 = 4 s'(2 x)`, s the sigmoid."""
    return between_ends(x, arb.tanh), _bell(x, lambda t: arb(4) * _logistic_slope(arb(2) * t))


def erf(x: arb) -> Jet:
    """Return values and slopes of erf: slope `2 / sqrt(pi) exp(-x^2)`."""
    return between_ends(x, arb.erf), _bell(x, lambda t: arb(2) / arb.pi().sqrt() * (-t * t).exp())


def softplus(x: arb) -> Jet:
    """Return values and slopes of `log(1 + exp(x))`: its slope is the sigmoid."""
    return between_ends(x, log_one_plus_exp), between_ends(x, logistic)


def clip(low: arb | None, high: arb | None) -> Elementary:
    """Return the projection on `[low, high]`: slopes 1 within and 0 outside."""

    def projected(x: arb) -> Jet:
        value = x if low is None else x.max(low)
        value = value if high is None else value.min(high)
        if (low is None or x > low) and (high is None or x < high):
            return value, arb(1)
        outside = (low is not None and x < low) or (high is not None and x > high)
        return value, arb(0) if outside else arb(0).union(arb(1))

    return projected
