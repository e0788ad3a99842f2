"""Products of two tensors that both depend on the image, and functions of one tensor that are made of them.

SiLU is `x sigmoid(x)`, GELU `x (1 + erf(x / sqrt 2)) / 2`, Mish `x tanh(softplus(x))`; a gate multiplies channels. A
product has a Lipschitz constant where its factors are bounded, as they are on the box. Where both factors are the same
tensor under elementwise functions, the largest slope of the product on the range of that tensor is the sharp constant.
Notation as in `table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.certificate import formulas
from service.certificate.facts import Facts, LocalError
from service.certificate.formulas import Formula, compose
from service.certificate.rounding import add_up, down, mul_up, sqrt_up, up
from service.certificate.rules.operands import Operands, broadcast_shape
from service.certificate.rules.table import Composition, Context
from service.certificate.values import Squares, Value, View, identity_of
from service.network.operators import Constant, Operator, Refusal

_SUMS = ("Add", "Sub")
_ELEMENTWISE = frozenset(
    [*_SUMS, "Clip", "Div", "Erf", "HardSigmoid", "Mul", "Neg", "Relu", "Sigmoid", "Softplus", "Tanh"]
)
_ABOVE = 1.0 + 2.0**-9
"""Slopes of operators, which are rounded down, times this are above the exact ones."""
_EXACT = LocalError(0.0, 0.0)
COMPOSED = "An elementwise function of one tensor: its largest slope on the range of the tensor (interval arithmetic)."
_PRODUCT = "Product of bounded tensors: |u v - u' v'| <= max|u| |v - v'| + max|v| |u - u'|."


def product(context: Context, left: View, right: View) -> View:
    """Return `u v`, elementwise: `||u v - u' v'|| <= max|u| ||v - v'|| + max|v'| ||u - u'||`, and one rounding.

    The errors of the factors add in the same way, computed values being within the same bounds. Where both factors
    are elementwise functions of one tensor `z`, the Lipschitz bound is also that of `z` times the largest slope s of
    their product on the range of `z`, and the error is s times that of `z`, and the errors since `z`.

    Args:
        context: of this analysis.
        left: u.
        right: v; the shapes broadcast.

    Raises:
        Refusal: the shapes do not fit, or the product may overflow.
    """
    if len(left.shape) != len(right.shape):
        raise Refusal(f"tensors of shapes {left.shape} and {right.shape} would broadcast across the batch")
    shape = broadcast_shape(left.shape, right.shape)
    left, right = _spread(left, shape), _spread(right, shape)
    one, other = context.domain.joint(left), context.domain.joint(right)
    reach, reach_other = _largest(context, left), _largest(context, right)
    context.no_overflow(mul_up(reach, reach_other))
    context.theorem = _PRODUCT
    lipschitz = add_up(mul_up(reach, other.lipschitz), mul_up(reach_other, one.lipschitz))
    result = Facts(
        lipschitz=lipschitz,
        error=add_up(mul_up(reach, other.error), mul_up(reach_other, one.error)),
        error_max=add_up(mul_up(reach, other.error_max), mul_up(reach_other, one.error_max)),
        norm=min(mul_up(reach, other.norm), mul_up(reach_other, one.norm)),
        largest=mul_up(reach, reach_other),
    )
    center = left.center * right.center
    rounding = context.one_rounding(result, center.size)
    result = result.plus(rounding)
    u, v = composition_of(context, left), composition_of(context, right)
    formula = _joined(u, v, None)
    if formula is None:
        return context.source(center, result)
    # Of the computed base; the exact function of it is off from the computed v by no more than its own error.
    beyond = add_up(reach_other, v.local.largest)
    whole = Composition(u.base, formula, v.local.scaled(reach) + u.local.scaled(beyond) + rounding)
    base, slope = context.domain.joint(u.base), _slope(context, whole)
    result = replace(
        result,
        lipschitz=context.smaller(lipschitz, mul_up(slope, base.lipschitz), COMPOSED),
        error=min(result.error, add_up(mul_up(slope, base.error), whole.local.l2)),
        error_max=min(result.error_max, add_up(mul_up(slope, base.error_max), whole.local.largest)),
    )
    view = context.source(center, result)
    context.compositions[view.source] = whole
    return view


def composed_sum(context: Context, left: View, right: View, sign: float) -> float:
    """Return the Lipschitz bound of `u + sign v` as a function of one tensor; infinity where it is no better one.

    Args:
        context: of this analysis.
        left: u.
        right: v, of the same shape.
        sign: 1 or -1.
    """
    u, v = composition_of(context, left), composition_of(context, right)
    formula = _joined(u, v, sign)
    # Sums of functions without products in them are left to the rules of their operators.
    if formula is None or not formula.curved:
        return np.inf
    slope = _slope(context, Composition(u.base, formula, _EXACT))
    return mul_up(slope, context.domain.joint(u.base).lipschitz)


def _slope(context: Context, whole: Composition) -> float:
    """Return the Lipschitz constant of the function on the range of its base; infinity without one."""
    return formulas.slope_bound(whole.formula, *_range(context, whole.base))


def square(context: Context, squares: Squares) -> View:
    """Return weighted squares, one for each element, as a product; one rounding for each that they have been through.

    Raises:
        Refusal: they are sums of several squares, or a sign.
    """
    if squares.sign_of is not None or len(squares.terms) != 1 or squares.constant.any():
        raise Refusal("a sum of squares is multiplied by a tensor that depends on the image")
    (term,) = squares.terms
    if term.positions.shape[-1] != 1:
        raise Refusal("a sum of squares is multiplied by a tensor that depends on the image")
    view = term.view.rearranged(term.view.index.ravel()[term.positions[..., 0]])
    weights = term.weights[..., 0]
    whole = product(context, view, view)
    if squares.roundings == 1 and (weights == 1.0).all():
        return whole
    # The weights are stored with a few roundings of float64 each.
    facts = context.domain.joint(whole).scaled(mul_up(float(np.max(weights)), 1.0 + 2.0**-40))
    rounding = LocalError.relative(context.gamma(squares.roundings + 2), facts.computed_norm, facts.largest)
    underflow = LocalError.of_each(squares.underflow, weights.size)
    result = context.source(weights * whole.center, facts.plus(rounding, underflow))
    composed = context.compositions.get(whole.source)
    if (weights == 1.0).all() and composed is not None:
        context.compositions[result.source] = replace(composed, local=composed.local + rounding + underflow)
    return result


def _range(context: Context, base: View) -> tuple[float, float]:
    """Return the least and the greatest value that a component of a tensor may have on the box."""
    center = base.center
    # The bound of all components is the largest one at the centre, and how far any may stray from there.
    stray = up(context.domain.joint(base).largest - down(float(np.max(np.abs(center)))))
    return down(float(np.min(center)) - stray), up(float(np.max(center)) + stray)


def _spread(view: View, shape: tuple[int, ...]) -> View:
    return view if view.shape == shape else view.rearranged(np.broadcast_to(view.index, shape))


def _largest(context: Context, view: View) -> float:
    """Return a bound of the components of a tensor and of the computed one, by its formula where it has one."""
    facts = context.domain.joint(view)
    whole = composition_of(context, view)
    if whole.formula is formulas.IDENTITY:
        return facts.largest
    reach = formulas.value_bound(whole.formula, *_range(context, whole.base))
    return min(facts.largest, add_up(reach, facts.error_max))


# --- elementwise functions of one tensor ------------------------------------------------------------------------------


def composition_of(context: Context, view: View) -> Composition:
    """Return a view as a function of another tensor; of itself where no other is known."""
    known = context.compositions.get(view.source)
    if known is None or (view.index < 0).any():
        return Composition(view, formulas.IDENTITY, _EXACT)
    base = known.base.rearranged(known.base.index.ravel()[view.index])
    repeated = mul_up(sqrt_up(float(max(1, view.repetition))), known.local.l2)
    return Composition(base, known.formula, LocalError(repeated, known.local.largest))


def _joined(u: Composition, v: Composition, sign: float | None) -> Formula | None:
    """Return `u + sign v`, or without a sign `u v`, as a function of one tensor; null where they are of several."""
    if identity_of(u.base) != identity_of(v.base):
        return None
    signed = compose("Mul", v.formula, numbers=(-1.0,)) if sign is not None and sign < 0.0 else v.formula
    return None if signed is None else compose("product" if sign is None else "sum", u.formula, signed)


def note_composition(context: Context, node: Operator, inputs: Operands, result: Value) -> None:
    """Record the result of an operator that is an elementwise function of its operand, the same for each element.

    Args:
        context: of this analysis.
        node: the operator.
        inputs: its operands.
        result: the value of its result.
    """
    if node.kind not in _ELEMENTWISE or not isinstance(result, View) or result.source in context.compositions:
        return
    views = [_spread(value, result.shape) for value in inputs if isinstance(value, View)]
    if not result.whole or len(views) > (2 if node.kind in _SUMS else 1):
        return
    parts = [composition_of(context, view) for view in views]
    if len(parts) == 2:
        if result.source.products is not None:
            # Its error is not the sum of those of its operands and its own, see `blocks`.
            return
        u, v = parts
        formula, slope = _joined(u, v, 1.0 if node.kind == "Add" else -1.0), 1.0
    else:
        formula, slope = _elementwise(node, inputs, parts[0].formula)
    if formula is None:
        return
    # The rule of the operator gave at least `slope` times the errors of its operands, and its own: that is the rest.
    before = [context.domain.joint(view) for view in views]
    own = LocalError(
        _rest(result.source.error, slope, [facts.error for facts in before]),
        _rest(result.source.error_max, slope, [facts.error_max for facts in before]),
    )
    local = own
    for part in parts:
        local += part.local.scaled(mul_up(slope, _ABOVE))
    context.compositions[result.source] = Composition(parts[0].base, formula, local)


def _rest(whole: float, slope: float, parts: Sequence[float]) -> float:
    """Return `whole - slope (sum of parts)`, rounded up, and not below 0."""
    for part in parts:
        whole = up(whole - down(slope * part))
    return max(0.0, whole)


_Elementwise = tuple[Formula | None, float]


def _elementwise(node: Operator, inputs: Operands, inner: Formula) -> _Elementwise:
    """Return the formula of an operator with one operand that depends on the image, null where it has no formula, and
    its slope, rounded down, by less than `_ABOVE` tells."""
    match node.kind:
        case "Sigmoid" | "Tanh" | "Erf" | "Softplus":
            return compose(node.kind, inner), {"Sigmoid": 0.25, "Erf": 1.128}.get(node.kind, 1.0)
        case "Neg":
            return compose("Mul", inner, numbers=(-1.0,)), 1.0
        case "Relu":
            return compose("Clip", inner, numbers=(0.0, np.inf)), 1.0
        case "HardSigmoid":
            alpha = node.number("alpha")
            scaled = compose("Mul", inner, numbers=(alpha,))
            shifted = None if scaled is None else compose("sum", scaled, formulas.constant(node.number("beta")))
            return None if shifted is None else compose("Clip", shifted, numbers=(0.0, 1.0)), abs(alpha)
        case "Clip":
            limits = [_number(value) for value in (*inputs[1:], None, None)[:2]]
            low, high = (
                default if limit is None else limit for limit, default in zip(limits, (-np.inf, np.inf), strict=True)
            )
            return compose("Clip", inner, numbers=(low, high)) if low <= high else None, 1.0
        case _:
            return _with_number(node.kind, inputs, inner)


def _with_number(kind: str, inputs: Operands, inner: Formula) -> _Elementwise:
    left, right = inputs
    number = _number(right if isinstance(left, View) else left)
    if number is None:
        return None, 0.0
    if kind == "Mul":
        return compose(kind, inner, numbers=(number,)), abs(number)
    if kind == "Div":
        return compose(kind, inner, numbers=(number,)), down(1.0 / abs(number))
    if kind == "Sub" and isinstance(left, View):
        number = -number
    signed = compose("Mul", inner, numbers=(-1.0,)) if kind == "Sub" and not isinstance(left, View) else inner
    return None if signed is None else compose("sum", signed, formulas.constant(number)), 1.0


def _number(value: Value | None) -> float | None:
    """Return a constant whose entries are all the same number; null where there is no such number."""
    if not isinstance(value, Constant) or value.array.dtype.kind != "f" or value.array.size == 0:
        return None
    first = float(value.array.ravel()[0])
    return first if (value.array == value.array.ravel()[0]).all() else None
