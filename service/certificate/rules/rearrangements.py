"""Rules of operators that repeat or choose elements by a constant. Nothing is computed. Notation as in `rules`."""

from __future__ import annotations

import math

import numpy as np

from service.certificate.graph import PROBE_BATCH, Node
from service.certificate.rules.operands import (
    Array,
    Operands,
    Refusal,
    constant_shape,
    data_operand,
    flag_attribute,
    float_operand,
    image_axis,
    int_attribute,
    integer_operand,
    optional_operand,
)
from service.certificate.rules.table import (
    Context,
    rule,
)
from service.certificate.values import (
    Constant,
    LinearStep,
    Unknown,
    Value,
    View,
)


@rule("Expand")
def expand(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Axes of length 1 repeated: an element used m times counts sqrt(m)."""
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
    shape = np.broadcast_shapes(view.shape, tuple(target))
    if 0 in shape:
        raise Refusal("nothing is left of the tensor")
    return [view.rearranged(np.broadcast_to(view.index, shape))]


@rule("Tile")
def tile(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """The tensor repeated along its axes: an element used m times counts sqrt(m)."""
    view = data_operand(inputs[0])
    repeats = integer_operand(inputs[1], "the repeats")
    if len(repeats) != len(view.shape) + 1 or min(repeats) < 1:
        raise Refusal(f"repeats {repeats} do not fit a tensor of {len(view.shape) + 1} axes")
    if repeats[0] != 1:
        raise Refusal("it repeats the batch axis")
    return [view.rearranged(np.tile(view.index, repeats[1:]))]


@rule("Where")
def where(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elements of two tensors by a constant mask: those that are taken, counted together. Exact."""
    mask_value, *branches = inputs
    if not isinstance(mask_value, Constant) or mask_value.depends_on_batch:
        raise Refusal("a mask that depends on the image jumps; it must be a constant")
    views = [branch for branch in branches if isinstance(branch, View)]
    rank = len(views[0].shape)
    if any(len(view.shape) != rank for view in views):
        raise Refusal("tensors of different ranks would broadcast across the batch")
    mask = _of_one_image(mask_value.array.astype(np.float64), rank) != 0.0
    numbers = [
        branch.center if isinstance(branch, View) else _of_one_image(float_operand(branch, "a branch"), rank)
        for branch in branches
    ]
    shape = np.broadcast_shapes(mask.shape, *(array.shape for array in numbers))
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
    facts = context.domain.joint(*taken)
    error_max = max(view.source.error_max for view in views)
    return [context.source(np.where(mask, *numbers), facts.lipschitz, facts.error, error_max)]


def _of_one_image(array: Array, rank: int) -> Array:
    """A constant without the batch axis."""
    if array.ndim == rank + 1:
        if array.shape[0] != 1:
            raise Refusal("a constant has its own batch axis")
        return array[0]
    if array.ndim > rank:
        raise Refusal("a constant has more axes than the image's tensor")
    return array


# --- rearrangements: nothing is computed ------------------------------------------------------------------------------


@rule("Identity", "Dropout", attributes=("seed",))
def identity(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """The identity (Dropout: its inference form)."""
    mode = optional_operand(inputs, 2)
    if mode is not None and not (isinstance(mode, Constant) and not mode.array.any()):
        raise Refusal("training_mode must be a constant false")
    return [data_operand(inputs[0]), Unknown("the mask of Dropout")]


@rule("Cast", attributes=("to", "saturate", "round_mode"))
def cast(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A cast to the graph's own format is the identity."""
    view = data_operand(inputs[0])
    wanted = {"float64": 11, "float32": 1}[context.precision.name]
    if int_attribute(node, "to", 0) != wanted:
        raise Refusal(f"a cast of data away from {context.precision.name}: the analysis covers one format per graph")
    return [view]


@rule("Flatten", attributes=("axis",))
def flatten(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    if int_attribute(node, "axis", 1) % (len(view.shape) + 1) != 1:
        raise Refusal("axis other than 1 would mix images")
    return [view.rearranged(view.index.reshape(-1))]


@rule("Reshape", attributes=("allowzero",))
def reshape(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry."""
    view = data_operand(inputs[0])
    target = integer_operand(inputs[1], "the new shape", batch_allowed=True)
    old = (context.batch, *view.shape)
    if not flag_attribute(node, "allowzero", 0):
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
def transpose(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry."""
    view = data_operand(inputs[0])
    permutation = node.attributes.get("perm")
    if not isinstance(permutation, (list, tuple)) or not permutation or permutation[0] != 0:
        raise Refusal("it moves the batch axis")
    return [view.rearranged(np.transpose(view.index, [int(axis) - 1 for axis in permutation[1:]]))]  # type: ignore[reportUnknownVariableType]


@rule("Squeeze")
def squeeze(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    if len(inputs) < 2:
        raise Refusal("it names no axes: a batch of one would be squeezed away")
    axes = tuple(image_axis(axis, view) for axis in integer_operand(inputs[1], "the axes"))
    if any(view.shape[axis] != 1 for axis in axes):
        raise Refusal("it squeezes an axis longer than 1")
    return [view.rearranged(np.squeeze(view.index, axes))]


@rule("Unsqueeze")
def unsqueeze(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    axes = integer_operand(inputs[1], "the axes")
    rank = len(view.shape) + 1 + len(axes)
    resolved = sorted(axis % rank for axis in axes)
    if resolved and resolved[0] == 0:
        raise Refusal("it puts an axis before the batch")
    return [view.rearranged(np.expand_dims(view.index, tuple(axis - 1 for axis in resolved)))]


@rule("Split", attributes=("axis", "num_outputs"))
def split(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Disjoint parts of one tensor: together they cost what it costs."""
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", 0), view)
    length = view.shape[axis]
    sizes_value = optional_operand(inputs, 1)
    if sizes_value is not None:
        sizes = integer_operand(sizes_value, "the sizes")
    else:
        parts = int_attribute(node, "num_outputs", len(node.outputs))
        chunk = -(-length // parts)
        sizes = [min(chunk, length - start) for start in range(0, length, chunk)]
    if sum(sizes) != length or len(sizes) != len(node.outputs):
        raise Refusal(f"sizes {sizes} do not split an axis of {length} into {len(node.outputs)}")
    bounds = np.cumsum(sizes)[:-1]
    return [view.rearranged(part) for part in np.split(view.index, bounds, axis=axis)]


@rule("Slice")
def slice_(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A part of a tensor, each element at most once: never expands."""
    view = data_operand(inputs[0])
    starts, ends = integer_operand(inputs[1], "starts"), integer_operand(inputs[2], "ends")
    axes_value, steps_value = optional_operand(inputs, 3), optional_operand(inputs, 4)
    axes = integer_operand(axes_value, "axes") if axes_value is not None else list(range(len(starts)))
    steps = integer_operand(steps_value, "steps") if steps_value is not None else [1] * len(starts)
    index = view.index
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        position = image_axis(axis, view)
        length = index.shape[position]
        # ONNX counts a negative end past the front once; numpy's slice needs None there.
        stop = (None if end < -length else end) if step <= 0 else min(end, length)
        index = index[(slice(None),) * position + (slice(start, stop, step),)]
    if index.size == 0:
        raise Refusal("nothing is left of the tensor")
    return [view.rearranged(index)]


@rule("Gather", attributes=("axis",))
def gather(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Elements picked by constant positions: an element used m times counts sqrt(m)."""
    view = data_operand(inputs[0])
    axis = image_axis(int_attribute(node, "axis", 0), view)
    numbers = integer_operand(inputs[1], "the positions")
    positions = np.array(numbers, dtype=np.int64).reshape(constant_shape(inputs[1]))
    length = view.shape[axis]
    if ((positions < -length) | (positions >= length)).any():
        raise Refusal(f"positions outside of an axis of {length}")
    return [view.rearranged(np.take(view.index, positions % length, axis=axis))]


@rule("Concat", attributes=("axis",))
def concat(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Stacked branches: parts of one tensor count together, different tensors add in squares."""
    views = [data_operand(value, "every operand") for value in inputs]
    axis = image_axis(int_attribute(node, "axis", 0), views[0])
    if all(view.source is views[0].source for view in views):
        return [views[0].rearranged(np.concatenate([view.index for view in views], axis=axis))]
    facts = context.domain.joint(*views)
    center = np.concatenate([view.center for view in views], axis=axis)
    error_max = max(view.source.error_max for view in views)
    step = LinearStep(
        operands=tuple(views),
        apply=lambda stacks: np.concatenate(stacks, axis=axis + 1),
        norm=1.0,
        spread=1.0,
        terms=1,
    )
    return [context.source(center, facts.lipschitz, facts.error, error_max, step=step)]


@rule("Pad", attributes=("mode",))
def pad(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Zeros cost nothing; an element that reflect, edge or wrap padding repeats m times counts sqrt(m)."""
    view = data_operand(inputs[0])
    mode = node.attributes.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise Refusal(f"mode {mode!r} has no proved rule")
    value = optional_operand(inputs, 2)
    if value is not None and float_operand(value, "the padding value").any():
        raise Refusal("a padding value other than 0")
    pads = integer_operand(inputs[1], "the pads")
    rank = len(view.shape) + 1
    axes_value = optional_operand(inputs, 3)
    axes = integer_operand(axes_value, "the axes") if axes_value is not None else list(range(rank))
    before, after = pads[: len(axes)], pads[len(axes) :]
    widths = [(0, 0)] * len(view.shape)
    for axis, low, high in zip(axes, before, after, strict=True):
        if low < 0 or high < 0:
            raise Refusal("negative pads; use Slice")
        if axis % rank == 0:
            if low or high:
                raise Refusal("it pads the batch axis")
            continue
        widths[image_axis(axis, view)] = (low, high)
    if mode == "constant":
        return [view.rearranged(np.pad(view.index, widths, mode="constant", constant_values=-1))]
    return [view.rearranged(np.pad(view.index, widths, mode=mode))]  # type: ignore[reportCallIssue, reportArgumentType]


@rule("SpaceToDepth", attributes=("blocksize",))
def space_to_depth(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    block = int_attribute(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or height % block or width % block:
        raise Refusal(f"a blocksize of {block} does not divide {height} x {width}")
    split_up = view.index.reshape(channels, height // block, block, width // block, block)
    return [view.rearranged(split_up.transpose(2, 4, 0, 1, 3).reshape(-1, height // block, width // block))]


@rule("DepthToSpace", attributes=("blocksize", "mode"))
def depth_to_space(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry."""
    view = data_operand(inputs[0])
    block = int_attribute(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or channels % (block * block):
        raise Refusal(f"a blocksize of {block} does not divide {channels} channels")
    depth = channels // (block * block)
    if node.attributes.get("mode", "DCR") == "DCR":
        moved = view.index.reshape(block, block, depth, height, width).transpose(2, 3, 0, 4, 1)
    else:
        moved = view.index.reshape(depth, block, block, height, width).transpose(0, 3, 1, 4, 2)
    return [view.rearranged(moved.reshape(depth, height * block, width * block))]
