"""One rule per ONNX operator: what it does to the Lipschitz bound and to the rounding error.

Every rule states its theorem. An operator, attribute, mode or operand without a proved rule is refused. Throughout,
`x` is the exact input of the operator, `x^` the computed one with `||x^ - x||_2 <= e`, `u` the unit roundoff of the
graph's format, `gamma_n = n u / (1 - n u)`. A sum of products of n terms, biases included, is off by at most
`gamma_n sum |w| |x^|` in any order, with or without fused multiply-add (Higham 2002, section 3.1). Underflow,
flush-to-zero included, adds at most the smallest normal number for each operation; overflow is excluded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.certificate.graph import Node
from service.certificate.norms import absolute_norm_bound, row_norms_up, spectral_norm_bound
from service.certificate.rounding import Precision, add_up, div_up, gamma_up, mul_up, norm_up, sqrt_up
from service.certificate.values import Affine, Constant, Domain, Facts, Source, Unknown, Value, View

Array = NDArray[np.float64]


class Refusal(Exception):
    """Why one node has no proved rule."""


@dataclass
class Context:
    """What the rules share during the analysis of one graph."""

    domain: Domain
    precision: Precision
    batch: int
    """The batch size that shapes are computed with."""
    sorted_pairs: dict[frozenset[tuple[int, bytes]], Source] = field(
        default_factory=dict[frozenset[tuple[int, bytes]], Source]
    )

    def gamma(self, n: int) -> float:
        try:
            return gamma_up(n, self.precision.unit_roundoff)
        except ValueError as error:
            raise Refusal(str(error)) from error

    def no_overflow(self, bound: float) -> None:
        """Raises Refusal unless every intermediate result of size `bound` stays far below overflow."""
        if not bound < self.precision.largest / 4.0:
            raise Refusal(f"overflow cannot be excluded: intermediate values may reach {bound:.3g}")

    def source(
        self,
        computed: Array | np.float64,
        lipschitz: float,
        error: float,
        error_max: float | None = None,
        affine: Affine | None = None,
    ) -> View:
        """A new source with the value `computed` at the centre of the box, seen whole."""
        # Arithmetic on arrays without axes gives numpy scalars.
        center = np.asarray(computed, dtype=np.float64)
        if not (np.isfinite(center).all() and math.isfinite(lipschitz) and math.isfinite(error)):
            raise Refusal("its bounds are not finite")
        made = Source(center, lipschitz, error, min(error, error_max if error_max is not None else error), affine)
        return View(made, np.arange(center.size).reshape(center.shape))


Rule = Callable[[Context, Node, Sequence[Value]], list[Value]]


@dataclass(frozen=True)
class RuleEntry:
    """A rule and the attributes that it reads; any other attribute is refused."""

    apply: Rule
    attributes: frozenset[str]
    theorem: str


RULES: dict[str, RuleEntry] = {}


def rule(*operators: str, attributes: Sequence[str] = ()) -> Callable[[Rule], Rule]:
    """Register a rule; the first line of its docstring is the theorem that reports quote."""

    def register(function: Rule) -> Rule:
        theorem = (function.__doc__ or "").strip().splitlines()[0]
        for operator in operators:
            RULES[operator] = RuleEntry(function, frozenset(attributes), theorem)
        return function

    return register


# --- reading operands -------------------------------------------------------------------------------------------------


def _data(value: Value, what: str = "its input") -> View:
    if isinstance(value, View):
        return value
    raise Refusal(f"{what} must depend on the image")


def _floats(value: Value, what: str) -> Array:
    """A constant operand as the exact float64 numbers that it holds."""
    if not isinstance(value, Constant) or value.depends_on_batch:
        raise Refusal(f"{what} must be a constant")
    if value.array.dtype.kind != "f":
        raise Refusal(f"{what} must hold floating-point numbers")
    return value.array.astype(np.float64)


def _integers(value: Value, what: str) -> list[int]:
    if not isinstance(value, Constant) or value.array.dtype.kind not in "iu":
        raise Refusal(f"{what} must be constant integers")
    return [int(entry) for entry in value.array.ravel()]


def _operand(inputs: Sequence[Value], position: int) -> Value | None:
    return inputs[position] if position < len(inputs) else None


def _attribute_int(node: Node, name: str, default: int) -> int:
    value = node.attributes.get(name, default)
    if not isinstance(value, int):
        raise Refusal(f"attribute {name} must be an integer")
    return value


def _attribute_float(node: Node, name: str, default: float) -> float:
    value = node.attributes.get(name, default)
    if not isinstance(value, (int, float)):
        raise Refusal(f"attribute {name} must be a number")
    return float(value)


def _image_axis(axis: int, view: View) -> int:
    """An ONNX axis, which counts the batch, as an axis of the image's own shape."""
    rank = len(view.shape) + 1
    if not -rank <= axis < rank:
        raise Refusal(f"axis {axis} is outside of the {rank} axes")
    axis %= rank
    if axis == 0:
        raise Refusal("it works along the batch axis and would mix images")
    return axis - 1


def _spread_constant(constant: Array, view: View) -> tuple[Array, View]:
    """Numpy broadcasting of a constant against the image's own axes; a view may repeat its elements."""
    rank = len(view.shape)
    if constant.ndim == rank + 1:
        if constant.shape[0] != 1:
            raise Refusal("a constant has its own batch axis")
        constant = constant[0]
    if constant.ndim > rank:
        raise Refusal("a constant has more axes than the image's tensor")
    try:
        shape = np.broadcast_shapes(constant.shape, view.shape)
    except ValueError as error:
        raise Refusal(f"shapes {constant.shape} and {view.shape} do not broadcast") from error
    spread = view if shape == view.shape else view.rearranged(np.broadcast_to(view.index, shape))
    return np.broadcast_to(constant, shape), spread


def _rounded(context: Context, facts: Facts, view_size: int) -> tuple[float, float]:
    """Error, in L2 and of a component, that one rounding per element adds to values bounded by `facts`.

    Counted twice: the centre, from which `facts` may come, is rounded as well.
    """
    unit, tiny = 2.0 * context.precision.unit_roundoff, context.precision.smallest_normal
    in_l2 = add_up(mul_up(unit, add_up(facts.norm, facts.error)), mul_up(sqrt_up(float(view_size)), tiny))
    return in_l2, add_up(mul_up(unit, facts.largest), tiny)


# --- linear operators -------------------------------------------------------------------------------------------------


def _dense(context: Context, view: View, weight_NM: Array, bias_M: Array | None, roundings: int = 0) -> View:
    """`y = x W + b` along the last axis of `x`, for every position of the other axes.

    Lipschitz: `||W||_2`, since the positions are disjoint. Rounding: with n terms, one bias and `roundings` more,
    `||y^ - y|| <= ||W|| e + gamma_{n+1+r} (|| |W| || ||x^|| + ||b||)`, each component with the norm of its own column.
    """
    n, m = weight_NM.shape
    if view.shape[-1:] != (n,):
        raise Refusal(f"the weight has {n} rows but the tensor ends with {view.shape[-1:]}")
    if m == 0 or n == 0:
        raise Refusal("the weight is empty")
    facts = context.domain.joint(view)
    norm = spectral_norm_bound(weight_NM)
    spread = absolute_norm_bound(weight_NM)
    column_norm = float(np.max(row_norms_up(weight_NM.T)))
    center = view.center @ weight_NM
    bias_norm, bias_peak = 0.0, 0.0
    if bias_M is not None:
        center = center + bias_M
        bias_norm = norm_up(np.broadcast_to(bias_M, center.shape))
        bias_peak = float(np.max(np.abs(bias_M)))
    computed_norm = add_up(facts.norm, facts.error)
    context.no_overflow(add_up(mul_up(column_norm, computed_norm), bias_peak))
    gamma = context.gamma(n + 1 + roundings)
    tiny = context.precision.smallest_normal
    underflow = mul_up(4.0 * (n + 2 + roundings), tiny, add_up(1.0, facts.largest, float(np.max(np.abs(weight_NM)))))
    error = add_up(
        mul_up(norm, facts.error),
        mul_up(gamma, add_up(mul_up(spread, computed_norm), bias_norm)),
        mul_up(underflow, sqrt_up(float(center.size))),
    )
    error_max = add_up(
        mul_up(column_norm, facts.error),
        mul_up(gamma, add_up(mul_up(column_norm, computed_norm), bias_peak)),
        underflow,
    )
    affine = Affine(weight_NM.T, facts.lipschitz) if center.ndim == 1 else None
    return context.source(center, mul_up(norm, facts.lipschitz), error, error_max, affine)


@rule("Gemm", attributes=("alpha", "beta", "transA", "transB"))
def gemm(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Dense layer: ||W x - W x'|| <= ||W||_2 ||x - x'||, with a proved bound of the spectral norm."""
    view = _data(inputs[0], "the first operand")
    if _attribute_int(node, "transA", 0) != 0:
        raise Refusal("transA=1 would contract the batch axis")
    weight = _floats(inputs[1], "the weight")
    if len(view.shape) != 1 or weight.ndim != 2:
        raise Refusal("Gemm needs a flat tensor N x n and a weight matrix")
    if _attribute_int(node, "transB", 0):
        weight = weight.T
    alpha, beta = _attribute_float(node, "alpha", 1.0), _attribute_float(node, "beta", 1.0)
    if alpha != 1.0 or beta != 1.0:
        raise Refusal("alpha and beta other than 1: fold them into the weights")
    bias: Array | None = None
    bias_value = _operand(inputs, 2)
    if bias_value is not None:
        given = _floats(bias_value, "the bias")
        if given.ndim == 2 and given.shape[0] == 1:
            given = given[0]
        if given.shape not in ((), (1,), (weight.shape[1],)):
            raise Refusal(f"a bias of shape {given.shape} does not fit {weight.shape[1]} outputs")
        bias = np.broadcast_to(given, (weight.shape[1],))
    return [_dense(context, view, weight, bias)]


@rule("MatMul")
def matmul(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Matrix product with a constant: block-diagonal in the other axes, so its norm is ||W||_2."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        raise Refusal("a product of two tensors that both depend on the image has no Lipschitz constant")
    if isinstance(left, View):
        weight = _floats(right, "the right operand")
        if weight.ndim != 2:
            raise Refusal("the constant operand must be a matrix")
        return [_dense(context, left, weight, None)]
    view = _data(right, "one operand")
    weight = _floats(left, "the left operand")
    if weight.ndim != 2 or len(view.shape) < 2:
        raise Refusal("a constant left operand must be a matrix, and the tensor N x ... x n x P")
    turned = _dense(context, view.rearranged(np.swapaxes(view.index, -1, -2)), weight.T, None)
    return [turned.rearranged(np.swapaxes(turned.index, -1, -2))]


def _shifted(context: Context, view: View, constant: Array, sign: float) -> View:
    """`sign * x + constant`: Lipschitz unchanged; one rounding of each result."""
    constant, view = _spread_constant(constant, view)
    facts = context.domain.joint(view)
    center = sign * view.center + constant
    after = Facts(
        facts.lipschitz,
        facts.error,
        add_up(norm_up(center), facts.error, mul_up(facts.lipschitz, context.domain.radius)),
        add_up(facts.largest, float(np.max(np.abs(constant), initial=0.0))),
    )
    context.no_overflow(after.largest)
    rounding, rounding_max = _rounded(context, after, center.size)
    error_max = add_up(view.source.error_max, rounding_max)
    source = view.source
    affine = None
    if source.affine is not None and center.ndim == 1 and (view.index >= 0).all():
        affine = Affine(sign * source.affine.rows[view.index], source.affine.lipschitz)
    return context.source(center, facts.lipschitz, add_up(facts.error, rounding), error_max, affine)


def _sum_of_branches(context: Context, left: View, right: View, sign: float) -> View:
    """`x + y` of two branches: the Lipschitz bounds add (triangle inequality); one rounding of each result."""
    if len(left.shape) != len(right.shape):
        raise Refusal(f"tensors of shapes {left.shape} and {right.shape} would broadcast across the batch")
    try:
        shape = np.broadcast_shapes(left.shape, right.shape)
    except ValueError as error:
        raise Refusal(f"shapes {left.shape} and {right.shape} do not broadcast") from error
    left = left.rearranged(np.broadcast_to(left.index, shape))
    right = right.rearranged(np.broadcast_to(right.index, shape))
    one, other = context.domain.joint(left), context.domain.joint(right)
    both = Facts(
        add_up(one.lipschitz, other.lipschitz),
        add_up(one.error, other.error),
        add_up(one.norm, other.norm),
        add_up(one.largest, other.largest),
    )
    context.no_overflow(both.largest)
    rounding, rounding_max = _rounded(context, both, left.index.size)
    return context.source(
        left.center + sign * right.center,
        both.lipschitz,
        add_up(both.error, rounding),
        add_up(left.source.error_max, right.source.error_max, rounding_max),
    )


@rule("Add")
def add(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Sum: a constant changes no distance; the bounds of two branches add (triangle inequality)."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [_sum_of_branches(context, left, right, 1.0)]
    if isinstance(left, View):
        return [_shifted(context, left, _floats(right, "the addend"), 1.0)]
    return [_shifted(context, _data(right), _floats(left, "the addend"), 1.0)]


@rule("Sub")
def subtract(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Difference: a constant changes no distance; the bounds of two branches add (triangle inequality)."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        return [_sum_of_branches(context, left, right, -1.0)]
    if isinstance(left, View):
        return [_shifted(context, left, -_floats(right, "the subtrahend"), 1.0)]
    return [_shifted(context, _data(right), _floats(left, "the minuend"), -1.0)]


def _scaled(context: Context, view: View, constant: Array, divide: bool) -> View:
    """A diagonal map: its norm is the largest factor. One rounding of each result."""
    constant, view = _spread_constant(constant, view)
    facts = context.domain.joint(view)
    magnitude = np.abs(constant)
    if divide:
        smallest = float(np.min(magnitude))
        if smallest == 0.0:
            raise Refusal("it divides by zero")
        factor = div_up(1.0, smallest) if smallest != 1.0 else 1.0
        center = view.center / constant
    else:
        factor = float(np.max(magnitude))
        center = view.center * constant
    after = Facts(
        mul_up(factor, facts.lipschitz),
        mul_up(factor, facts.error),
        mul_up(factor, facts.norm),
        mul_up(factor, facts.largest),
    )
    context.no_overflow(after.largest)
    rounding, rounding_max = _rounded(context, after, center.size)
    if divide:
        # A runtime may multiply by a rounded reciprocal: two roundings instead of one.
        rounding, rounding_max = mul_up(2.0, rounding), mul_up(2.0, rounding_max)
    affine = None
    inner = view.source.affine
    if inner is not None and center.ndim == 1 and (view.index >= 0).all() and np.ptp(magnitude) == 0.0:
        # |c| moves into the Lipschitz bound: scaled rows would be rounded, and their differences no longer proved.
        signs = np.sign(constant)[:, None]
        affine = Affine(signs * inner.rows[view.index], mul_up(factor, inner.lipschitz))
    return context.source(
        center,
        after.lipschitz,
        add_up(after.error, rounding),
        add_up(mul_up(factor, view.source.error_max), rounding_max),
        affine,
    )


@rule("Mul")
def multiply(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Product with a constant: a diagonal map, whose norm is the largest absolute factor."""
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        raise Refusal("a product of two tensors that both depend on the image has no Lipschitz constant")
    if isinstance(left, View):
        return [_scaled(context, left, _floats(right, "the factor"), divide=False)]
    return [_scaled(context, _data(right), _floats(left, "the factor"), divide=False)]


@rule("Div")
def divide(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Quotient by a constant: a diagonal map, whose norm is 1 / the smallest absolute divisor."""
    if not isinstance(inputs[0], View) or isinstance(inputs[1], View):
        raise Refusal("a quotient by a tensor that depends on the image has no Lipschitz constant")
    return [_scaled(context, inputs[0], _floats(inputs[1], "the divisor"), divide=True)]


def _reduced_axes(node: Node, inputs: Sequence[Value], view: View) -> tuple[tuple[int, ...], bool]:
    """Axes (of the image's own shape) and whether they are kept."""
    axes_value = _operand(inputs, 1)
    attribute = node.attributes.get("axes")
    if axes_value is not None:
        axes = _integers(axes_value, "the axes")
    elif isinstance(attribute, (list, tuple)):
        axes = [int(axis) for axis in attribute]  # type: ignore[reportUnknownVariableType]
    else:
        axes = []
    if not axes:
        raise Refusal("it names no axes, so that it would reduce the batch too")
    resolved = tuple(sorted({_image_axis(axis, view) for axis in axes}))
    return resolved, bool(_attribute_int(node, "keepdims", 1))


def _grouped(view: View, axes: tuple[int, ...]) -> View:
    """The view with the reduced axes moved to the end and made one."""
    kept = [axis for axis in range(len(view.shape)) if axis not in axes]
    moved = np.transpose(view.index, kept + list(axes))
    return view.rearranged(moved.reshape([view.shape[axis] for axis in kept] + [-1]))


def _with_axes(view: View, axes: tuple[int, ...], keep: bool) -> View:
    return view.rearranged(np.expand_dims(view.index, axes)) if keep else view


_REDUCE_ATTRIBUTES = ("axes", "keepdims", "noop_with_empty_axes")


@rule("ReduceSum", "ReduceMean", attributes=_REDUCE_ATTRIBUTES)
def reduce_linear(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Sum over disjoint groups of n: norm sqrt(n) (Cauchy-Schwarz); the mean: 1 / sqrt(n)."""
    view = _data(inputs[0])
    axes, keep = _reduced_axes(node, inputs, view)
    grouped = _grouped(view, axes)
    n = grouped.shape[-1]
    facts = context.domain.joint(grouped)
    mean = node.operator == "ReduceMean"
    root = sqrt_up(float(n))
    # 1 / sqrt(n) rounded up: 1 over a lower bound of the root.
    norm = (div_up(root, float(n)) if n > 1 else 1.0) if mean else root
    center = grouped.center.mean(axis=-1) if mean else grouped.center.sum(axis=-1)
    context.no_overflow(mul_up(float(n), facts.largest))
    gamma = context.gamma(n + 1)
    tiny = mul_up(2.0 * (n + 1), context.precision.smallest_normal)
    rounding = mul_up(gamma, norm, add_up(facts.norm, facts.error))
    error = add_up(mul_up(norm, facts.error), rounding, mul_up(tiny, sqrt_up(float(center.size))))
    result = context.source(center, mul_up(norm, facts.lipschitz), error)
    return [_with_axes(result, axes, keep)]


# --- nonlinear operators that never expand ----------------------------------------------------------------------------


@rule("ReduceL2", attributes=_REDUCE_ATTRIBUTES)
def reduce_l2(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """L2 norm of disjoint groups: 1-Lipschitz (reverse triangle inequality in each group)."""
    view = _data(inputs[0])
    axes, keep = _reduced_axes(node, inputs, view)
    grouped = _grouped(view, axes)
    n = grouped.shape[-1]
    facts = context.domain.joint(grouped)
    context.no_overflow(mul_up(float(n), facts.largest, facts.largest))
    center = np.sqrt(np.square(grouped.center).sum(axis=-1))
    # A relative gamma_{n+2} (squares, sum, root); squares that underflow shift the root by at most sqrt(n tiny).
    tiny = sqrt_up(mul_up(2.0 * (n + 1), context.precision.smallest_normal))
    rounding = mul_up(context.gamma(n + 2), add_up(facts.norm, facts.error))
    error = add_up(facts.error, rounding, mul_up(tiny, sqrt_up(float(center.size))))
    return [_with_axes(context.source(center, facts.lipschitz, error), axes, keep)]


def _sorted_pair(context: Context, left: View, right: View) -> Source:
    """`(a, b) -> (max(a, b), min(a, b))`, elementwise: 1-Lipschitz as one map, and exact.

    Both of its halves, however the graph computes them, are views of this one source, so that their concatenation
    costs what the pair costs, not sqrt(2) of it.
    """
    key = frozenset({_identity(left), _identity(right)})
    if key not in context.sorted_pairs:
        facts = context.domain.joint(left, right)
        center = np.stack([np.maximum(left.center, right.center), np.minimum(left.center, right.center)])
        error_max = max(left.source.error_max, right.source.error_max)
        context.sorted_pairs[key] = context.source(center, facts.lipschitz, facts.error, error_max).source
    return context.sorted_pairs[key]


def _identity(view: View) -> tuple[int, bytes]:
    return id(view.source), view.index.tobytes()


def _half(source: Source, which: int) -> View:
    size = source.center[0].size
    return View(source, np.arange(which * size, (which + 1) * size).reshape(source.center.shape[1:]))


@rule("Max", "Min")
def max_min(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Sorting a pair never expands (rearrangement inequality); max and min are its two halves. Exact."""
    if len(inputs) != 2:
        raise Refusal(f"{len(inputs)} operands; the rule covers two")
    left, right = inputs[0], inputs[1]
    if isinstance(left, View) and isinstance(right, View):
        if left.shape != right.shape:
            raise Refusal(f"tensors of shapes {left.shape} and {right.shape}; the rule covers equal shapes")
        if _identity(left) == _identity(right):
            return [left]
        return [_half(_sorted_pair(context, left, right), 0 if node.operator == "Max" else 1)]
    view = _data(left if isinstance(left, View) else right)
    constant = _floats(right if isinstance(left, View) else left, "the other operand")
    constant, view = _spread_constant(constant, view)
    clip = np.maximum if node.operator == "Max" else np.minimum
    facts = context.domain.joint(view)
    return [context.source(clip(view.center, constant), facts.lipschitz, facts.error, view.source.error_max)]


@rule("ReduceMax", "ReduceMin", attributes=_REDUCE_ATTRIBUTES)
def reduce_max(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Largest (smallest) of disjoint groups: 1-Lipschitz, and exact; of pairs: half of the sorted pair."""
    view = _data(inputs[0])
    axes, keep = _reduced_axes(node, inputs, view)
    grouped = _grouped(view, axes)
    largest = node.operator == "ReduceMax"
    if grouped.shape[-1] == 2:
        left, right = (grouped.rearranged(grouped.index[..., half]) for half in (0, 1))
        return [_with_axes(_half(_sorted_pair(context, left, right), 0 if largest else 1), axes, keep)]
    facts = context.domain.joint(grouped)
    center = grouped.center.max(axis=-1) if largest else grouped.center.min(axis=-1)
    return [_with_axes(context.source(center, facts.lipschitz, facts.error, view.source.error_max), axes, keep)]


@rule("TopK", attributes=("axis", "largest", "sorted"))
def top_k(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Sorting never expands (rearrangement inequality), nor does keeping the first k of the result. Exact."""
    view = _data(inputs[0])
    (k,) = _integers(inputs[1], "k")
    axis = _image_axis(_attribute_int(node, "axis", -1), view)
    if not _attribute_int(node, "sorted", 1):
        raise Refusal("sorted=0 leaves the order open")
    facts = context.domain.joint(view)
    ordered = np.sort(view.center, axis=axis)
    if _attribute_int(node, "largest", 1):
        ordered = np.flip(ordered, axis=axis)
    kept = np.take(ordered, np.arange(k), axis=axis)
    values = context.source(kept, facts.lipschitz, facts.error, view.source.error_max)
    return [values, Unknown("the indices of a sort jump and have no Lipschitz constant")]


@rule("Relu", "Abs")
def relu_abs(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Elementwise of slope at most 1: 1-Lipschitz, and exact."""
    view = _data(inputs[0])
    facts = context.domain.joint(view)
    center = np.maximum(view.center, 0.0) if node.operator == "Relu" else np.abs(view.center)
    return [context.source(center, facts.lipschitz, facts.error, view.source.error_max)]


@rule("LeakyRelu", attributes=("alpha",))
def leaky_relu(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Elementwise of slopes 1 and alpha: max(1, |alpha|)-Lipschitz; one rounding of the negative side."""
    view = _data(inputs[0])
    alpha = _attribute_float(node, "alpha", 0.01)
    factor = max(1.0, abs(alpha))
    facts = context.domain.joint(view)
    scaled = Facts(
        mul_up(factor, facts.lipschitz),
        mul_up(factor, facts.error),
        mul_up(factor, facts.norm),
        mul_up(factor, facts.largest),
    )
    context.no_overflow(scaled.largest)
    rounding, _ = _rounded(context, scaled, view.index.size)
    center = np.where(view.center >= 0.0, view.center, alpha * view.center)
    return [context.source(center, scaled.lipschitz, add_up(scaled.error, rounding))]


@rule("Neg")
def negate(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Change of sign: an isometry, and exact."""
    view = _data(inputs[0])
    facts = context.domain.joint(view)
    return [context.source(-view.center, facts.lipschitz, facts.error, view.source.error_max)]


@rule("Clip")
def clip(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Projection on an interval: 1-Lipschitz, and exact."""
    view = _data(inputs[0])
    low_value, high_value = _operand(inputs, 1), _operand(inputs, 2)
    low = float(_floats(low_value, "the lower limit").reshape(())) if low_value is not None else -math.inf
    high = float(_floats(high_value, "the upper limit").reshape(())) if high_value is not None else math.inf
    facts = context.domain.joint(view)
    center = np.minimum(np.maximum(view.center, low), high)
    return [context.source(center, facts.lipschitz, facts.error, view.source.error_max)]


# --- rearrangements: nothing is computed ------------------------------------------------------------------------------


@rule("Identity", "Dropout", attributes=("seed",))
def identity(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """The identity (Dropout: its inference form)."""
    mode = _operand(inputs, 2)
    if mode is not None and not (isinstance(mode, Constant) and not mode.array.any()):
        raise Refusal("training_mode must be a constant false")
    return [_data(inputs[0]), Unknown("the mask of Dropout")]


@rule("Cast", attributes=("to", "saturate", "round_mode"))
def cast(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A cast to the graph's own format is the identity."""
    view = _data(inputs[0])
    wanted = {"float64": 11, "float32": 1}[context.precision.name]
    if _attribute_int(node, "to", 0) != wanted:
        raise Refusal(f"a cast of data away from {context.precision.name}: the analysis covers one format per graph")
    return [view]


@rule("Flatten", attributes=("axis",))
def flatten(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = _data(inputs[0])
    if _attribute_int(node, "axis", 1) % (len(view.shape) + 1) != 1:
        raise Refusal("axis other than 1 would mix images")
    return [view.rearranged(view.index.reshape(-1))]


@rule("Reshape", attributes=("allowzero",))
def reshape(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry."""
    view = _data(inputs[0])
    target = _integers(inputs[1], "the new shape")
    old = (context.batch, *view.shape)
    if not _attribute_int(node, "allowzero", 0):
        if any(size == 0 and position >= len(old) for position, size in enumerate(target)):
            raise Refusal(f"the new shape {target} copies an axis that is not there")
        target = [old[position] if size == 0 else size for position, size in enumerate(target)]
    known = math.prod(size for size in target if size != -1)
    total = math.prod(old)
    if target.count(-1) == 1 and known > 0 and total % known == 0:
        target[target.index(-1)] = total // known
    if math.prod(target) != total or target[0] != context.batch:
        raise Refusal("the new shape does not keep the batch axis: give it as 0 or -1 and the rest as numbers")
    return [view.rearranged(view.index.reshape(target[1:]))]


@rule("Transpose", attributes=("perm",))
def transpose(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry."""
    view = _data(inputs[0])
    permutation = node.attributes.get("perm")
    if not isinstance(permutation, (list, tuple)) or not permutation or permutation[0] != 0:
        raise Refusal("it moves the batch axis")
    return [view.rearranged(np.transpose(view.index, [int(axis) - 1 for axis in permutation[1:]]))]  # type: ignore[reportUnknownVariableType]


@rule("Squeeze")
def squeeze(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = _data(inputs[0])
    if len(inputs) < 2:
        raise Refusal("it names no axes: a batch of one would be squeezed away")
    axes = tuple(_image_axis(axis, view) for axis in _integers(inputs[1], "the axes"))
    if any(view.shape[axis] != 1 for axis in axes):
        raise Refusal("it squeezes an axis longer than 1")
    return [view.rearranged(np.squeeze(view.index, axes))]


@rule("Unsqueeze")
def unsqueeze(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = _data(inputs[0])
    axes = _integers(inputs[1], "the axes")
    rank = len(view.shape) + 1 + len(axes)
    resolved = sorted(axis % rank for axis in axes)
    if resolved and resolved[0] == 0:
        raise Refusal("it puts an axis before the batch")
    return [view.rearranged(np.expand_dims(view.index, tuple(axis - 1 for axis in resolved)))]


@rule("Split", attributes=("axis", "num_outputs"))
def split(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Disjoint parts of one tensor: together they cost what it costs."""
    view = _data(inputs[0])
    axis = _image_axis(_attribute_int(node, "axis", 0), view)
    length = view.shape[axis]
    sizes_value = _operand(inputs, 1)
    if sizes_value is not None:
        sizes = _integers(sizes_value, "the sizes")
    else:
        parts = _attribute_int(node, "num_outputs", len(node.outputs))
        chunk = -(-length // parts)
        sizes = [min(chunk, length - start) for start in range(0, length, chunk)]
    if sum(sizes) != length or len(sizes) != len(node.outputs):
        raise Refusal(f"sizes {sizes} do not split an axis of {length} into {len(node.outputs)}")
    bounds = np.cumsum(sizes)[:-1]
    return [view.rearranged(part) for part in np.split(view.index, bounds, axis=axis)]


@rule("Slice")
def slice_(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A part of a tensor, each element at most once: never expands."""
    view = _data(inputs[0])
    starts, ends = _integers(inputs[1], "starts"), _integers(inputs[2], "ends")
    axes_value, steps_value = _operand(inputs, 3), _operand(inputs, 4)
    axes = _integers(axes_value, "axes") if axes_value is not None else list(range(len(starts)))
    steps = _integers(steps_value, "steps") if steps_value is not None else [1] * len(starts)
    index = view.index
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        position = _image_axis(axis, view)
        length = index.shape[position]
        # ONNX counts a negative end past the front once; numpy's slice needs None there.
        stop = (None if end < -length else end) if step <= 0 else min(end, length)
        index = index[(slice(None),) * position + (slice(start, stop, step),)]
    if index.size == 0:
        raise Refusal("nothing is left of the tensor")
    return [view.rearranged(index)]


@rule("Gather", attributes=("axis",))
def gather(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Elements picked by constant positions: an element used m times counts sqrt(m)."""
    view = _data(inputs[0])
    if not isinstance(inputs[1], Constant) or inputs[1].array.dtype.kind not in "iu":
        raise Refusal("the positions must be constant integers")
    axis = _image_axis(_attribute_int(node, "axis", 0), view)
    positions = inputs[1].array.astype(np.int64)
    length = view.shape[axis]
    if ((positions < -length) | (positions >= length)).any():
        raise Refusal(f"positions outside of an axis of {length}")
    return [view.rearranged(np.take(view.index, positions % length, axis=axis))]


@rule("Concat", attributes=("axis",))
def concat(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Stacked branches: parts of one tensor count together, different tensors add in squares."""
    views = [_data(value, "every operand") for value in inputs]
    axis = _image_axis(_attribute_int(node, "axis", 0), views[0])
    if all(view.source is views[0].source for view in views):
        return [views[0].rearranged(np.concatenate([view.index for view in views], axis=axis))]
    facts = context.domain.joint(*views)
    center = np.concatenate([view.center for view in views], axis=axis)
    error_max = max(view.source.error_max for view in views)
    return [context.source(center, facts.lipschitz, facts.error, error_max)]


@rule("Pad", attributes=("mode",))
def pad(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """Zeros cost nothing; an element that reflect, edge or wrap padding repeats m times counts sqrt(m)."""
    view = _data(inputs[0])
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Refusal(f"mode {mode!r} has no proved rule")
    value = _operand(inputs, 2)
    if value is not None and _floats(value, "the padding value").any():
        raise Refusal("a padding value other than 0")
    pads = _integers(inputs[1], "the pads")
    rank = len(view.shape) + 1
    axes_value = _operand(inputs, 3)
    axes = _integers(axes_value, "the axes") if axes_value is not None else list(range(rank))
    before, after = pads[: len(axes)], pads[len(axes) :]
    widths = [(0, 0)] * len(view.shape)
    for axis, low, high in zip(axes, before, after, strict=True):
        if low < 0 or high < 0:
            raise Refusal("negative pads; use Slice")
        if axis % rank == 0:
            if low or high:
                raise Refusal("it pads the batch axis")
            continue
        widths[_image_axis(axis, view)] = (low, high)
    if mode == "constant":
        return [view.rearranged(np.pad(view.index, widths, mode="constant", constant_values=-1))]
    return [view.rearranged(np.pad(view.index, widths, mode=mode))]  # type: ignore[reportCallIssue, reportArgumentType]


@rule("SpaceToDepth", attributes=("blocksize",))
def space_to_depth(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = _data(inputs[0])
    block = _attribute_int(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or height % block or width % block:
        raise Refusal(f"a blocksize of {block} does not divide {height} x {width}")
    split_up = view.index.reshape(channels, height // block, block, width // block, block)
    return [view.rearranged(split_up.transpose(2, 4, 0, 1, 3).reshape(-1, height // block, width // block))]


@rule("DepthToSpace", attributes=("blocksize", "mode"))
def depth_to_space(context: Context, node: Node, inputs: Sequence[Value]) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = _data(inputs[0])
    block = _attribute_int(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or channels % (block * block):
        raise Refusal(f"a blocksize of {block} does not divide {channels} channels")
    depth = channels // (block * block)
    if node.attributes.get("mode", "DCR") == "DCR":
        moved = view.index.reshape(block, block, depth, height, width).transpose(2, 3, 0, 4, 1)
    else:
        moved = view.index.reshape(depth, block, block, height, width).transpose(0, 3, 1, 4, 2)
    return [view.rearranged(moved.reshape(depth, height * block, width * block))]
