"""Lowering of operators that move elements: Reshape and its relatives, parts, stacks, pads and repetitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.network.lowering.table import (
    PROBE_BATCH,
    Folded,
    Inputs,
    Known,
    Reading,
    broadcast,
    constant_array,
    constant_arrays,
    image_axis,
    lowers,
    operand,
    tensor_operand,
    without_batch,
)
from service.network.nodes import Node, axes_of, integers, slice_bounds, split_sizes
from service.network.operators import Constant, Operand, Refusal, Tensor


def _int64(*numbers: int) -> Constant:
    return Constant(np.array(numbers, np.int64))


def reshaped(reading: Reading, node: Node, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor in another shape: a Reshape that copies the batch axis, or the tensor itself.

    Args:
        reading: of this network.
        node: which asks for it.
        x: the tensor.
        shape: of as many elements, without the batch axis.
    """
    if tuple(shape) == x.shape:
        return x
    (result,) = reading.emit(node.called("Reshape"), [x, _int64(0, *shape)], shape, allowzero=0)
    return result


@lowers("Flatten", versions=(1, 9, 11, 13, 21, 23, 24, 25), attributes=("axis",))
def _flatten(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return a Reshape to one axis."""
    x = tensor_operand(operand(inputs, 0))
    axis, rank = node.integer("axis", 1), len(x.shape) + 1
    if not -rank <= axis <= rank or (axis + rank if axis < 0 else axis) != 1:
        raise Refusal("axis other than 1 would mix images")
    return [reshaped(reading, node, x, [math.prod(x.shape)])]


@lowers("Reshape", versions=(5, 13, 14, 19, 21, 23, 24, 25), attributes=("allowzero",))
def _reshape(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the new shape in numbers; the batch axis must stay."""
    x = tensor_operand(operand(inputs, 0))
    given = operand(inputs, 1)
    target = integers(constant_array(given, "the new shape", batch_allowed=True), "the new shape")
    if PROBE_BATCH in target and not (isinstance(given, Folded) and given.on_batch):
        raise Refusal(f"the new shape {target} is too large")
    old = (reading.batch, *x.shape)
    if not node.flag("allowzero", 0):
        if any(size == 0 and position >= len(old) for position, size in enumerate(target)):
            raise Refusal(f"the new shape {target} copies an axis that is not there")
        target = [old[position] if size == 0 else size for position, size in enumerate(target)]
    known = math.prod(size for size in target if size != -1)
    total = math.prod(old)
    if target.count(-1) == 1 and known > 0 and total % known == 0:
        target[target.index(-1)] = total // known
    if min(target, default=0) < 1 or math.prod(target) != total or target[0] != reading.batch:
        raise Refusal("the new shape does not keep the batch axis: give it as 0 or -1 and the rest as numbers")
    return [reshaped(reading, node, x, target[1:])]


@lowers("Squeeze", versions=(1, 11, 13, 21, 23, 24, 25), attributes=("axes",))
def _squeeze(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return a Reshape without the axes."""
    x = tensor_operand(operand(inputs, 0))
    axes = axes_of(node, constant_arrays(inputs), 1)
    if not axes:
        raise Refusal("it names no axes: a batch of one would be squeezed away")
    chosen = {image_axis(axis, x.shape) for axis in axes}
    if len(chosen) != len(axes):
        raise Refusal("an axis is named twice")
    if any(x.shape[axis] != 1 for axis in chosen):
        raise Refusal("it squeezes an axis longer than 1")
    return [reshaped(reading, node, x, [n for axis, n in enumerate(x.shape) if axis not in chosen])]


@lowers("Unsqueeze", versions=(1, 11, 13, 21, 23, 24, 25), attributes=("axes",))
def _unsqueeze(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """Return a Reshape with axes of length 1."""
    x = tensor_operand(operand(inputs, 0))
    axes = axes_of(node, constant_arrays(inputs), 1)
    if not axes:
        raise Refusal("it names no axes")
    rank = len(x.shape) + 1 + len(axes)
    if any(not -rank <= axis < rank for axis in axes) or len({axis % rank for axis in axes}) != len(axes):
        raise Refusal(f"axes {axes} name one axis twice, or are outside of the {rank} axes")
    resolved = sorted(axis % rank for axis in axes)
    if resolved[0] == 0:
        raise Refusal("it puts an axis before the batch")
    shape = list(x.shape)
    for axis in resolved:
        shape.insert(axis - 1, 1)
    return [reshaped(reading, node, x, shape)]


@lowers("Transpose", versions=(1, 13, 21, 23, 24, 25), attributes=("perm",))
def _transpose(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the permutation, which must leave the batch axis in front."""
    x = tensor_operand(operand(inputs, 0))
    permutation = node.listed("perm")
    if not permutation or permutation[0] != 0:
        raise Refusal("it moves the batch axis")
    if sorted(permutation) != list(range(len(x.shape) + 1)):
        raise Refusal(f"perm {permutation} does not fit {len(x.shape) + 1} axes")
    if permutation == sorted(permutation):
        return [x]
    return reading.emit(node, [x], [x.shape[axis - 1] for axis in permutation[1:]], perm=tuple(permutation))


@lowers("Split", versions=(2, 11, 13, 18), attributes=("axis", "num_outputs", "split"))
def _split(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the sizes as an operand."""
    x = tensor_operand(operand(inputs, 0))
    axis = image_axis(node.integer("axis", 0), x.shape)
    sizes = split_sizes(node, constant_arrays(inputs), x.shape[axis])
    if len(sizes) == 1:
        return [x]
    shapes = [[size if index == axis else n for index, n in enumerate(x.shape)] for size in sizes]
    return reading.emit(node, [x, _int64(*sizes)], *shapes, axis=axis + 1)


@lowers("Slice", versions=(1, 10, 11, 13), attributes=("starts", "ends", "axes"))
def _slice(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State starts, ends, axes and steps in numbers; a backward slice becomes a Gather."""
    x = tensor_operand(operand(inputs, 0))
    cuts: list[tuple[int, int, int, int]] = []
    for axis, start, stop, step in slice_bounds(node, constant_arrays(inputs), (reading.batch, *x.shape)):
        if axis == 0:
            if (start, stop, step) != (0, reading.batch, 1):
                raise Refusal("it cuts the batch axis")
            continue
        positions = range(start, stop, step)
        if not positions:
            raise Refusal("nothing is left of the tensor")
        if step < 0:
            (x,) = _gathered(reading, node, x, axis - 1, np.array(positions, np.int64))
        elif positions != range(x.shape[axis - 1]):
            cuts.append((axis, start, stop, step))
    if not cuts:
        return [x]
    shape = list(x.shape)
    for axis, start, stop, step in cuts:
        shape[axis - 1] = len(range(start, stop, step))
    axes, starts, stops, steps = (_int64(*numbers) for numbers in zip(*cuts, strict=True))
    return reading.emit(node, [x, starts, stops, axes, steps], shape)


def _gathered(reading: Reading, node: Node, x: Tensor, axis: int, positions: np.ndarray) -> list[Tensor]:
    shape = (*x.shape[:axis], *positions.shape, *x.shape[axis + 1 :])
    return reading.emit(node.called("Gather"), [x, Constant(positions)], shape, axis=axis + 1)


@lowers("Gather", versions=(1, 11, 13), attributes=("axis",))
def _gather(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the positions, counted from the front."""
    x = tensor_operand(operand(inputs, 0))
    axis = image_axis(node.integer("axis", 0), x.shape)
    positions = constant_array(operand(inputs, 1), "the positions")
    length = x.shape[axis]
    if positions.dtype.kind not in "iu" or not positions.size:
        raise Refusal("the positions must be constant integers")
    if positions.min() < -length or positions.max() >= length:
        raise Refusal(f"positions outside of an axis of {length}")
    counted = positions.astype(np.int64)
    return _gathered(reading, node, x, axis, np.where(counted < 0, counted + length, counted))


@lowers("Concat", versions=(4, 11, 13), attributes=("axis",))
def _concat(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the axis; constant operands, given for one image, are the same for every image."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if not tensors:
        raise Refusal("one operand must depend on the image")
    rank = len(tensors[0].shape)
    axis = image_axis(node.integer("axis"), tensors[0].shape)
    parts: list[Tensor | np.ndarray] = []
    for value in inputs:
        if isinstance(value, Tensor):
            parts.append(value)
            continue
        array = reading.number(value, "every other operand").array
        if array.ndim != rank + 1:
            raise Refusal(f"a constant of {array.ndim} axes beside tensors of {rank + 1}")
        if array.shape[0] not in (1, reading.batch) or (array != array[:1]).any():
            raise Refusal("a constant has its own batch axis")
        parts.append(array[0])
    if len({(len(part.shape), *part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}) != 1:
        raise Refusal(f"tensors of shapes {', '.join(str(part.shape) for part in parts)} do not fit")

    def along(length: int) -> tuple[int, ...]:
        return (*tensors[0].shape[:axis], length, *tensors[0].shape[axis + 1 :])

    joined = tensors[0]
    if len(tensors) > 1:
        (joined,) = reading.emit(node, tensors, along(sum(one.shape[axis] for one in tensors)), axis=axis + 1)
    if len(tensors) == len(parts):
        return [joined]
    # Each position of the result along the axis: from the tensors, or -1 for a constant.
    sources: list[int] = []
    for part in parts:
        n, start = part.shape[axis], sum(source >= 0 for source in sources)
        sources += range(start, start + n) if isinstance(part, Tensor) else [-1] * n
    (spread,) = _gathered(reading, node, joined, axis, np.maximum(np.array(sources, np.int64), 0))
    fixed = [np.zeros(part.shape, reading.precision) if isinstance(part, Tensor) else part for part in parts]
    mask = np.array([source >= 0 for source in sources]).reshape([-1 if index == axis else 1 for index in range(rank)])
    branches = [Constant(mask), spread, Constant(np.concatenate(fixed, axis=axis))]
    return reading.emit(node.called("Where"), branches, along(len(sources)))


@lowers(
    "Pad",
    versions=(2, 11, 13, 18, 19, 21, 23, 24, 25),
    attributes=("mode", "pads", "value"),
)
def _pad(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the pads of all axes, and the value."""
    x = tensor_operand(operand(inputs, 0))
    mode = node.text("mode", "constant", ("constant", "reflect", "edge", "wrap"))
    arrays = constant_arrays(inputs)
    pads, rank = node.integers("pads", arrays, 1), len(x.shape) + 1
    axes = axes_of(node, arrays, 3)
    axes = list(range(rank)) if axes is None else axes
    if len(pads) != 2 * len(axes):
        raise Refusal(f"{len(pads)} pads for {len(axes)} axes")
    if any(not -rank <= axis < rank for axis in axes) or len({axis % rank for axis in axes}) != len(axes):
        raise Refusal(f"axes {axes} name one axis twice, or are outside of the {rank} axes")
    widths = [(0, 0)] * rank
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        if low < 0 or high < 0:
            raise Refusal("negative pads; use Slice")
        widths[axis % rank] = (low, high)
    if widths[0] != (0, 0):
        raise Refusal("it pads the batch axis")
    for n, (low, high) in zip(x.shape, widths[1:], strict=True):
        if (mode == "reflect" and max(low, high) >= n) or (mode == "wrap" and max(low, high) > n):
            raise Refusal(f"{mode} pads of {max(low, high)} on an axis of {n}, which runtimes read in several ways")
    if node.version < 11:
        value = Constant(np.array(node.number("value", 0.0), reading.precision))
    elif operand(inputs, 2) is None:
        value = Constant(np.zeros((), reading.precision))
    else:
        value = Constant(reading.number(operand(inputs, 2), "the padding value").array.reshape(()))
    if not any(low or high for low, high in widths):
        return [x]
    shape = [n + low + high for n, (low, high) in zip(x.shape, widths[1:], strict=True)]
    stated = _int64(*(low for low, _ in widths), *(high for _, high in widths))
    return reading.emit(node, [x, stated, value if mode == "constant" else None], shape, mode=mode)


@lowers("Expand", versions=(8, 13))
def _expand(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the new shape, 1 for the batch axis."""
    x = tensor_operand(operand(inputs, 0))
    given = operand(inputs, 1)
    target = integers(constant_array(given, "the new shape", batch_allowed=True), "the new shape")
    on_batch = isinstance(given, Folded) and given.on_batch
    rank = len(x.shape) + 1
    if len(target) > rank:
        raise Refusal("the new shape adds axes before the batch")
    if len(target) == rank:
        images = target.pop(0)
        free = reading.batch == PROBE_BATCH and not on_batch
        if images != 1 and (free or images != reading.batch):
            raise Refusal("the new shape fixes the length of the batch axis; give it as 1")
    if (on_batch and reading.batch in target) or min(target, default=1) < 1:
        raise Refusal("the new shape depends on the batch size or has an empty axis")
    shape = broadcast(x.shape, tuple(target))
    if shape == x.shape:
        return [x]
    return reading.emit(node, [x, _int64(1, *shape)], shape)


@lowers("Tile", versions=(6, 13))
def _tile(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the repeats of all axes."""
    x = tensor_operand(operand(inputs, 0))
    repeats = integers(constant_array(operand(inputs, 1), "the repeats"), "the repeats")
    if len(repeats) != len(x.shape) + 1 or min(repeats) < 1:
        raise Refusal(f"repeats {repeats} do not fit a tensor of {len(x.shape) + 1} axes")
    if repeats[0] != 1:
        raise Refusal("it repeats the batch axis")
    if max(repeats) == 1:
        return [x]
    return reading.emit(node, [x, _int64(*repeats)], [n * times for n, times in zip(x.shape, repeats[1:], strict=True)])


@lowers("Where", versions=(9, 16))
def _where(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State mask and constant branch without batch axis."""
    if len(inputs) != 3 or isinstance(inputs[0], Tensor):
        raise Refusal("a mask that depends on the image jumps; it must be a constant")
    tensors = [value for value in inputs[1:] if isinstance(value, Tensor)]
    rank = len(tensors[0].shape) if tensors else 0
    if not tensors or any(len(one.shape) != rank for one in tensors):
        raise Refusal("tensors of different ranks would broadcast across the batch")
    mask = without_batch(constant_array(inputs[0], "the mask"), rank)
    if mask.dtype != np.bool_:
        raise Refusal("the mask must hold booleans")
    branches: list[Operand] = [
        value if isinstance(value, Tensor) else Constant(without_batch(reading.number(value, "a branch").array, rank))
        for value in inputs[1:]
    ]
    shapes = [one.shape if isinstance(one, Tensor) else one.array.shape for one in branches if one is not None]
    return reading.emit(node, [Constant(mask), *branches], broadcast(mask.shape, *shapes))


@lowers("SpaceToDepth", versions=(1, 13), attributes=("blocksize",))
def _space_to_depth(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the block size."""
    x, block = tensor_operand(operand(inputs, 0)), node.integer("blocksize", 0)
    if len(x.shape) != 3 or block < 1 or x.shape[1] % block or x.shape[2] % block:
        raise Refusal(f"a blocksize of {block} does not divide {x.shape}")
    shape = (x.shape[0] * block * block, x.shape[1] // block, x.shape[2] // block)
    return reading.emit(node, [x], shape, blocksize=block)


@lowers("DepthToSpace", versions=(1, 11, 13), attributes=("blocksize", "mode"))
def _depth_to_space(reading: Reading, node: Node, inputs: Inputs) -> Sequence[Known]:
    """State the block size and the order."""
    x, block = tensor_operand(operand(inputs, 0)), node.integer("blocksize", 0)
    mode = node.text("mode", "DCR", ("DCR", "CRD"))
    if len(x.shape) != 3 or block < 1 or x.shape[0] % (block * block):
        raise Refusal(f"a blocksize of {block} does not divide {x.shape[0]} channels")
    shape = (x.shape[0] // (block * block), x.shape[1] * block, x.shape[2] * block)
    return reading.emit(node, [x], shape, blocksize=block, mode=mode)
