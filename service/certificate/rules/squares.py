"""Roots of sums of squares, as exporters write them out.

A square has no Lipschitz constant, but the L2 norms behind it have: L2 pooling exported as Pow, AveragePool, Mul
and Pow; `sqrt(a x^2 + b y^2 + c)` of a residual; a smooth absolute value. The value of such a node stays a sum of
squares with non-negative weights until its root is taken. Notation as in `table`.

Theorem. `r_p = sqrt(c_p + sum_k w_pk x_k^2)` is the norm of the vector of all `sqrt(w_pk) x_k` and `sqrt(c_p)`, so that
`|r_p(x) - r_p(x')| <= sqrt(sum_k w_pk (x_k - x'_k)^2)` (reverse triangle inequality), and
`||r(x) - r(x')||^2 <= max_k (sum_p w_pk) ||x - x'||^2`.
"""

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from service.certificate.facts import Facts, LocalError
from service.certificate.rounding import FLOAT64, add_up, gamma_up, mul_up, norm_up, sqrt_up
from service.certificate.rules.operands import (
    Array,
    Operands,
    data_operand,
    float_operand,
    limit_size,
)
from service.certificate.rules.pooling import POOL_ATTRIBUTES, pool_windows
from service.certificate.rules.products import product, square
from service.certificate.rules.reductions import REDUCE_ATTRIBUTES, grouped_axes, with_axes
from service.certificate.rules.table import RULES, Context, Rule, RuleEntry, rule
from service.certificate.values import Constant, Squares, SquareTerm, Value, View, identity_of, stand_in
from service.network.operators import Operator, Refusal

_ROUNDINGS_OF_POW = 16
"""A runtime's `pow`, for the exponents 2 and 1/2, is taken to be as accurate as this many roundings."""


def _squared(context: Context, view: View, roundings: int) -> Squares:
    """Return `x * x` of each element, computed with some roundings."""
    facts = context.domain.joint(view)
    largest = mul_up(facts.largest, facts.largest)
    context.no_overflow(largest)
    positions = np.arange(view.index.size).reshape(*view.shape, 1)
    term = SquareTerm(view, positions, np.ones(positions.shape))
    tiny = context.precision.smallest_normal
    return Squares((term,), np.zeros(view.shape), largest, roundings, tiny)


@rule("Pow")
def power(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A square, on its way to a root: see the root for the theorem.

    Args: see `Rule`.

    Raises:
        Refusal: the exponent is neither 1 nor 2.
    """
    view = data_operand(inputs[0])
    exponent = _one_number(inputs[1], "the exponent", len(view.shape))
    if exponent == 1.0:
        return [view]
    if exponent != 2.0:
        raise Refusal(f"a power of {exponent} has no Lipschitz constant; 2 is read, and 1/2 of a sum of squares")
    return [_squared(context, view, _ROUNDINGS_OF_POW)]


@rule("ReduceSumSquare", attributes=REDUCE_ATTRIBUTES)
def reduce_sum_square(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A sum of squares, on its way to a root: see the root for the theorem.

    Args: see `Rule`.
    """
    return _reduced(context, node, [_squared(context, data_operand(inputs[0]), 1), *inputs[1:]], mean=False)


@rule("Sqrt")
def square_root(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Only the root of a sum of squares has a Lipschitz constant.

    Args: see `Rule`.

    Raises:
        Refusal: always; sums of squares have their own rule.
    """
    data_operand(inputs[0])
    raise Refusal("the root of a value that is no sum of squares has no Lipschitz constant")


@rule("Sign")
def sign(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Only as a factor of the sum of squares that it is the sign of.

    Args: see `Rule`.

    Raises:
        Refusal: always; sums of squares have their own rule.
    """
    data_operand(inputs[0])
    raise Refusal("a sign jumps and has no Lipschitz constant")


@rule("LpPool", attributes=(*POOL_ATTRIBUTES, "p"))
def lp_pool(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """L2 norms of windows: sqrt(m)-Lipschitz if a pixel lies in at most m windows.

    Args: see `Rule`.

    Raises:
        Refusal: p is not 2.
    """
    if node.integer("p") != 2:
        raise Refusal("p other than 2 has no proved rule")
    squares = _squared(context, data_operand(inputs[0]), _ROUNDINGS_OF_POW)
    windows, _ = pool_windows(node, squares.constant.shape)
    return [_root(context, _gathered(context, squares, windows, np.ones(windows.shape[:-1])), _ROUNDINGS_OF_POW)]


# --- operators between a square and its root --------------------------------------------------------------------------


def entry_for(node: Operator, inputs: Operands) -> RuleEntry | None:
    """Return the rule of a node that squares its operand or has a sum of squares among its operands; else null."""
    if any(isinstance(value, Squares) for value in inputs):
        return _entry(node.kind, _SQUARES_RULES.get(node.kind, _refuse))
    if node.kind == "Mul" and len(inputs) == 2:
        left, right = inputs
        if isinstance(left, View) and isinstance(right, View) and identity_of(left) == identity_of(right):
            return _entry("Mul", lambda context, node, inputs: [_squared(context, left, 1)])
    return None


def _entry(operator: str, apply: Rule) -> RuleEntry:
    known = RULES.get(operator)
    theorem = (apply.__doc__ or "A sum of squares, on its way to a root.").strip().splitlines()[0]
    return RuleEntry(apply, known.attributes if known is not None else frozenset(), theorem)


def _refuse(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    raise Refusal("a square has no Lipschitz constant, and this operator does not lead to its root")


def _rearrange(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Sums of squares, rearranged as the operator rearranges the positions of a tensor."""
    squares = _sum_of_squares(inputs[0])
    moved = RULES[node.kind].apply(context, node, [stand_in(squares.constant.shape), *inputs[1:]])
    return [_rearranged(squares, view.index) for view in moved if isinstance(view, View)]


def _sum_of_squares(value: Value | None) -> Squares:
    if not isinstance(value, Squares):
        raise Refusal("a square is combined with a value that is no square")
    if value.sign_of is not None:
        raise Refusal("the sign of a sum of squares jumps; it is read only where it multiplies that same sum")
    return value


def _one_number(value: Value | None, name: str, rank: int) -> float:
    """Return a constant that broadcasts to a tensor of `rank` axes beside the batch without a further axis."""
    array = float_operand(value, name)
    if array.size != 1 or array.ndim > rank + 1:
        raise Refusal(f"{name} must be one number")
    return float(array.item())


def _rearranged(squares: Squares, index: NDArray[np.int64]) -> Squares:
    terms = tuple(
        SquareTerm(
            term.view,
            term.positions.reshape(-1, term.positions.shape[-1])[index],
            term.weights.reshape(-1, term.weights.shape[-1])[index],
        )
        for term in squares.terms
    )
    return replace(squares, terms=terms, constant=np.asarray(squares.constant.ravel()[index]))


def _gathered(context: Context, squares: Squares, windows: NDArray[np.int64], weights: Array) -> Squares:
    """Return weighted sums of elements.

    Args:
        context: of this analysis.
        squares: the elements.
        windows: the positions of each sum, `*out x n`; -1 adds nothing.
        weights: of each sum, `*out`.
    """
    n = windows.shape[-1]
    limit_size(*((*windows.shape, term.positions.shape[-1]) for term in squares.terms))
    there = windows >= 0
    picked = np.where(there, windows, 0)
    terms: list[SquareTerm] = []
    for term in squares.terms:
        k = term.positions.shape[-1]
        positions = term.positions.reshape(-1, k)[picked].reshape(*windows.shape[:-1], n * k)
        factors = term.weights.reshape(-1, k)[picked] * (there * weights[..., None])[..., None]
        terms.append(SquareTerm(term.view, positions, factors.reshape(*windows.shape[:-1], n * k)))
    constant = np.where(there, squares.constant.ravel()[picked], 0.0).sum(axis=-1) * weights
    peak = float(np.max(weights))
    _no_underflow(squares, weights)
    largest = mul_up(float(n), squares.largest, max(1.0, mul_up(peak, 1.0 + 2.0**-40)))
    context.no_overflow(largest)
    tiny = context.precision.smallest_normal
    return Squares(
        terms=tuple(terms),
        constant=np.asarray(constant),
        largest=largest,
        # A sum of n, times or divided by a number that is itself rounded.
        roundings=squares.roundings + n + 3,
        underflow=add_up(mul_up(float(n), squares.underflow, max(1.0, peak)), tiny),
    )


def _scaled(context: Context, squares: Squares, factor: Array) -> Squares:
    if not (factor > 0.0).all():
        raise Refusal("a sum of squares times a number that is not positive")
    try:
        factor = np.broadcast_to(factor, squares.constant.shape)
    except ValueError as error:
        raise Refusal("a factor that does not fit the squares") from error
    peak = float(np.max(factor))
    _no_underflow(squares, factor)
    largest = mul_up(squares.largest, peak, 1.0 + 2.0**-40)
    context.no_overflow(largest)
    return Squares(
        terms=tuple(replace(term, weights=term.weights * factor[..., None]) for term in squares.terms),
        constant=squares.constant * factor,
        largest=largest,
        roundings=squares.roundings + 3,
        # Of the product, and of a reciprocal that stands for a division.
        underflow=add_up(
            mul_up(squares.underflow, peak, 1.0 + 2.0**-40),
            mul_up(context.precision.smallest_normal, add_up(1.0, squares.largest)),
        ),
    )


def _no_underflow(squares: Squares, factor: Array) -> None:
    """Refuse weights that could underflow here: one that is lost would be taken for 0."""
    smallest = min(float(np.min(term.weights[term.weights > 0.0], initial=1.0)) for term in squares.terms)
    if smallest * float(np.min(factor, initial=1.0)) < 2.0**-1000:
        raise Refusal("the weights of its squares underflow")


def _multiply(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    left, right = inputs
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Squares) and one.sign_of is not None:
            if one.sign_of is not other:
                raise Refusal("the sign of a sum of squares is multiplied with something else")
            return [one.sign_of]
    if not isinstance(left, Constant) and not isinstance(right, Constant):
        one, other = (square(context, value) if isinstance(value, Squares) else value for value in inputs)
        return [product(context, data_operand(one), data_operand(other))]
    if isinstance(left, Constant):
        left, right = right, left
    return [_scaled(context, _sum_of_squares(left), float_operand(right, "the factor"))]


def _divide(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    divisor = float_operand(inputs[1], "the divisor")
    if not (divisor > 0.0).all():
        raise Refusal("a sum of squares divided by a number that is not positive")
    return [_scaled(context, _sum_of_squares(inputs[0]), 1.0 / divisor)]


def _add(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    left, right = inputs
    if isinstance(left, Constant):
        left, right = right, left
    squares = _sum_of_squares(left)
    shape = squares.constant.shape
    if isinstance(right, Constant):
        offset = _one_number(right, "the addend", len(shape))
        if offset < 0.0:
            raise Refusal("to a sum of squares only a number that is not negative may be added")
        added = np.full(shape, offset)
        terms, roundings, underflow = squares.terms, squares.roundings, squares.underflow
        largest = add_up(squares.largest, offset)
    else:
        other = _sum_of_squares(right)
        if other.constant.shape != shape:
            raise Refusal("sums of squares of different shapes")
        added = other.constant
        terms = (*squares.terms, *other.terms)
        roundings = max(squares.roundings, other.roundings)
        underflow = add_up(squares.underflow, other.underflow)
        largest = add_up(squares.largest, other.largest)
    context.no_overflow(largest)
    underflow = add_up(underflow, context.precision.smallest_normal)
    return [Squares(terms, squares.constant + added, largest, roundings + 2, underflow)]


def _same(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """The identity on numbers that are not negative."""
    return [_sum_of_squares(inputs[0])]


def _sign(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    squares = _sum_of_squares(inputs[0])
    return [replace(squares, sign_of=squares)]


def _reduced(context: Context, node: Operator, inputs: Operands, mean: bool) -> list[Value]:
    squares = _sum_of_squares(inputs[0])
    positions = stand_in(squares.constant.shape)
    grouped, axes, keep = grouped_axes(node, [positions, *inputs[1:]], positions)
    n = grouped.shape[-1]
    gathered = _gathered(context, squares, grouped.index, np.full(grouped.shape[:-1], 1.0 / n if mean else 1.0))
    return [_rearranged(gathered, with_axes(stand_in(gathered.constant.shape), axes, keep).index)]


def _reduced_mean(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    return _reduced(context, node, inputs, mean=True)


def _reduced_sum(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    return _reduced(context, node, inputs, mean=False)


def _average(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    squares = _sum_of_squares(inputs[0])
    if node.kind == "GlobalAveragePool":
        channels = squares.constant.shape[0]
        windows = np.arange(squares.constant.size).reshape(channels, *[1] * (squares.constant.ndim - 1), -1)
        divisors = np.full(windows.shape[:-1], float(windows.shape[-1]))
    else:
        windows, divisors = pool_windows(node, squares.constant.shape)
    return [_gathered(context, squares, windows, 1.0 / divisors)]


def _take_root(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """L2 norms: sqrt(the largest sum of weights on one element) times the bound (reverse triangle inequality)."""
    squares = _sum_of_squares(inputs[0])
    if node.kind != "Pow":
        return [_root(context, squares, 1)]
    if _one_number(inputs[1], "the exponent", squares.constant.ndim) != 0.5:
        raise Refusal("of a sum of squares only the power 1/2 has a Lipschitz constant")
    return [_root(context, squares, _ROUNDINGS_OF_POW)]


def _root(context: Context, squares: Squares, roundings: int) -> View:
    # The weights are stored with a few roundings of float64 each.
    stored = add_up(1.0, gamma_up(2 * squares.roundings + 8, FLOAT64.unit_roundoff))
    lipschitz: list[float] = []
    errors: list[float] = []
    value = squares.constant.copy()
    summands = 1
    for term in squares.terms:
        source = term.view.source
        elements = term.view.index.ravel()[term.positions]
        seen = (elements >= 0) & (term.weights > 0.0)
        uses = int(np.bincount(elements[seen]).max(initial=0))
        columns = np.bincount(elements[seen], weights=term.weights[seen])
        column = mul_up(float(np.max(columns, initial=0.0)), add_up(stored, gamma_up(uses + 2)))
        lipschitz.append(mul_up(sqrt_up(column), source.lipschitz))
        errors.append(mul_up(sqrt_up(column), source.error))
        value += (term.weights * np.square(np.where(seen, source.center.ravel()[elements], 0.0))).sum(axis=-1)
        summands += term.positions.shape[-1]
    center = np.sqrt(value)
    facts = Facts(lipschitz=norm_up(np.array(lipschitz)), error=norm_up(np.array(errors)))
    swing = mul_up(facts.lipschitz, context.domain.radius)
    gamma = context.gamma(squares.roundings + summands + roundings + 4)
    size = add_up(norm_up(center), mul_up(2.0, facts.error), swing)
    tiny = mul_up(4.0, sqrt_up(add_up(squares.underflow, context.precision.smallest_normal)))
    rounding = LocalError(mul_up(2.0, gamma, size))
    underflow = LocalError(mul_up(tiny, math.sqrt(float(center.size)) + 1.0))
    return context.source(center, facts.plus(rounding, underflow))


_SQUARES_RULES: dict[str, Rule] = {
    "Abs": _same,
    "Add": _add,
    "AveragePool": _average,
    "Div": _divide,
    "GlobalAveragePool": _average,
    "Mul": _multiply,
    "Pow": _take_root,
    "ReduceMean": _reduced_mean,
    "ReduceSum": _reduced_sum,
    "Relu": _same,
    "Sign": _sign,
    "Sqrt": _take_root,
    **dict.fromkeys(("Reshape", "Transpose"), _rearrange),
}
"""Operators that may follow a square."""
