"""Rules of operators that choose or repeat elements, or put constants beside them. Notation as in `table`.

Nothing is computed, so that nothing is rounded.
"""

import math
from dataclasses import replace

import numpy as np

from service.certificate.rules.linear import scaling_step
from service.certificate.rules.operands import (
    Array,
    Operands,
    broadcast_shape,
    data_operand,
    float_operand,
    integer_array,
    integer_operand,
    limit_size,
)
from service.certificate.rules.table import Context, rule
from service.certificate.values import LinearStep, Value, View
from service.network.operators import Constant, Operator, Refusal


@rule("Expand")
def expand(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Axes of length 1 repeated: an element used m times counts sqrt(m).

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    _, *shape = integer_operand(inputs[1], "the new shape")
    limit_size(shape)
    return [view.rearranged(np.broadcast_to(view.index, shape))]


@rule("Tile")
def tile(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """The tensor repeated along its axes: an element used m times counts sqrt(m).

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    _, *repeats = integer_operand(inputs[1], "the repeats")
    limit_size((*view.shape, *repeats))
    return [view.rearranged(np.tile(view.index, repeats))]


@rule("Where")
def where(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Elements of two tensors by a constant mask: those that are taken, counted together. Exact.

    Args: see `Rule`.

    Raises:
        Refusal: the mask depends on the image.
    """
    mask_value, *branches = inputs
    if not isinstance(mask_value, Constant):
        raise Refusal("a mask that depends on the image jumps; it must be a constant")
    numbers = [b.center if isinstance(b, View) else float_operand(b, "a branch") for b in branches]
    shape = broadcast_shape(mask_value.array.shape, *(array.shape for array in numbers))
    mask = np.broadcast_to(mask_value.array.astype(bool), shape)
    numbers = [np.broadcast_to(array, shape) for array in numbers]
    # -1 stands for the constant 0.
    positions = [np.broadcast_to(b.index if isinstance(b, View) else np.int64(-1), shape) for b in branches]
    views = [branch for branch in branches if isinstance(branch, View)]
    source = views[0].source
    if all(view.source is source for view in views):
        return [_framed(context, View(source, np.where(mask, *positions)), np.where(mask, *numbers))]
    taken = [
        branch.rearranged(where_from[picks])
        for branch, where_from, picks in zip(branches, positions, (mask, ~mask), strict=True)
        if isinstance(branch, View)
    ]
    return [context.source(np.where(mask, *numbers), context.domain.joint(*taken))]


def _framed(context: Context, view: View, center: Array) -> View:
    """Return a tensor of which all elements that `view` does not hold are constants: those of `center`."""
    if not center[view.index < 0].any():
        return view
    # Not scalar: a step that follows may see less of the tensor than of its frame.
    step = replace(scaling_step(view, 1.0), scalar=False)
    return context.source(center, context.domain.joint(view), step=step)


@rule("Slice")
def slice_(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A part of a tensor, each element at most once: never expands.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    numbers = (integer_operand(value, name) for value, name in zip(inputs[1:], _SLICE_OPERANDS, strict=True))
    index = view.index
    for start, stop, axis, step in zip(*numbers, strict=True):
        index = index[(slice(None),) * (axis - 1) + (slice(start, stop, step),)]
    return [view.rearranged(index)]


_SLICE_OPERANDS = ("starts", "ends", "axes", "steps")


@rule("Gather", attributes=("axis",))
def gather(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Elements picked by constant positions: an element used m times counts sqrt(m).

    Args: see `Rule`.
    """
    view, axis = data_operand(inputs[0]), node.integer("axis") - 1
    positions = integer_array(inputs[1], "the positions")
    limit_size((*view.shape[:axis], *positions.shape, *view.shape[axis + 1 :]))
    return [view.rearranged(np.asarray(np.take(view.index, positions, axis=axis)))]


@rule("Concat", attributes=("axis",))
def concat(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Stacked branches: parts of one tensor count together, different tensors add in squares.

    Args: see `Rule`.
    """
    views, axis = [data_operand(value) for value in inputs], node.integer("axis") - 1
    limit_size([sum(math.prod(view.shape) for view in views)])
    source = views[0].source
    if all(view.source is source for view in views):
        return [View(source, np.concatenate([view.index for view in views], axis=axis))]
    center = np.concatenate([view.center for view in views], axis=axis)
    step = LinearStep(
        operands=tuple(views),
        apply=lambda stacks: np.concatenate(stacks, axis=axis + 1),
        norm=1.0,
        spread=1.0,
        terms=1,
    )
    return [context.source(center, context.domain.joint(*views), step=step)]


@rule("Pad", attributes=("mode",))
def pad(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Constants cost nothing; an element that reflect, edge or wrap padding repeats m times counts sqrt(m).

    Args: see `Rule`.
    """
    view, mode = data_operand(inputs[0]), node.text("mode")
    pads = integer_operand(inputs[1], "the pads")
    rank = len(view.shape) + 1
    widths = list(zip(pads[1:rank], pads[rank + 1 :], strict=True))
    limit_size([low + n + high for n, (low, high) in zip(view.shape, widths, strict=True)])
    if mode != "constant":
        return [view.rearranged(np.pad(view.index, widths, mode=mode))]  # type: ignore[reportCallIssue, reportArgumentType]
    fill = float(float_operand(inputs[2], "the padding value"))
    padded = view.rearranged(np.pad(view.index, widths, constant_values=-1))
    outside = np.pad(np.zeros(view.shape, dtype=bool), widths, constant_values=True)
    return [_framed(context, padded, np.where(outside, fill, padded.center))]
