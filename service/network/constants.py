"""Constants of a model evaluated exactly: operators that move, compare or choose numbers, and arithmetic on integers.

Floating-point arithmetic on constants is refused, since it rounds: the exporter computes such constants once and stores
them. Each evaluator follows the ONNX specification of its operator and limits the size of its result before allocation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
from onnx import TensorProto, helper

from service.network.limits import LARGEST_CONSTANT, limit_elements
from service.network.nodes import Node, axes_of, integers, optional, slice_bounds, split_sizes
from service.network.operators import Refusal

Array = np.ndarray
Evaluator = Callable[[Node, list[Array]], list[Array]]

ROUNDS = (
    "arithmetic on constants rounds, and each runtime may round it in its own way; let the exporter or ONNX Runtime's "
    "offline optimisation compute it once, and certify the file that they write"
)
CASTS = frozenset(
    getattr(TensorProto, name)
    for name in ("FLOAT", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)
"""Element types with one meaning."""
PICKING = frozenset(
    ["Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)
"""Operators allowed on integers that hold the batch size: each entry of the result is one of the first operand."""
_LARGEST_ARITHMETIC = 1 << 18
"""Elements of one result of arithmetic, which Python's integers compute."""
EVALUATORS: dict[str, Evaluator] = {}


def evaluates(*operators: str) -> Callable[[Evaluator], Evaluator]:
    """Register the evaluator of operators."""

    def register(function: Evaluator) -> Evaluator:
        EVALUATORS.update(dict.fromkeys(operators, function))
        return function

    return register


def evaluate(node: Node, arrays: list[Array | None]) -> list[Array]:
    """Return the results of a node whose operands are all constants.

    Args:
        node: with operands and attributes as the file states them.
        arrays: the operands; absent optional ones as null.

    Raises:
        Refusal: the operator rounds, its result is too large or not finite, or the operands do not fit.
    """
    evaluator = EVALUATORS.get(node.kind)
    if evaluator is None:
        raise Refusal(ROUNDS)
    try:
        # A cast that overflows is not finite.
        with np.errstate(all="ignore"):
            results = evaluator(node, arrays)  # type: ignore[arg-type]
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise Refusal(f"its constant inputs do not fit: {error}") from error
    for result in results:
        if result.dtype.kind == "f" and not np.isfinite(result).all():
            raise Refusal("a constant that is not finite")
    return results


def _limited(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape; raise Refusal if an array of it is too large."""
    if any(size < 0 for size in shape):
        raise Refusal(f"a constant of shape {tuple(shape)}")
    limit_elements(shape, LARGEST_CONSTANT)
    return tuple(shape)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Refusal(f"axis {axis} is outside of the {rank} axes")
    return axis % rank


@evaluates("Constant")
def _constant(node: Node, arrays: list[Array]) -> list[Array]:
    given = [name for name in node.attributes if name.startswith("value") or name == "sparse_value"]
    if len(given) != 1:
        raise Refusal("it needs exactly one value")
    (name,) = given
    value = node.attributes[name]
    match name:
        case "value" if isinstance(value, np.ndarray):
            return [value]
        case "value_float" | "value_floats":
            return [np.array(value, np.float32)]
        case "value_int" | "value_ints":
            return [np.array(value, np.int64)]
        case _:
            raise Refusal(f"attribute {name} is not supported; store the constant as a dense tensor of numbers")


@evaluates("ConstantOfShape")
def _constant_of_shape(node: Node, arrays: list[Array]) -> list[Array]:
    shape = _limited(integers(arrays[0], "the shape"))
    value = node.attributes.get("value", np.zeros(1, np.float32))
    if not isinstance(value, np.ndarray) or value.size != 1:
        raise Refusal("value must be one number")
    return [np.broadcast_to(value.reshape(()), shape)]


@evaluates("Range")
def _range(node: Node, arrays: list[Array]) -> list[Array]:
    if any(array.dtype.kind not in "iu" for array in arrays):
        raise Refusal(ROUNDS)
    start, limit, step = (int(array.reshape(())) for array in arrays)
    if step == 0:
        raise Refusal("a step of 0")
    _limited([max(0, -(-(limit - start) // step))])
    return [np.arange(start, limit, step).astype(arrays[0].dtype)]


@evaluates("Cast")
def _cast(node: Node, arrays: list[Array]) -> list[Array]:
    target = node.attributes.get("to")
    if target not in CASTS:
        raise Refusal("a constant cast to a format with several meanings: some runtimes round it to float32 first")
    dtype = helper.tensor_dtype_to_np_dtype(int(target))  # type: ignore[arg-type]
    data = arrays[0]
    if data.dtype.kind not in "biuf":
        raise Refusal("a constant that does not hold numbers")
    if dtype.kind in "iu" and data.dtype.kind in "iuf":
        limits = np.iinfo(dtype)
        whole = np.trunc(data) if data.dtype.kind == "f" else data
        # Python compares integers with floats exactly.
        if whole.size and not (limits.min <= whole.min().item() and whole.max().item() <= limits.max):
            raise Refusal("a constant outside of the integers that it is cast to: processors differ in the result")
    return [data.astype(dtype)]


@evaluates("Identity")
def _identity(node: Node, arrays: list[Array]) -> list[Array]:
    return [arrays[0]]


@evaluates("Concat")
def _concat(node: Node, arrays: list[Array]) -> list[Array]:
    axis = _axis(node.integer("axis"), arrays[0].ndim)
    _limited([sum(array.size for array in arrays)])
    if len({array.dtype for array in arrays}) != 1:
        raise Refusal("operands of different types")
    return [np.concatenate(arrays, axis=axis)]


@evaluates("Expand")
def _expand(node: Node, arrays: list[Array]) -> list[Array]:
    shape = _limited(np.broadcast_shapes(arrays[0].shape, tuple(integers(arrays[1], "the shape"))))
    return [np.broadcast_to(arrays[0], shape)]


@evaluates("Flatten")
def _flatten(node: Node, arrays: list[Array]) -> list[Array]:
    axis = node.integer("axis", 1)
    rank = arrays[0].ndim
    if not -rank <= axis <= rank:
        raise Refusal(f"axis {axis} is outside of the {rank} axes")
    axis = axis + rank if axis < 0 else axis
    return [arrays[0].reshape(math.prod(arrays[0].shape[:axis]), -1 if arrays[0].size else 0)]


@evaluates("Gather")
def _gather(node: Node, arrays: list[Array]) -> list[Array]:
    data, positions = arrays
    axis = _axis(node.integer("axis", 0), data.ndim)
    _limited([data.size // max(1, data.shape[axis]), positions.size])
    return [np.take(data, _inside(positions, data.shape[axis]), axis=axis)]


def _inside(positions: Array, length: int) -> Array:
    if positions.dtype.kind not in "iu":
        raise Refusal("positions must be integers")
    if positions.size and not (positions.min() >= -length and positions.max() < length):
        raise Refusal(f"positions outside of an axis of {length}")
    return np.where(positions < 0, positions + length, positions)


@evaluates("GatherElements")
def _gather_elements(node: Node, arrays: list[Array]) -> list[Array]:
    data, positions = arrays
    axis = _axis(node.integer("axis", 0), data.ndim)
    return [np.take_along_axis(data, _inside(positions, data.shape[axis]), axis=axis)]


@evaluates("GatherND")
def _gather_nd(node: Node, arrays: list[Array]) -> list[Array]:
    data, positions = arrays
    if node.integer("batch_dims", 0) != 0:
        raise Refusal("batch_dims other than 0 is not supported")
    depth = positions.shape[-1]
    _limited([math.prod(positions.shape[:-1]), math.prod(data.shape[depth:])])
    return [data[tuple(_inside(positions[..., axis], data.shape[axis]) for axis in range(depth))]]


@evaluates("ScatterND")
def _scatter_nd(node: Node, arrays: list[Array]) -> list[Array]:
    data, positions, updates = arrays
    if node.attributes.get("reduction", "none") != "none":
        raise Refusal(ROUNDS)
    result = data.copy()
    depth = positions.shape[-1]
    places = tuple(_inside(positions[..., axis], data.shape[axis]) for axis in range(depth))
    if not depth:
        raise Refusal("positions of no axis")
    _once(places, data.shape[:depth])
    result[places] = updates.reshape(*positions.shape[:-1], *data.shape[depth:])  # type: ignore[reportArgumentType, reportCallIssue]
    return [result]


def _once(places: Sequence[Array], shape: Sequence[int]) -> None:
    """Refuse positions of an array of a shape that name one place twice."""
    flat = np.ravel_multi_index(tuple(place.astype(np.int64) for place in places), tuple(shape))
    if np.unique(flat).size != flat.size:
        raise Refusal("it writes to one place twice, in an order that is not defined")


@evaluates("ScatterElements")
def _scatter_elements(node: Node, arrays: list[Array]) -> list[Array]:
    data, positions, updates = arrays
    if node.attributes.get("reduction", "none") != "none":
        raise Refusal(ROUNDS)
    axis = _axis(node.integer("axis", 0), data.ndim)
    _limited([positions.size, data.ndim])
    grid = np.indices(positions.shape)
    places = [_inside(positions, data.shape[axis]) if index == axis else grid[index] for index in range(data.ndim)]
    _once(places, data.shape)
    result = data.copy()
    result[tuple(places)] = updates.reshape(positions.shape)
    return [result]


@evaluates("NonZero")
def _non_zero(node: Node, arrays: list[Array]) -> list[Array]:
    _limited([arrays[0].size, arrays[0].ndim])
    return [np.stack(np.nonzero(arrays[0])).astype(np.int64) if arrays[0].ndim else np.zeros((0, 1), np.int64)]


@evaluates("Pad")
def _pad(node: Node, arrays: list[Array]) -> list[Array]:
    data = arrays[0]
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "edge", "reflect", "wrap"):
        raise Refusal(f"mode {mode!r} is not supported")
    pads = node.integers("pads", arrays, 1)
    axes = axes_of(node, arrays, 3)
    value = optional(arrays, 2)
    axes = list(range(data.ndim)) if axes is None else [_axis(axis, data.ndim) for axis in axes]
    if len(pads) != 2 * len(axes) or min(pads, default=0) < 0:
        raise Refusal("pads that do not fit")
    widths = [(0, 0)] * data.ndim
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = (low, high)
    _limited([size + low + high for size, (low, high) in zip(data.shape, widths, strict=True)])
    for n, pair in zip(data.shape, widths, strict=True):
        if (mode == "reflect" and max(pair) >= max(n, 1)) or (mode == "wrap" and max(pair) > n):
            raise Refusal(f"{mode} pads of {max(pair)} on an axis of {n}, which runtimes read in several ways")
    if mode != "constant":
        return [np.pad(data, widths, mode=mode)]  # type: ignore[call-overload]
    number = float(node.attributes.get("value", 0.0)) if value is None else value.reshape(()).item()  # type: ignore[arg-type]
    return [np.pad(data, widths, constant_values=number)]


@evaluates("Reshape")
def _reshape(node: Node, arrays: list[Array]) -> list[Array]:
    target = integers(arrays[1], "the shape")
    if min(target, default=0) < -1:
        raise Refusal(f"a shape of {target}")
    if not node.flag("allowzero", 0):
        target = [arrays[0].shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return [arrays[0].reshape(target)]


@evaluates("Slice")
def _slice(node: Node, arrays: list[Array]) -> list[Array]:
    result = arrays[0]
    for axis, start, stop, step in slice_bounds(node, arrays, result.shape):
        result = result[(slice(None),) * axis + (slice(start, None if stop < 0 else stop, step),)]
    return [result]


@evaluates("Split")
def _split(node: Node, arrays: list[Array]) -> list[Array]:
    axis = _axis(node.integer("axis", 0), arrays[0].ndim)
    sizes = split_sizes(node, arrays, arrays[0].shape[axis])
    return list(np.split(arrays[0], np.cumsum(sizes)[:-1], axis=axis))


@evaluates("Squeeze")
def _squeeze(node: Node, arrays: list[Array]) -> list[Array]:
    axes = axes_of(node, arrays, 1)
    if axes is None:
        return [np.squeeze(arrays[0])]
    if not axes:
        raise Refusal("an empty list of axes, which runtimes read in two ways")
    return [np.squeeze(arrays[0], tuple(_axis(axis, arrays[0].ndim) for axis in axes))]


@evaluates("Unsqueeze")
def _unsqueeze(node: Node, arrays: list[Array]) -> list[Array]:
    axes = axes_of(node, arrays, 1)
    if axes is None:
        raise Refusal("it names no axes")
    return [np.expand_dims(arrays[0], tuple(_axis(axis, arrays[0].ndim + len(axes)) for axis in axes))]


@evaluates("Tile")
def _tile(node: Node, arrays: list[Array]) -> list[Array]:
    repeats = integers(arrays[1], "the repeats")
    if len(repeats) != arrays[0].ndim:
        raise Refusal(f"repeats {repeats} do not fit a tensor of {arrays[0].ndim} axes")
    _limited([size * times for size, times in zip(arrays[0].shape, repeats, strict=True)])
    return [np.tile(arrays[0], repeats)]


@evaluates("Transpose")
def _transpose(node: Node, arrays: list[Array]) -> list[Array]:
    permutation = node.attributes.get("perm")
    return [np.transpose(arrays[0], permutation)]  # type: ignore[arg-type]


@evaluates("Trilu")
def _trilu(node: Node, arrays: list[Array]) -> list[Array]:
    given = optional(arrays, 1)
    k = 0 if given is None else int(given.reshape(()))
    return [np.triu(arrays[0], k) if node.flag("upper", 1) else np.tril(arrays[0], k)]


@evaluates("Where")
def _where(node: Node, arrays: list[Array]) -> list[Array]:
    if arrays[0].dtype != np.bool_ or arrays[1].dtype != arrays[2].dtype:
        raise Refusal("it needs a mask of booleans and operands of one type")
    _limited(np.broadcast_shapes(*(array.shape for array in arrays)))
    return [np.where(*arrays)]


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "And": np.logical_and,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Or": np.logical_or,
}


@evaluates(*_COMPARISONS)
def _compare(node: Node, arrays: list[Array]) -> list[Array]:
    left, right = arrays
    if left.dtype != right.dtype:
        raise Refusal("operands of different types")
    _limited(np.broadcast_shapes(left.shape, right.shape))
    return [np.asarray(_COMPARISONS[node.kind](left, right))]


@evaluates("Abs", "Neg", "Not", "Relu", "Sign")
def _unary(node: Node, arrays: list[Array]) -> list[Array]:
    data = arrays[0]
    if data.dtype.kind == "i" and data.size and data.min() == np.iinfo(data.dtype).min:
        raise Refusal("the smallest integer has no opposite")
    if node.kind == "Relu":
        return [np.maximum(data, 0).astype(data.dtype)]
    functions = {"Abs": np.abs, "Neg": np.negative, "Not": np.logical_not, "Sign": np.sign}
    return [np.asarray(functions[node.kind](data))]


@evaluates("Max", "Min")
def _largest(node: Node, arrays: list[Array]) -> list[Array]:
    _limited(np.broadcast_shapes(*(array.shape for array in arrays)))
    return [np.asarray(reduce(np.maximum if node.kind == "Max" else np.minimum, arrays))]


@evaluates("Clip")
def _clip(node: Node, arrays: list[Array]) -> list[Array]:
    data = arrays[0]
    if "min" in node.attributes or "max" in node.attributes:
        raise Refusal("limits as attributes on a constant; compute it once")
    low, high = optional(arrays, 1), optional(arrays, 2)
    if low is not None:
        data = np.maximum(data, low.reshape(()))
    if high is not None:
        data = np.minimum(data, high.reshape(()))
    return [np.asarray(data)]


@evaluates("ReduceMax", "ReduceMin", "ReduceProd")
def _reduce(node: Node, arrays: list[Array]) -> list[Array]:
    data = arrays[0]
    axes = axes_of(node, arrays, 1)
    if not axes and node.flag("noop_with_empty_axes", 0):
        return [data]
    chosen = tuple(_axis(axis, data.ndim) for axis in axes) if axes else None
    keep = node.flag("keepdims", 1)
    if node.kind != "ReduceProd":
        choose = np.max if node.kind == "ReduceMax" else np.min
        return [np.asarray(choose(data, axis=chosen, keepdims=keep))]
    if data.dtype.kind not in "iu":
        raise Refusal(ROUNDS)
    # Of absolute values: each product on the way is within, too.
    if reduce(lambda product, one: min(product * max(1, abs(one)), 2**24), data.ravel().tolist(), 1) >= 2**24:
        raise Refusal("a product of integers beyond 24 bits: runtimes compute it in formats of their own")
    return [np.asarray(np.prod(data, axis=chosen, keepdims=keep, dtype=data.dtype))]


@evaluates("Add", "Div", "Mod", "Mul", "Sub")
def _arithmetic(node: Node, arrays: list[Array]) -> list[Array]:
    left, right = arrays
    if left.dtype.kind not in "iu" or right.dtype != left.dtype:
        raise Refusal(ROUNDS)
    limit_elements(np.broadcast_shapes(left.shape, right.shape), _LARGEST_ARITHMETIC)
    if node.kind in ("Div", "Mod") and not right.all():
        raise Refusal("it divides by zero")
    truncated = node.kind == "Mod" and node.flag("fmod", 0)
    functions: dict[str, Callable[[int, int], int]] = {
        "Add": lambda a, b: a + b,
        "Sub": lambda a, b: a - b,
        "Mul": lambda a, b: a * b,
        # Towards zero, as processors divide.
        "Div": _quotient,
        "Mod": (lambda a, b: a - b * _quotient(a, b)) if truncated else (lambda a, b: a % b),
    }
    compute = np.frompyfunc(functions[node.kind], 2, 1)
    return [_in_range(np.asarray(compute(left.astype(object), right.astype(object))), left.dtype)]


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _in_range(numbers: Array, dtype: np.dtype[np.generic]) -> Array:
    limits = np.iinfo(dtype.name)
    if any(not limits.min <= number <= limits.max for number in numbers.ravel().tolist()):
        raise Refusal(f"a result outside of {dtype.name}")
    return numbers.astype(dtype)
