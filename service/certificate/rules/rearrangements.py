"""Rules of operators that move every element once, and of the identity. Notation as in `table`."""

import math

import numpy as np

from service.certificate.graph import Node
from service.certificate.rules.operands import (
    Operands,
    Refusal,
    data_operand,
    flag_attribute,
    image_axis,
    int_attribute,
    integer_operand,
    optional_operand,
)
from service.certificate.rules.table import Context, rule
from service.certificate.values import Constant, Unknown, Value


@rule("Identity", "Dropout", attributes=("seed",))
def identity(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """The identity (Dropout: its inference form).

    Args: see `Rule`.

    Raises:
        Refusal: it is a training form.
    """
    mode = optional_operand(inputs, 2)
    if mode is not None and not (isinstance(mode, Constant) and not mode.array.any()):
        raise Refusal("training_mode must be a constant false")
    return [data_operand(inputs[0]), Unknown("the mask of Dropout")]


@rule("Cast", attributes=("to", "saturate", "round_mode"))
def cast(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A cast to the graph's own format is the identity.

    Args: see `Rule`.

    Raises:
        Refusal: it changes the format.
    """
    view = data_operand(inputs[0])
    wanted = {"float64": 11, "float32": 1}[context.precision.name]
    if int_attribute(node, "to", 0) != wanted:
        raise Refusal(f"a cast of data away from {context.precision.name}: the analysis covers one format per graph")
    return [view]


@rule("Flatten", attributes=("axis",))
def flatten(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: it would mix images.
    """
    view = data_operand(inputs[0])
    if int_attribute(node, "axis", 1) % (len(view.shape) + 1) != 1:
        raise Refusal("axis other than 1 would mix images")
    return [view.rearranged(view.index.reshape(-1))]


@rule("Reshape", attributes=("allowzero",))
def reshape(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch axis: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: the batch axis does not stay.
    """
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
    """A rearrangement that keeps the batch axis: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: it moves the batch axis.
    """
    view = data_operand(inputs[0])
    permutation = node.attributes.get("perm")
    if not isinstance(permutation, (list, tuple)) or not permutation or permutation[0] != 0:
        raise Refusal("it moves the batch axis")
    return [view.rearranged(np.transpose(view.index, [int(axis) - 1 for axis in permutation[1:]]))]  # type: ignore[reportUnknownVariableType]


@rule("Squeeze")
def squeeze(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: it may drop the batch axis, or an axis longer than 1.
    """
    view = data_operand(inputs[0])
    if len(inputs) < 2:
        raise Refusal("it names no axes: a batch of one would be squeezed away")
    axes = tuple(image_axis(axis, view) for axis in integer_operand(inputs[1], "the axes"))
    if any(view.shape[axis] != 1 for axis in axes):
        raise Refusal("it squeezes an axis longer than 1")
    return [view.rearranged(np.squeeze(view.index, axes))]


@rule("Unsqueeze")
def unsqueeze(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: it puts an axis before the batch.
    """
    view = data_operand(inputs[0])
    axes = integer_operand(inputs[1], "the axes")
    rank = len(view.shape) + 1 + len(axes)
    resolved = sorted(axis % rank for axis in axes)
    if resolved and resolved[0] == 0:
        raise Refusal("it puts an axis before the batch")
    return [view.rearranged(np.expand_dims(view.index, tuple(axis - 1 for axis in resolved)))]


@rule("Split", attributes=("axis", "num_outputs"))
def split(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """Disjoint parts of one tensor: together they cost as much as the tensor.

    Args: see `Rule`.

    Raises:
        Refusal: the sizes do not fit the axis.
    """
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


@rule("SpaceToDepth", attributes=("blocksize",))
def space_to_depth(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: the blocksize does not divide the image.
    """
    view = data_operand(inputs[0])
    block = int_attribute(node, "blocksize", 0)
    channels, height, width = view.shape
    if block < 1 or height % block or width % block:
        raise Refusal(f"a blocksize of {block} does not divide {height} x {width}")
    split_up = view.index.reshape(channels, height // block, block, width // block, block)
    return [view.rearranged(split_up.transpose(2, 4, 0, 1, 3).reshape(-1, height // block, width // block))]


@rule("DepthToSpace", attributes=("blocksize", "mode"))
def depth_to_space(context: Context, node: Node, inputs: Operands) -> list[Value]:
    """A rearrangement: every element once, an isometry.

    Args: see `Rule`.

    Raises:
        Refusal: the blocksize does not divide the channels.
    """
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
