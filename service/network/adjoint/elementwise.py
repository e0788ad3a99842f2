"""Pullbacks of operators that work on each element, and of sums, products and maxima of tensors.

At a tie or a kink, where there is no gradient, one of the one-sided derivatives is taken.
"""

from __future__ import annotations

import math

import numpy as np

from service.network.adjoint.builder import Builder, Cotangents, constant_of, pulls_back, tensor_of
from service.network.operators import ELEMENT_TYPES, Constant, Operator, Tensor


def only(cotangents: Cotangents) -> Tensor:
    """Return the cotangent of an operator with one result that counts.

    Raises:
        ValueError: it has no cotangent.
    """
    (g, *_) = cotangents
    if g is None:
        raise ValueError("an operator without a cotangent has no pullback to compute")
    return g


@pulls_back("Add", "Sum", "Mean", "Sub")
def _total(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` for each operand, with its sign; of a mean, divided by the number of operands."""
    g = only(cotangents)
    if operator.kind == "Mean":
        g = b.one("Div", [g, b.number(float(len(operator.operands)))], g.shape)
    found: list[Tensor | None] = []
    for position, operand in enumerate(operator.operands):
        if not isinstance(operand, Tensor):
            found.append(None)
            continue
        signed = b.one("Neg", [g], g.shape) if operator.kind == "Sub" and position == 1 else g
        found.append(b.summed_to(signed, operand.shape))
    return found


@pulls_back("Mul")
def _product(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g y` and `g x`."""
    g, (left, right) = only(cotangents), operator.operands
    found: list[Tensor | None] = []
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Tensor) and isinstance(other, (Tensor, Constant)):
            found.append(b.summed_to(b.times(g, other), one.shape))
        else:
            found.append(None)
    return found


@pulls_back("Div")
def _quotient(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g / c`."""
    g = only(cotangents)
    return [b.summed_to(b.one("Div", [g, operator.operands[1]], g.shape), tensor_of(operator).shape), None]


@pulls_back("Neg")
def _negated(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `-g`."""
    g = only(cotangents)
    return [b.one("Neg", [g], g.shape)]


@pulls_back("Abs")
def _absolute(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g sign(x)`."""
    g, x = only(cotangents), tensor_of(operator)
    return [b.times(g, b.one("Sign", [x], x.shape))]


@pulls_back("Sign")
def _flat(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return zero: the slope wherever there is one."""
    return [None]


@pulls_back("Relu")
def _positive_part(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` where `x > 0`."""
    g, x = only(cotangents), tensor_of(operator)
    zero = b.number(0.0)
    return [b.where(b.compare("Greater", x, zero), g, zero, x.shape)]


@pulls_back("ThresholdedRelu")
def _thresholded(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` where `x > alpha`."""
    g, x = only(cotangents), tensor_of(operator)
    mask = b.compare("Greater", x, b.number(operator.number("alpha")))
    return [b.where(mask, g, b.number(0.0), x.shape)]


@pulls_back("LeakyRelu", "PRelu")
def _leaky(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g`, below 0 times the slope there."""
    g, x = only(cotangents), tensor_of(operator)
    slope = constant_of(operator, 1) if operator.kind == "PRelu" else np.array(operator.number("alpha"))
    mask = b.compare("GreaterOrEqual", x, b.number(0.0))
    return [b.where(mask, g, b.times(g, b.number(slope)), x.shape), *[None] * (len(operator.operands) - 1)]


@pulls_back("Clip")
def _clipped(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` where x lies between the limits."""
    g, x = only(cotangents), tensor_of(operator)
    for position, outside in ((1, "Less"), (2, "Greater")):
        limit = operator.operands[position] if position < len(operator.operands) else None
        if isinstance(limit, Constant):
            g = b.where(b.compare(outside, x, limit), b.number(0.0), g, x.shape)
    return [g, *[None] * (len(operator.operands) - 1)]


@pulls_back("Max", "Min")
def _extremum(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` for the operand that was taken; see `sorted_pair` for a maximum beside its minimum."""
    g, result = only(cotangents), operator.results[0]
    zero = b.number(0.0)
    if len(operator.operands) == 2:
        left, right = operator.operands
        mask = b.one("GreaterOrEqual", [left, right], result.shape)
        first, second = (g, zero), (zero, g)
        pairs = (first, second) if operator.kind == "Max" else (second, first)
        return [
            b.summed_to(b.where(mask, *pair, result.shape), operand.shape) if isinstance(operand, Tensor) else None
            for operand, pair in zip((left, right), pairs, strict=True)
        ]
    return [
        b.summed_to(b.where(b.one("Equal", [operand, result], result.shape), g, zero, result.shape), operand.shape)
        if isinstance(operand, Tensor)
        else None
        for operand in operator.operands
    ]


def sorted_pair(b: Builder, left: Tensor, right: Tensor, of_max: Tensor, of_min: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cotangents of two tensors of one shape whose maximum and minimum are both taken.

    Sums of products with 0 and 1, which are exact: the runtime takes them faster than it chooses by a mask.

    Args:
        b: appends the operators.
        left: one operand.
        right: the other.
        of_max: cotangent of their maximum.
        of_min: cotangent of their minimum.
    """
    ordered = b.one("Cast", [b.compare("GreaterOrEqual", left, right)], left.shape, to=ELEMENT_TYPES[b.precision])
    turned = b.one("Sub", [b.number(1.0), ordered], left.shape)
    pairs = ((of_max, of_min), (of_min, of_max))
    of_left, of_right = (b.add(b.times(one, ordered), b.times(other, turned)) for one, other in pairs)
    assert of_left is not None
    assert of_right is not None
    return of_left, of_right


@pulls_back("Pow", "Sqrt")
def _power(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `2 x g` of a square, `g / (2 y)` of a root `y` (0 where it is 0)."""
    g, x, y = only(cotangents), tensor_of(operator), operator.results[0]
    rest = [None] * (len(operator.operands) - 1)
    if operator.kind == "Pow" and float(constant_of(operator, 1).item()) != 0.5:
        exponent = float(constant_of(operator, 1).item())
        factor = x if exponent == 2.0 else b.one("Pow", [x, b.number(exponent - 1.0)], x.shape)
        return [b.times(b.times(g, factor), b.number(exponent)), *rest]
    return [divided(b, b.times(g, b.number(0.5)), y), *rest]


def divided(b: Builder, g: Tensor, y: Tensor) -> Tensor:
    """Return `g / y`, 0 where y is not positive.

    Args:
        b: appends the operators.
        g: the dividend.
        y: the divisor, of the same shape.
    """
    mask = b.compare("Greater", y, b.number(0.0))
    safe = b.where(mask, y, b.number(1.0), y.shape)
    quotient = b.one("Div", [g, safe], g.shape)
    return b.where(mask, quotient, b.number(0.0), g.shape)


@pulls_back("Sigmoid", "Tanh", "Softsign", "Softplus", "Erf")
def _smooth(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` times the slope, from the result where it tells the slope."""
    g, x, y = only(cotangents), tensor_of(operator), operator.results[0]
    one = b.number(1.0)
    match operator.kind:
        case "Sigmoid":
            slope = b.times(b.one("Sub", [one, y], y.shape), y)
        case "Tanh":
            slope = b.one("Sub", [one, b.times(y, y)], y.shape)
        case "Softsign":
            part = b.one("Sub", [one, b.one("Abs", [y], y.shape)], y.shape)
            slope = b.times(part, part)
        case "Softplus":
            slope = b.one("Sigmoid", [x], x.shape)
        case _:
            square = b.one("Neg", [b.times(x, x)], x.shape)
            slope = b.times(b.one("Exp", [square], x.shape), b.number(2.0 / math.sqrt(math.pi)))
    return [b.times(g, slope)]


@pulls_back("Elu", "Selu", "Celu")
def _exponential(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g`, below 0 times the exponential there."""
    g, x = only(cotangents), tensor_of(operator)
    alpha = operator.number("alpha")
    scale = operator.number("gamma") if operator.kind == "Selu" else 1.0
    zero = b.number(0.0)
    low = b.one("Min", [x, zero], x.shape)
    if operator.kind == "Celu":
        slope = b.one("Exp", [b.one("Div", [low, b.number(alpha)], x.shape)], x.shape)
    else:
        slope = b.times(b.one("Exp", [low], x.shape), b.number(alpha * scale))
    above = g if scale == 1.0 else b.times(g, b.number(scale))
    return [b.where(b.compare("Greater", x, zero), above, b.times(g, slope), x.shape)]


@pulls_back("HardSigmoid", "HardSwish")
def _hard(b: Builder, operator: Operator, cotangents: Cotangents) -> Cotangents:
    """Return `g` times the slope of the middle piece, and of the outer ones."""
    g, x, y = only(cotangents), tensor_of(operator), operator.results[0]
    zero = b.number(0.0)
    if operator.kind == "HardSigmoid":
        inner = b.times(g, b.number(operator.number("alpha")))
        above = b.where(b.compare("Less", y, b.number(1.0)), inner, zero, x.shape)
        return [b.where(b.compare("Greater", y, zero), above, zero, x.shape)]
    slope = b.one("Add", [b.times(x, b.number(1.0 / 3.0)), b.number(0.5)], x.shape)
    middle = b.where(b.compare("Less", x, b.number(3.0)), b.times(g, slope), g, x.shape)
    return [b.where(b.compare("Greater", x, b.number(-3.0)), middle, zero, x.shape)]
