"""Operators that only move numbers, on arrays with their batch axis, as the ONNX specification describes them.

They act alike on constants and on the identities of an image's tensor, see `service.audit.network`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from service.audit.balls import NotAuditableError
from service.audit.graph import Node

Arrays = Sequence[np.ndarray | None]
Move = Callable[[Node, Arrays], list[np.ndarray]]

ZERO = -1
"""Identity of the number 0, which zero padding adds."""


def _whole(inputs: Arrays, position: int) -> list[int] | None:
    array = inputs[position] if position < len(inputs) else None
    if array is None:
        return None
    if array.dtype.kind not in "iu":
        raise NotAuditableError("an operand must be integers")
    return [int(entry) for entry in array.ravel()]


def _integers(inputs: Arrays, position: int) -> list[int]:
    found = _whole(inputs, position)
    if found is None:
        raise NotAuditableError("an operand is missing")
    return found


def first_operand(inputs: Arrays) -> np.ndarray:
    """Return the first operand.

    Raises:
        NotAuditableError: it is missing.
    """
    if not inputs or inputs[0] is None:
        raise NotAuditableError("an operand is missing")
    return inputs[0]


def _flatten(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array = first_operand(inputs)
    axis = node.integer("axis", 1)
    axis = axis + array.ndim if axis < 0 else axis
    return [array.reshape(math.prod(array.shape[:axis]), -1)]


def _reshape(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, target = first_operand(inputs), _integers(inputs, 1)
    if not node.integer("allowzero", 0):
        target = [array.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return [array.reshape(target)]


def _transpose(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array = first_operand(inputs)
    return [np.transpose(array, node.integers("perm", list(range(array.ndim))[::-1]))]


def _squeeze(node: Node, inputs: Arrays) -> list[np.ndarray]:
    return [np.squeeze(first_operand(inputs), tuple(_integers(inputs, 1)))]


def _unsqueeze(node: Node, inputs: Arrays) -> list[np.ndarray]:
    return [np.expand_dims(first_operand(inputs), tuple(_integers(inputs, 1)))]


def _split(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, axis = first_operand(inputs), node.integer("axis", 0)
    length, sizes = array.shape[axis], _whole(inputs, 1)
    if sizes is None:
        chunk = -(-length // node.integer("num_outputs", len(node.outputs)))
        sizes = [min(chunk, length - start) for start in range(0, length, chunk)]
    if sum(sizes) != length or len(sizes) != len(node.outputs):
        raise NotAuditableError(f"sizes {sizes} do not split an axis of {length}")
    return np.split(array, np.cumsum(sizes)[:-1].tolist(), axis=axis)


def _slice(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array = first_operand(inputs)
    starts, ends = _integers(inputs, 1), _integers(inputs, 2)
    axes = _whole(inputs, 3) or list(range(len(starts)))
    steps = _whole(inputs, 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = array.shape[axis]
        if step == 0:
            raise NotAuditableError("a step of 0")
        # The specification: add the length once to negative numbers, then clamp.
        start, end = (number + length if number < 0 else number for number in (start, end))
        if step > 0:
            chosen = range(min(max(start, 0), length), min(max(end, 0), length), step)
        else:
            chosen = range(min(max(start, 0), length - 1), min(max(end, -1), length - 1), step)
        array = np.take(array, np.array(list(chosen), dtype=np.int64), axis=axis)
    return [array]


def _gather(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, axis, positions = first_operand(inputs), node.integer("axis", 0), inputs[1]
    length = array.shape[axis]
    if (
        positions is None
        or positions.dtype.kind not in "iu"
        or not ((positions >= -length) & (positions < length)).all()
    ):
        raise NotAuditableError(f"the positions must be integers within an axis of {length}")
    return [np.take(array, positions.astype(np.int64) % length, axis=axis)]


def _concat(node: Node, inputs: Arrays) -> list[np.ndarray]:
    return [np.concatenate([array for array in inputs if array is not None], axis=node.integer("axis", 0))]


def _pad(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, pads, mode = first_operand(inputs), _integers(inputs, 1), node.text("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap") or min(pads, default=0) < 0:
        raise NotAuditableError(f"mode {mode!r} with pads {pads}")
    value = inputs[2] if len(inputs) > 2 else None
    if value is not None and value.any():
        raise NotAuditableError("a padding value other than 0")
    axes = _whole(inputs, 3) or list(range(array.ndim))
    widths = [(0, 0)] * array.ndim
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = (low, high)
    if mode == "constant":
        if array.dtype.kind != "i":
            raise NotAuditableError("padding of constants")
        return [np.pad(array, widths, constant_values=ZERO)]
    return [np.pad(array, widths, mode=mode)]  # type: ignore[reportCallIssue, reportArgumentType]


def _expand(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, target = first_operand(inputs), _integers(inputs, 1)
    return [np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(target)))]


def _tile(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, repeats = first_operand(inputs), _integers(inputs, 1)
    if len(repeats) != array.ndim or min(repeats, default=1) < 1:
        raise NotAuditableError(f"repeats {repeats} of {array.ndim} axes")
    return [np.tile(array, repeats)]


def _identity(node: Node, inputs: Arrays) -> list[np.ndarray]:
    training = inputs[2] if len(inputs) > 2 else None
    if training is not None and training.any():
        raise NotAuditableError("its training form")
    return [first_operand(inputs)]


def _space_to_depth(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, block = first_operand(inputs), node.integer("blocksize", 0)
    n, c, h, w = array.shape
    cut = array.reshape(n, c, h // block, block, w // block, block)
    return [cut.transpose(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)]


def _depth_to_space(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, block, mode = first_operand(inputs), node.integer("blocksize", 0), node.text("mode", "DCR")
    n, c, h, w = array.shape
    depth = c // (block * block)
    if mode == "DCR":
        moved = array.reshape(n, block, block, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    elif mode == "CRD":
        moved = array.reshape(n, depth, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        raise NotAuditableError(f"mode {mode!r}")
    return [moved.reshape(n, depth, h * block, w * block)]


MOVES: dict[str, tuple[Move, frozenset[str]]] = {
    "Concat": (_concat, frozenset({"axis"})),
    "DepthToSpace": (_depth_to_space, frozenset({"blocksize", "mode"})),
    "Dropout": (_identity, frozenset({"seed"})),
    "Expand": (_expand, frozenset()),
    "Flatten": (_flatten, frozenset({"axis"})),
    "Gather": (_gather, frozenset({"axis"})),
    "Identity": (_identity, frozenset()),
    "Pad": (_pad, frozenset({"mode"})),
    "Reshape": (_reshape, frozenset({"allowzero"})),
    "Slice": (_slice, frozenset()),
    "SpaceToDepth": (_space_to_depth, frozenset({"blocksize"})),
    "Split": (_split, frozenset({"axis", "num_outputs"})),
    "Squeeze": (_squeeze, frozenset()),
    "Tile": (_tile, frozenset()),
    "Transpose": (_transpose, frozenset({"perm"})),
    "Unsqueeze": (_unsqueeze, frozenset()),
}
"""Operators that move numbers, with the attributes that are read."""
