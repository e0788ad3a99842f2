"""Rules of operators that choose or repeat elements, or put constants beside them. Notation as in `table`.

Nothing is computed, so that nothing is rounded.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.certificate.graph import PROBE_BATCH, Node
from service.certificate.rules.linear import scaling_step
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    broadcast_shape,
    constant_of_one_image,
    data_operand,
    float_operand,
    image_axis,
    int_attribute,
    integer_array,
    integer_operand,
    limit_size,
    optional_operand,
)
from service.certificate.rules.table import Context, rule
from service.certificate.values import Constant, LinearStep, Value, View


@rule("Expand")
def expand(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Axes of length 1 repeated: an element used m times counts sqrt(m).

    Args: see `Rule`.

    Raises:
        Refusal: the new shape does not fit the tensor, or depends on the batch size.
    """
    view = data_operand(inputs[0])
    target = integer_operand(inputs[1], "the new shape", batch_allowed=True)
    on_batch = isinstance(inputs[1], Constant) and inputs[1].depends_on_batch
    rank = len(view.shape) + 1
    if len(target) > rank:
        raise Refusal("the new shape adds axes before the batch")
    if len(target) == rank:
        images = target.pop(0)
        free = context.batch == PROBE_BATCH and not on_batch
        if images != 1 and (free or images != context.batch):
            raise Refusal("the new shape fixes the length of the batch axis; give it as 1")
    if on_batch and context.batch in target:
        raise Refusal("the new shape depends on the batch size")
    shape = broadcast_shape(view.shape, tuple(target))
    if 0 in shape:
        raise Refusal("nothing is left of the tensor")
    return [view.rearranged(np.broadcast_to(view.index, shape))]


@rule("Tile")
def tile(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """The tensor repeated along its axes: an element used m times counts sqrt(m).

    Args: see `Rule`.

    Raises:
        Refusal: the repeats do not fit the tensor, or repeat the batch axis.
    """
    view = data_operand(inputs[0])
    repeats = integer_operand(inputs[1], "the repeats")
    if len(repeats) != len(view.shape) + 1 or min(repeats) < 1:
        raise Refusal(f"repeats {repeats} do not fit a tensor of {len(view.shape) + 1} axes")
    if repeats[0] != 1:
        raise Refusal("it repeats the batch axis")
    limit_size((*view.shape, *repeats))
    return [view.rearranged(np.tile(view.index, repeats[1:]))]


@rule("Where")
def where(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elements of two tensors by a constant mask: those that are taken, counted together. Exact.

    Args: see `Rule`.

    Raises:
        Refusal: the mask depends on the image, or an operand has another rank or a batch axis.
    """
    mask_value, *branches = inputs
    if not isinstance(mask_value, Constant) or mask_value.depends_on_batch:
        raise Refusal("a mask that depends on the image jumps; it must be a constant")
    views = [branch for branch in branches if isinstance(branch, View)]
    rank = len(views[0].shape)
    if any(len(view.shape) != rank for view in views):
        raise Refusal("tensors of different ranks would broadcast across the batch")
    mask = constant_of_one_image(mask_value.array.astype(np.float64), rank) != 0.0
    numbers = [
        branch.center if isinstance(branch, View) else constant_of_one_image(float_operand(branch, "a branch"), rank)
        for branch in branches
    ]
    shape = broadcast_shape(mask.shape, *(array.shape for array in numbers))
    mask = np.broadcast_to(mask, shape)
    numbers = [np.broadcast_to(array, shape) for array in numbers]
    # -1 stands for the constant 0.
    positions = [np.broadcast_to(b.index if isinstance(b, View) else np.int64(-1), shape) for b in branches]
    source = views[0].source
    zeros = not any(numbers[b][picks & (positions[b] < 0)].any() for b, picks in ((0, mask), (1, ~mask)))
    if zeros and all(view.source is source for view in views):
        return [View(source, np.where(mask, *positions))]
    taken = [
        branch.rearranged(where_from[picks])
        for branch, where_from, picks in zip(branches, positions, (mask, ~mask), strict=True)
        if isinstance(branch, View)
    ]
    return [context.source(np.where(mask, *numbers), context.domain.joint(*taken))]


@rule("Slice")
def slice_(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A part of a tensor, each element at most once: never expands.

    Args: see `Rule`.

    Raises:
        Refusal: nothing is left.
    """
    view = data_operand(inputs[0])
    starts, ends = integer_operand(inputs[1], "starts"), integer_operand(inputs[2], "ends")
    axes_value, steps_value = optional_operand(inputs, 3), optional_operand(inputs, 4)
    axes = integer_operand(axes_value, "axes") if axes_value is not None else list(range(len(starts)))
    steps = integer_operand(steps_value, "steps") if steps_value is not None else [1] * len(starts)
    index = view.index
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        position = image_axis(axis, view)
        length = index.shape[position]
        # ONNX counts a negative end past the front once; numpy would count it again.
        stop = (None if end < -length else end) if step <= 0 else min(end, length)
        index = index[(slice(None),) * position + (slice(start, stop, step),)]
    if index.size == 0:
        raise Refusal("nothing is left of the tensor")
    return [view.rearranged(index)]


@rule("Gather", attributes=("axis",))
def gather(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elements picked by constant positions: an element used m times counts sqrt(m).

    Args: see `Rule`.

    Raises:
        Refusal: a position is outside of the axis.
    """
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", 0), view)
    positions = integer_array(inputs[1], "the positions").astype(np.int64)
    length = view.shape[axis]
    if ((positions < -length) | (positions >= length)).any():
        raise Refusal(f"positions outside of an axis of {length}")
    limit_size((*view.shape[:axis], *positions.shape, *view.shape[axis + 1 :]))
    return [view.rearranged(np.take(view.index, positions % length, axis=axis))]


@rule("Concat", attributes=("axis",))
def concat(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Stacked branches: parts of one tensor count together, different tensors add in squares, constants do not move.

    Args: see `Rule`.
    """
    views = [value for value in inputs if isinstance(value, View)]
    axis = image_axis(int_attribute(node, "axis", 0), views[0])
    parts = [value if isinstance(value, View) else _constant_part(value, len(views[0].shape)) for value in inputs]
    limit_size([sum(math.prod(part.shape) for part in parts)])
    source = views[0].source
    constants = [part for part in parts if not isinstance(part, View)]
    if all(view.source is source for view in views) and not any(constant.any() for constant in constants):
        indices = [part.index if isinstance(part, View) else np.full(part.shape, -1) for part in parts]
        return [View(source, np.concatenate(indices, axis=axis))]
    center = np.concatenate([part.center if isinstance(part, View) else part for part in parts], axis=axis)

    def apply(stacks: Sequence[Array]) -> Array:
        # The linear part: constants are zeros.
        moving = iter(stacks)
        pieces = [next(moving) if isinstance(p, View) else np.zeros((len(stacks[0]), *p.shape)) for p in parts]
        return np.concatenate(pieces, axis=axis + 1)

    step = LinearStep(operands=tuple(views), apply=apply, norm=1.0, spread=1.0, terms=1)
    return [context.source(center, context.domain.joint(*views), step=step)]


def _constant_part(value: Value | None, rank: int) -> Array:
    """Return a constant that is stacked beside tensors of `rank` axes: the same for every image of its batch."""
    array = float_operand(value, "an operand that does not depend on the image")
    if array.ndim != rank + 1:
        raise Refusal(f"a constant of {array.ndim} axes beside tensors of {rank + 1}")
    if (array != array[:1]).any():
        raise Refusal("a constant has its own batch axis")
    return array[0]


@rule("Pad", attributes=("mode",))
def pad(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Constants cost nothing; an element that reflect, edge or wrap padding repeats m times counts sqrt(m).

    Args: see `Rule`.

    Raises:
        Refusal: its mode has no proved rule.
    """
    view = data_operand(inputs[0])
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Refusal(f"mode {mode!r} has no proved rule")
    widths = _pad_widths(inputs, view)
    limit_size([low + n + high for n, (low, high) in zip(view.shape, widths, strict=True)])
    if mode != "constant":
        return [view.rearranged(np.pad(view.index, widths, mode=mode))]  # type: ignore[reportCallIssue, reportArgumentType]
    value = optional_operand(inputs, 2)
    fill = 0.0 if value is None else float(float_operand(value, "the padding value").reshape(()))
    padded = view.rearranged(np.pad(view.index, widths, constant_values=-1))
    if fill == 0.0:
        return [padded]
    outside = np.pad(np.zeros(view.shape, dtype=bool), widths, constant_values=True)
    center = np.where(outside, fill, padded.center)
    # Not scalar: a step that follows may see less of the tensor than of its frame.
    step = replace(scaling_step(padded, 1.0), scalar=False)
    return [context.source(center, context.domain.joint(padded), step=step)]


def _pad_widths(inputs: Operands, view: View) -> list[tuple[int, int]]:
    """Return the elements before and after each axis of the image's own shape."""
    pads = integer_operand(inputs[1], "the pads")
    rank = len(view.shape) + 1
    axes_value = optional_operand(inputs, 3)
    axes = integer_operand(axes_value, "the axes") if axes_value is not None else list(range(rank))
    if len({axis % rank for axis in axes}) < len(axes):
        raise Refusal(f"axes {axes} name one axis twice")
    widths = [(0, 0)] * len(view.shape)
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if low < 0 or high < 0:
            raise Refusal("negative pads; use Slice")
        if axis % rank == 0:
            if low or high:
                raise Refusal("it pads the batch axis")
            continue
        widths[image_axis(axis, view)] = (low, high)
    return widths
