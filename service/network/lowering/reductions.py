"""Lowering of reductions, sorts and softmax: operators along axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.network.lowering.rearrangements import reshaped
from service.network.lowering.table import (
    Inputs,
    Known,
    Reading,
    Unknown,
    constant_array,
    constant_arrays,
    image_axis,
    lowers,
    operand,
    tensor_operand,
)
from service.network.nodes import Node, axes_of
from service.network.operators import Constant, Refusal

_ATTRIBUTES = ("axes", "keepdims", "noop_with_empty_axes")


@lowers("ReduceSum", versions=(1, 11, 13), attributes=_ATTRIBUTES)
@lowers("ReduceL1", "ReduceL2", "ReduceMean", "ReduceSumSquare", versions=(1, 11, 13, 18), attributes=_ATTRIBUTES)
@lowers("ReduceMax", "ReduceMin", versions=(1, 11, 12, 13, 18, 20), attributes=_ATTRIBUTES)
def _reduce(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the axes as an operand, in ascending order."""
    x = tensor_operand(operand(inputs, 0))
    axes = axes_of(node, constant_arrays(inputs), 1)
    if not axes:
        raise Refusal("it names no axes, so that it would reduce the batch too")
    chosen = sorted({image_axis(axis, x.shape) for axis in axes})
    keep = node.flag("keepdims", 1)
    shape = [1 if axis in chosen else n for axis, n in enumerate(x.shape) if keep or axis not in chosen]
    stated = Constant(np.array([axis + 1 for axis in chosen], np.int64))
    return reading.emit(node, [x, stated], shape, keepdims=int(keep), noop_with_empty_axes=0)


@lowers("TopK", versions=(1, 10, 11, 24), attributes=("axis", "k", "largest", "sorted"))
def _top_k(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State k as an operand."""
    x = tensor_operand(operand(inputs, 0))
    if node.version < 10:
        k = node.integer("k")
    else:
        array = constant_array(operand(inputs, 1), "k")
        if array.size != 1 or array.dtype.kind not in "iu":
            raise Refusal("k must be one constant integer")
        k = int(array.item())
    axis = image_axis(node.integer("axis", -1), x.shape)
    if not 1 <= k <= x.shape[axis]:
        raise Refusal(f"k={k} of an axis of {x.shape[axis]}")
    shape = [k if index == axis else n for index, n in enumerate(x.shape)]
    values, _ = reading.emit(
        node,
        [x, Constant(np.array([k], np.int64))],
        shape,
        shape,
        axis=axis + 1,
        largest=int(node.flag("largest", 1)),
        sorted=int(node.flag("sorted", 1)),
    )
    return [values, Unknown("the indices of a sort jump and have no Lipschitz constant")]


@lowers("LogSoftmax", "Softmax", versions=(1, 11, 13), attributes=("axis",))
def _softmax(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the axis; before opset 13, all axes from `axis` on are one."""
    x = tensor_operand(operand(inputs, 0))
    axis = image_axis(node.integer("axis", -1 if node.version >= 13 else 1), x.shape)
    if node.version >= 13 or axis == len(x.shape) - 1:
        return reading.emit(node, [x], x.shape, axis=axis + 1)
    flat = reshaped(reading, node, x, (*x.shape[:axis], math.prod(x.shape[axis:])))
    (result,) = reading.emit(node, [flat], flat.shape, axis=axis + 1)
    return [reshaped(reading, node, result, x.shape)]
