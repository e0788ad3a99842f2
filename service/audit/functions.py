"""Elementwise functions of one tensor, and products of two tensors.

A product has no Lipschitz constant of its own, but on the box its factors are bounded. Where both factors, or both
terms of a sum, are functions of the same numbers z element by element, as in `x sigmoid(x)`, the result is one function
f of z, and the largest slope of f on the range of z is the sharp constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flint import arb

from service.audit.balls import larger, root, smaller, upper
from service.audit.expressions import ARGUMENT, Expression, compose, largest_slope, largest_value, number, scaled
from service.audit.network import Base, Network, Values
from service.audit.origins import Function, SumOfSquares


def function_of(network: Network, ids: np.ndarray) -> Function:
    """Return numbers as a function of others; as themselves where none is known."""
    return network.origins.function_of(ids.ravel(), network.starts_of)


def extended(
    network: Network,
    results: np.ndarray,
    operands: np.ndarray,
    outer: Callable[[Expression], Expression | None],
    slope: arb,
    own: tuple[arb, arb],
) -> None:
    """Note that numbers are a function of the operands, and so of the numbers that those are a function of.

    Args:
        network: the layers so far.
        results: numbers of one layer.
        operands: one for each.
        outer: the expression of the result by that of the operand.
        slope: Lipschitz bound of the function of the operand.
        own: bounds of the rounding of the results, of their L2 norm and of one component.
    """
    starts = network.starts_of(results.ravel())
    first = int(results.min())
    # A layer that is made for these numbers; others are known already.
    if (starts != first).any() or first in network.origins.functions:
        return
    inner = function_of(network, operands)
    expression = outer(inner.expression)
    if expression is not None:
        error, error_max = upper(slope * inner.error + own[0]), upper(slope * inner.error_max + own[1])
        network.origins.add_function(results, inner.operands, expression, error, error_max)


def rounding_of(network: Network, results: np.ndarray, roundings: int) -> tuple[arb, arb]:
    """Return bounds of the L2 norm of the rounding of numbers, and of one component of it.

    Args:
        network: the layers so far.
        results: the numbers.
        roundings: of each number.
    """
    facts = network.facts(results)
    gamma, tiny = network.format.gamma(roundings), 8 * network.format.tiny * (arb(1) + facts.largest)
    return upper(gamma * facts.computed + tiny * root(arb(results.size))), upper(gamma * facts.largest + tiny)


def times_number(network: Network, results: np.ndarray, operands: np.ndarray, factor: arb, roundings: int) -> None:
    """Note that numbers are the operands times a number.

    Args:
        network: the layers so far.
        results: numbers of one layer.
        operands: one for each.
        factor: the number.
        roundings: of each result.
    """
    own = rounding_of(network, results, roundings) if roundings else (arb(0), arb(0))
    extended(network, results, operands, lambda f: scaled(factor, f), upper(abs(factor)), own)


def plus_number(network: Network, results: np.ndarray, operands: np.ndarray, sign: int, constant: arb) -> None:
    """Note that numbers are `sign x + c` of the operands x, rounded once.

    Args:
        network: the layers so far.
        results: numbers of one layer.
        operands: x, one for each.
        sign: 1 or -1.
        constant: c.
    """
    own = rounding_of(network, results, 1)

    def outer(f: Expression) -> Expression | None:
        return compose("sum", f if sign == 1 else scaled(arb(-1), f), number(constant))

    extended(network, results, operands, outer, arb(1), own)


def _range(network: Network, ids: np.ndarray) -> tuple[arb, arb]:
    """Return numbers that enclose these numbers, exact and computed, at every image of the box."""
    centre = network.at(0, ids.tolist())
    peak = arb(0)
    low, high = centre[0], centre[0]
    for value in centre:
        low, high, peak = low.min(value), high.max(value), larger(peak, upper(abs(value)))
    # `largest` is the largest magnitude at the centre and how far any number may stray from there.
    stray = upper(network.facts(ids).largest - arb(peak))
    return (low - stray).lower(), upper(high + stray)


def _signed(network: Network, left: np.ndarray, right: np.ndarray, sign: int) -> tuple[Function, Function]:
    u, v = function_of(network, left), function_of(network, right)
    negative = None if sign == 1 else scaled(arb(-1), v.expression)
    return u, v if negative is None else replace(v, expression=negative)


def _bounds(network: Network, operands: np.ndarray, expression: Expression, local: tuple[arb, arb]) -> Base:
    """Return bounds of a function of numbers, computed from the computed ones up to a local error."""
    facts = network.facts(operands)
    slope = largest_slope(expression, *_range(network, operands))
    return Base(
        upper(slope * facts.lipschitz),
        upper(slope * facts.swing),
        upper(slope * facts.error + local[0]),
        upper(slope * facts.error_max + local[1]),
    )


def _reach(network: Network, ids: np.ndarray, function: Function) -> arb:
    """Return a bound of numbers, exact and computed."""
    facts = network.facts(ids)
    if function.expression is ARGUMENT:
        return facts.largest
    value = largest_value(function.expression, *_range(network, function.operands))
    return smaller(facts.largest, upper(value + facts.error_max))


def product(network: Network, left: np.ndarray, right: np.ndarray, roundings: int) -> np.ndarray:
    """Append `u v`, elementwise: `||u v - u' v'|| <= max|u| ||v - v'|| + max|v'| ||u - u'||`; return the identities.

    The errors of the factors add in the same way, computed numbers being within the same bounds. Where u = f(z) and
    v = g(z), computed as `f(z^) + d` and `g(z^) + d'`, the Lipschitz bound is also `sup |(f g)'| L_z`, and the error
    `sup |(f g)'| e_z + max|u| ||d'|| + (max|v| + max|d'|) ||d||`: `u^ v^ - f(z^) g(z^) = u^ d' + v^ d - d d'`.

    Args:
        network: the layers so far.
        left: u, flat.
        right: v, flat.
        roundings: of each product.
    """
    u, v = function_of(network, left), function_of(network, right)
    one, other = network.facts(left), network.facts(right)
    reach, reach_other = _reach(network, left, u), _reach(network, right, v)
    largest = upper(reach * reach_other)
    network.require_no_overflow(largest)
    lipschitz = upper(reach * other.lipschitz + reach_other * one.lipschitz)
    swing = upper(reach * other.swing + reach_other * one.swing)
    error = upper(reach * other.error + reach_other * one.error)
    error_max = upper(reach * other.error_max + reach_other * one.error_max)
    size = smaller(upper(reach * other.computed), upper(reach_other * one.computed))
    gamma, tiny = network.format.gamma(roundings), 4 * network.format.tiny * (arb(1) + reach + reach_other)
    rounding = upper(gamma * size + tiny * root(arb(len(left)))), upper(gamma * largest + tiny)
    base = Base(lipschitz, swing, upper(error + rounding[0]), upper(error_max + rounding[1]))
    local = rounding
    expression = compose("product", u.expression, v.expression) if np.array_equal(u.operands, v.operands) else None
    if expression is not None:
        local = (
            upper(reach * v.error + (reach_other + v.error_max) * u.error + rounding[0]),
            upper(reach * v.error_max + (reach_other + v.error_max) * u.error_max + rounding[1]),
        )
        base = base.smaller(_bounds(network, u.operands, expression, local))
    squares = np.array_equal(left, right)
    values: Values = []
    for point in range(len(network.values)):
        pairs = zip(network.at(point, left.tolist()), network.at(point, right.tolist()), strict=True)
        values.append([a * a if squares else a * b for a, b in pairs])
    made = network.add_base(base, values)
    if expression is not None:
        network.origins.add_function(made, u.operands, expression, *local)
    if squares:
        for result, operand in zip(made.tolist(), left.tolist(), strict=True):
            network.origins.squares[result] = SumOfSquares({operand: arb(1)}, arb(0), roundings, upper(tiny))
    return made


def sum_of_functions(network: Network, left: np.ndarray, right: np.ndarray, sign: int) -> Base | None:
    """Return bounds of `u + sign v` where both are functions of one tensor z: as in `product`; null where they are not.

    Args:
        network: the layers so far.
        left: u, flat.
        right: v, flat.
        sign: 1 or -1.
    """
    u, v = _signed(network, left, right, sign)
    if not np.array_equal(u.operands, v.operands) or ARGUMENT is u.expression is v.expression:
        return None
    expression = compose("sum", u.expression, v.expression)
    if expression is None:
        return None
    return _bounds(network, u.operands, expression, (upper(u.error + v.error), upper(u.error_max + v.error_max)))


def added(network: Network, results: np.ndarray, left: np.ndarray, right: np.ndarray, sign: int) -> None:
    """Note that numbers are `u + sign v`, rounded once, where both are functions of one tensor.

    Args:
        network: the layers so far.
        results: numbers of one layer.
        left: u, flat.
        right: v, flat.
        sign: 1 or -1.
    """
    u, v = _signed(network, left, right, sign)
    if np.array_equal(u.operands, v.operands):
        expression = compose("sum", u.expression, v.expression)
        if expression is not None:
            own = rounding_of(network, results, 1)
            error, error_max = upper(u.error + v.error + own[0]), upper(u.error_max + v.error_max + own[1])
            network.origins.add_function(results, u.operands, expression, error, error_max)
