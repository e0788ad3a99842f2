"""Folding of nodes whose operands are all constant, where every runtime computes the same result exactly."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from service.certificate.graph import PROBE_BATCH, Node
from service.certificate.limits import fits, size_error
from service.certificate.rules.operands import Refusal, few_integers, int_attribute
from service.certificate.rules.table import Context
from service.certificate.values import Constant, Squares, Unknown, Value

Constants = Sequence[Constant | None]
"""The operands of a node of constants; null where an optional one is left out."""

_BROADCAST_FOLDS = frozenset(
    [
        *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Or", "Where"),
        *("Add", "Div", "Mod", "Mul", "Sub"),
    ]
)
"""Operators whose result has the shape of all operands broadcast together."""
EXACT_FOLDS = frozenset(
    [
        *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
        *("Identity", "NonZero", "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
        *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"),
        *("Abs", "Clip", "Max", "Min", "Neg", "ReduceMax", "ReduceMin", "Relu", "Sign"),
    ]
)
"""Operators that round nothing: they move, compare or choose."""
INTEGER_FOLDS = frozenset(["Add", "Div", "Mod", "Mul", "Range", "ReduceProd", "Sub"])
"""Operators that round nothing where they compute with integers."""
ROUNDS = (
    "arithmetic on constants rounds, and each runtime may round it in its own way; let the exporter or ONNX Runtime's "
    "offline optimisation compute it once, and certify the file that they write"
)
_EXACT_CASTS = frozenset(
    getattr(TensorProto, name)
    for name in ("FLOAT", "DOUBLE", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
)
"""Formats to which every runtime casts a constant in one and the same way."""
_DOUBLE = int(TensorProto.DOUBLE)
_PICKING_FOLDS = frozenset(
    ["Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)
"""Operators that may read integers with the batch size among them: each entry of the result is one of the operand's."""


def fold_shape(context: Context, node: Node, inputs: Sequence[Value]) -> Constant:
    """Return the result of a Shape node.

    Args:
        context: of this analysis.
        node: the node.
        inputs: its operand.

    Raises:
        Refusal: the operand is unknown.
    """
    (value,) = inputs
    if isinstance(value, Unknown):
        raise Refusal(value.reason)
    if isinstance(value, Constant):
        shape = value.array.shape
    else:
        shape = (context.batch, *(value.constant.shape if isinstance(value, Squares) else value.shape))
    # Both ends are clamped as Python's slices are.
    start, end = int_attribute(node, "start", 0), int_attribute(node, "end", len(shape))
    picked = np.array(shape, dtype=np.int64)[start:end]
    # A batch size that the graph fixes is a number like any other.
    on_batch = not isinstance(value, Constant) and context.batch == PROBE_BATCH and 0 in range(len(shape))[start:end]
    return Constant(picked, depends_on_batch=on_batch)


def fold(context: Context, node: Node, inputs: Constants) -> list[Value]:
    """Return the results of a node of constants.

    Args:
        context: of this analysis.
        node: of an operator of `EXACT_FOLDS` or `INTEGER_FOLDS`.
        inputs: its operands.

    Raises:
        Refusal: the result is rounded, differs from runtime to runtime, depends on the batch size, or is too large.
    """
    on_batch = [value is not None and value.depends_on_batch for value in inputs]
    depends_on_batch = any(on_batch)
    picks = node.operator == "Concat" or (node.operator in _PICKING_FOLDS and not any(on_batch[1:]))
    if depends_on_batch and not picks:
        raise Refusal("it computes with the batch size, so that images of one batch size get another map than others")
    integers = all(value is None or value.array.dtype.kind in "iub" for value in inputs)
    if (node.operator in INTEGER_FOLDS or node.attributes.get("reduction", "none") != "none") and not integers:
        raise Refusal(ROUNDS)
    if node.operator == "Cast" and node.attributes.get("to") not in _EXACT_CASTS:
        raise Refusal("a constant cast to a narrow format: some runtimes round it to float32 first, others do not")
    _refuse_two_readings(node, inputs)
    _limit_result(node, inputs)
    data = inputs[0].array if inputs and inputs[0] is not None else None
    if node.operator == "Cast" and data is not None and data.dtype == np.float32 and node.attributes["to"] == _DOUBLE:
        # The format of stored weights; without the reference implementation, which takes longer to load than a proof.
        arrays = [data.astype(np.float64)]
    else:
        arrays = _evaluated(node, inputs)
    folded = [np.asarray(array) for array in arrays]
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in folded):
        raise Refusal("a constant that is not finite")
    return [Constant(array, depends_on_batch and bool((array == context.batch).any())) for array in folded]


def _evaluated(node: Node, inputs: Constants) -> list[np.ndarray]:
    """Return the results of a node of constants, by the reference implementation of ONNX."""
    from onnx.reference import ReferenceEvaluator

    feeds = {name: value.array for name, value in zip(node.inputs, inputs, strict=False) if value is not None and name}
    try:
        # ReferenceEvaluator is annotated too narrowly: a single node is fine.
        run = cast(Callable[..., list[np.ndarray]], ReferenceEvaluator(node.proto).run)
        return run(None, feeds)
    except Exception as error:  # the reference implementation raises whatever its numpy code raises
        raise Refusal(f"its constant inputs do not fit: {error}") from error


def _limit_result(node: Node, inputs: Constants) -> None:
    """Refuse a fold that would enlarge its operands beyond the limit, before the result is made."""
    arrays = [None if value is None else value.array for value in inputs]
    try:
        elements = result_elements(node, arrays)
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise Refusal(f"its constant inputs do not fit: {error}") from error
    stored = max((array.size for array in arrays if array is not None), default=0)
    if elements > stored and not fits(elements):
        raise Refusal(size_error(elements))


def result_elements(node: Node, arrays: Sequence[NDArray[np.generic] | None]) -> int:
    """Return an upper bound of the elements of each result of a foldable node; all but these operators only pick."""
    given = [array for array in arrays if array is not None]
    match node.operator:
        case "ConstantOfShape":
            return math.prod(few_integers(given[0], "the shape"))
        case "Expand":
            return math.prod(np.broadcast_shapes(given[0].shape, tuple(few_integers(given[1], "the shape"))))
        case "Tile":
            return given[0].size * math.prod(few_integers(given[1], "the repeats"))
        case "Pad":
            pads = few_integers(given[1], "the pads")
            named = arrays[3] if len(arrays) > 3 else None
            axes = list(range(given[0].ndim)) if named is None else few_integers(named, "the axes")
            shape = list(given[0].shape)
            for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
                shape[axis] += max(0, low) + max(0, high)
            return math.prod(shape)
        case "Range":
            start, limit, delta = (int(array.item()) for array in given)
            return max(0, -((start - limit) // delta))
        case "Concat":
            return sum(array.size for array in given)
        case "Gather":
            shape = list(given[0].shape)
            shape[int_attribute(node, "axis", 0)] = given[1].size
            return math.prod(shape)
        case "GatherElements":
            return given[1].size
        case "GatherND":
            named = given[1].shape[-1]
            rest = given[0].shape[int_attribute(node, "batch_dims", 0) + named :]
            return given[1].size // named * math.prod(rest)
        case "NonZero":
            return given[0].size * max(1, given[0].ndim)
        case operator if operator in _BROADCAST_FOLDS:
            return math.prod(np.broadcast_shapes(*(array.shape for array in given)))
        case _:
            return max((array.size for array in given), default=0)


def _refuse_two_readings(node: Node, inputs: Constants) -> None:
    """Refuse a node of constants that the reference evaluator and ONNX Runtime read in two ways."""
    for name in ("allowzero", "fmod", "keepdims", "noop_with_empty_axes", "upper"):
        if node.attributes.get(name, 0) not in (0, 1):
            raise Refusal(f"attribute {name} must be 0 or 1")
    arrays = [None if value is None else value.array for value in inputs]
    data = arrays[0] if arrays else None
    if node.operator == "Cast" and data is not None and data.dtype.kind == "f":
        target = helper.tensor_dtype_to_np_dtype(int_attribute(node, "to", 0))
        if target.kind in "iu":
            reach = np.iinfo(target)
            whole = np.trunc(data.astype(np.float64))
            # The largest integer itself may not be a float64, the one after it is.
            if not ((whole >= float(reach.min)) & (whole < float(reach.max) + 1.0)).all():
                raise Refusal(
                    "a constant outside of the integers that it is cast to: each processor makes its own of it"
                )
    if node.operator in ("ReduceProd", "Div", "Mod") and data is not None:
        if node.operator != "ReduceProd":
            if arrays[1] is not None and not arrays[1].all():
                raise Refusal("it divides by zero")
        elif float(np.prod(np.abs(data.astype(np.float64)))) >= 2.0**24:
            raise Refusal("a product of integers beyond 24 bits: runtimes compute it in formats of their own")
    if node.operator == "Slice" and data is not None and len(arrays) == 5 and arrays[4] is not None:
        limits = ([] if array is None else few_integers(array, "the limits") for array in arrays[1:])
        starts, ends, given, steps = limits
        axes = given or range(data.ndim)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=False):
            length = data.shape[axis] if -data.ndim <= axis < data.ndim else 0
            if step < 0 and (start < -length or end >= length):
                raise Refusal("a backward slice that starts before the front or ends behind the back: read in two ways")
