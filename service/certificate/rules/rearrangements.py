"""Rules of operators that move every element once: isometries, exact. Notation as in `table`."""

import numpy as np

from service.certificate.rules.operands import Operands, data_operand, integer_operand
from service.certificate.rules.table import Context, rule
from service.certificate.values import Value
from service.network.operators import Operator


@rule("Reshape", attributes=("allowzero",))
def reshape(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch: every element once, an isometry.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    _, *shape = integer_operand(inputs[1], "the new shape")
    return [view.rearranged(view.index.reshape(shape))]


@rule("Transpose", attributes=("perm",))
def transpose(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch: every element once, an isometry.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    _, *order = node.integers("perm")
    return [view.rearranged(np.transpose(view.index, [axis - 1 for axis in order]))]


@rule("Split", attributes=("axis",))
def split(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """Disjoint parts of one tensor: together they cost as much as the tensor.

    Args: see `Rule`.
    """
    view = data_operand(inputs[0])
    bounds = np.cumsum(integer_operand(inputs[1], "the sizes"))[:-1]
    return [view.rearranged(part) for part in np.split(view.index, bounds, axis=node.integer("axis") - 1)]


@rule("SpaceToDepth", attributes=("blocksize",))
def space_to_depth(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch: every element once, an isometry.

    Args: see `Rule`.
    """
    view, block = data_operand(inputs[0]), node.integer("blocksize")
    channels, height, width = view.shape
    split_up = view.index.reshape(channels, height // block, block, width // block, block)
    return [view.rearranged(split_up.transpose(2, 4, 0, 1, 3).reshape(-1, height // block, width // block))]


@rule("DepthToSpace", attributes=("blocksize", "mode"))
def depth_to_space(context: Context, node: Operator, inputs: Operands) -> list[Value]:
    """A rearrangement that keeps the batch: every element once, an isometry.

    Args: see `Rule`.
    """
    view, block = data_operand(inputs[0]), node.integer("blocksize")
    channels, height, width = view.shape
    depth = channels // (block * block)
    if node.text("mode") == "DCR":
        moved = view.index.reshape(block, block, depth, height, width).transpose(2, 3, 0, 4, 1)
    else:
        moved = view.index.reshape(depth, block, block, height, width).transpose(0, 3, 1, 4, 2)
    return [view.rearranged(moved.reshape(depth, height * block, width * block))]
