"""Products of two tensors that both depend on the image, and functions of one tensor that are made of them.

SiLU is `x sigmoid(x)`, GELU `x (1 + erf(x / sqrt 2)) / 2`, Mish `x tanh(softplus(x))`; a gate multiplies channels. A
product has a Lipschitz constant where its factors are bounded, as they are on the box. Where both factors are the same
tensor under elementwise functions, the largest slope of the product on the range of that tensor is the sharp constant.
Notation as in `table`.
"""

from __future__ import annotations

import numpy as np

from service.certificate import formulas
from service.certificate.facts import Facts, LocalError
from service.certificate.formulas import Formula, compose
from service.certificate.rounding import add_up, down, mul_up, up
from service.certificate.rules.operands import Operands, broadcast_shape
from service.certificate.rules.table import Context
from service.certificate.values import Squares, Value, View, identity_of
from service.network.operators import Constant, Operator, Refusal

_SUMS = ("Add", "Sub")
_ELEMENTWISE = frozenset(
    [*_SUMS, "Clip", "Div", "Erf", "HardSigmoid", "Mul", "Neg", "Relu", "Sigmoid", "Softplus", "Tanh"]
)
COMPOSED = "An elementwise function of one tensor: its largest slope on the range of the tensor (interval arithmetic)."
_PRODUCT = "Product of bounded tensors: |u v - u' v'| <= max|u| |v - v'| + max|v| |u - u'|."


def product(context: Context, left: View, right: View) -> View:
    """Return `u v`, elementwise: `||u v - u' v'|| <= max|u| ||v - v'|| + max|v'| ||u - u'||`, and one rounding.

    The errors of the factors add in the same way, computed values being within the same bounds. Where both factors
    are elementwise functions of one tensor `z`, the Lipschitz bound is also that of `z` times the largest slope of
    their product on the range of `z`.

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
    composed = _composed(context, left, right, None)
    if composed is not None:
        lipschitz = context.smaller(lipschitz, composed_bound(context, *composed), COMPOSED)
    result = Facts(
        lipschitz=lipschitz,
        error=add_up(mul_up(reach, other.error), mul_up(reach_other, one.error)),
        error_max=add_up(mul_up(reach, other.error_max), mul_up(reach_other, one.error_max)),
        norm=min(mul_up(reach, other.norm), mul_up(reach_other, one.norm)),
        largest=mul_up(reach, reach_other),
    )
    center = left.center * right.center
    view = context.source(center, result.plus(context.one_rounding(result, center.size)))
    if composed is not None:
        context.formulas[view.source] = composed
    return view


def composed_sum(context: Context, left: View, right: View, sign: float) -> float:
    """Return the Lipschitz bound of `u + sign v` as a function of one tensor; infinity where it is no better one.

    Args:
        context: of this analysis.
        left: u.
        right: v, of the same shape.
        sign: 1 or -1.
    """
    composed = _composed(context, left, right, sign)
    # Sums of functions without products in them are left to the rules of their operators.
    return composed_bound(context, *composed) if composed is not None and composed[1].curved else np.inf


def composed_bound(context: Context, base: View, formula: Formula) -> float:
    """Return the Lipschitz bound of an elementwise function of a tensor.

    Args:
        context: of this analysis.
        base: the tensor.
        formula: the function.
    """
    slope = formulas.slope_bound(formula, *_range(context, base))
    return mul_up(slope, context.domain.joint(base).lipschitz) if np.isfinite(slope) else np.inf


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
    if (weights == 1.0).all() and whole.source in context.formulas:
        context.formulas[result.source] = context.formulas[whole.source]
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
    base, formula = formula_of(context, view)
    if formula is formulas.IDENTITY:
        return facts.largest
    reach = formulas.value_bound(formula, *_range(context, base))
    return min(facts.largest, add_up(reach, facts.error_max))


# --- elementwise functions of one tensor ------------------------------------------------------------------------------


def formula_of(context: Context, view: View) -> tuple[View, Formula]:
    """Return a tensor and the elementwise function of it that a view is; the view itself where no other is known."""
    known = context.formulas.get(view.source)
    if known is None or (view.index < 0).any():
        return view, formulas.IDENTITY
    base, formula = known
    return base.rearranged(base.index.ravel()[view.index]), formula


def _composed(context: Context, left: View, right: View, sign: float | None) -> tuple[View, Formula] | None:
    """Return `u + sign v`, or without a sign `u v`, as a function of one tensor; null where they are of several."""
    (base, one), (other_base, other) = formula_of(context, left), formula_of(context, right)
    if identity_of(base) != identity_of(other_base):
        return None
    signed = compose("Mul", other, numbers=(-1.0,)) if sign is not None and sign < 0.0 else other
    formula = None if signed is None else compose("product" if sign is None else "sum", one, signed)
    return None if formula is None else (base, formula)


def note_formula(context: Context, node: Operator, inputs: Operands, result: Value) -> None:
    """Record the result of an operator that is an elementwise function of its operand, the same for each element.

    Args:
        context: of this analysis.
        node: the operator.
        inputs: its operands.
        result: the value of its result.
    """
    if node.kind not in _ELEMENTWISE or not isinstance(result, View) or result.source in context.formulas:
        return
    if not result.whole:
        return
    views = [value for value in inputs if isinstance(value, View)]
    composed = None
    if len(views) == 2 and node.kind in _SUMS:
        left, right = (_spread(view, result.shape) for view in views)
        composed = _composed(context, left, right, 1.0 if node.kind == "Add" else -1.0)
    elif len(views) == 1:
        base, inner = formula_of(context, _spread(views[0], result.shape))
        formula = _elementwise(node, inputs, inner)
        composed = None if formula is None else (base, formula)
    if composed is not None:
        context.formulas[result.source] = composed


def _elementwise(node: Operator, inputs: Operands, inner: Formula) -> Formula | None:
    """Return the formula of an operator with one operand that depends on the image; null where it has no formula."""
    match node.kind:
        case "Sigmoid" | "Tanh" | "Erf" | "Softplus":
            return compose(node.kind, inner)
        case "Neg":
            return compose("Mul", inner, numbers=(-1.0,))
        case "Relu":
            return compose("Clip", inner, numbers=(0.0, np.inf))
        case "HardSigmoid":
            scaled = compose("Mul", inner, numbers=(node.number("alpha"),))
            shifted = None if scaled is None else compose("sum", scaled, formulas.constant(node.number("beta")))
            return None if shifted is None else compose("Clip", shifted, numbers=(0.0, 1.0))
        case "Clip":
            limits = [_number(value) for value in (*inputs[1:], None, None)[:2]]
            low, high = (
                default if limit is None else limit for limit, default in zip(limits, (-np.inf, np.inf), strict=True)
            )
            return compose("Clip", inner, numbers=(low, high)) if low <= high else None
        case "Add" | "Sub" | "Mul" | "Div":
            return _with_number(node.kind, inputs, inner)
        case _:
            return None


def _with_number(kind: str, inputs: Operands, inner: Formula) -> Formula | None:
    left, right = inputs
    number = _number(right if isinstance(left, View) else left)
    if number is None:
        return None
    if kind in ("Mul", "Div"):
        return compose(kind, inner, numbers=(number,))
    if kind == "Sub" and isinstance(left, View):
        number = -number
    signed = compose("Mul", inner, numbers=(-1.0,)) if kind == "Sub" and not isinstance(left, View) else inner
    return None if signed is None else compose("sum", signed, formulas.constant(number))


def _number(value: Value | None) -> float | None:
    """Return a constant whose entries are all the same number; null where there is no such number."""
    if not isinstance(value, Constant) or value.array.dtype.kind != "f" or value.array.size == 0:
        return None
    first = float(value.array.ravel()[0])
    return first if (value.array == value.array.ravel()[0]).all() else None
