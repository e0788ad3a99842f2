"""Rules of operators that repeat or choose elements by a constant. Nothing is computed. Notation as in `rules`."""

import numpy as np

from service.certificate.graph import PROBE_BATCH, Node
from service.certificate.rules.table import (
    Array,
    Context,
    Operands,
    Refusal,
    data_operand,
    float_operand,
    integer_operand,
    rule,
)
from service.certificate.values import Constant, Value, View


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
