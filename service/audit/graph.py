"""ONNX bytes to a list of nodes, and the operators that only move numbers.

Moves act on arrays with their batch axis, in the words of the ONNX specification, and are the same for constants and
for the elements of an image's tensor. That no move mixes the images of a batch is seen by moving batches of two
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from service.audit.exact import NotAuditableError

_OPSETS = range(13, 25)
_FLOATS = {int(onnx.TensorProto.DOUBLE): np.float64, int(onnx.TensorProto.FLOAT): np.float32}


@dataclass(frozen=True)
class Node:
    """One operator."""

    operator: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, object]

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise NotAuditableError(f"attribute {name} must be an integer")
        return value

    def number(self, name: str, default: float) -> float:
        """A number attribute. It is a float32, the default too: kernels in float64 compute with that number."""
        value = self.attributes.get(name, float(np.float32(default)))
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise NotAuditableError(f"attribute {name} must be a finite number")
        return float(value)

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """An attribute of as many integers as `default` has."""
        value = self.attributes.get(name, list(default))
        if not isinstance(value, list) or len(value) != len(default):
            raise NotAuditableError(f"attribute {name} must be a list of {len(default)} integers")
        return [int(entry) for entry in value]

    def text(self, name: str, default: str) -> str:
        """A text attribute."""
        value = self.attributes.get(name, default)
        return value if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Graph:
    """A classifier as its file describes it."""

    input_name: str
    input_shape: tuple[int, ...]
    """Without the batch axis."""
    batches: tuple[int, ...]
    """Batch sizes to probe moves with: the one that the file fixes, or two of any."""
    dtype: type[np.float64] | type[np.float32]
    output_name: str
    constants: dict[str, np.ndarray]
    nodes: tuple[Node, ...]


def read_graph(model_bytes: bytes) -> Graph:
    """Parse an ONNX model.

    Raises:
        NotAuditableError: it is none, or holds what this audit does not read.
    """
    try:
        model = onnx.load_model_from_string(model_bytes)
        if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
            raise NotAuditableError("weights are stored outside the file, where its digest does not reach")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise NotAuditableError(f"not a valid ONNX model ({str(error).strip().partition(chr(10))[0]})") from error
    versions = [imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in _OPSETS:
        raise NotAuditableError(f"opset {versions}: {_OPSETS.start} to {_OPSETS.stop - 1} are read here")
    graph = model.graph
    if model.functions or graph.sparse_initializer:
        raise NotAuditableError("functions of its own or sparse weights")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in constants.values()):
        raise NotAuditableError("a weight that is NaN or infinite")
    if len(graph.input) != 1 or len(graph.output) != 1 or graph.input[0].name in constants:
        raise NotAuditableError("exactly one input, the image, and one output, the logits, are read here")
    tensor = graph.input[0].type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
    if tensor.elem_type not in _FLOATS or len(sizes) < 2 or min(sizes[1:]) < 1:
        raise NotAuditableError("the input must be float64 or float32, of a fixed shape after the batch axis")
    return Graph(
        input_name=graph.input[0].name,
        input_shape=tuple(sizes[1:]),
        batches=(sizes[0],) if sizes[0] > 0 else (2, 3),
        dtype=_FLOATS[tensor.elem_type],
        output_name=graph.output[0].name,
        constants=constants,
        nodes=tuple(_node(proto) for proto in graph.node),
    )


def _node(proto: onnx.NodeProto) -> Node:
    attributes: dict[str, object] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        elif isinstance(value, (list, tuple)):
            value = list(value)
        attributes[attribute.name] = value
    operator = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}::{proto.op_type}"
    outputs = tuple(proto.output)
    return Node(
        operator, f"{operator} {proto.name or (outputs or ('',))[0]!r}", tuple(proto.input), outputs, attributes
    )


# --- moves ------------------------------------------------------------------------------------------------------------

Arrays = Sequence[np.ndarray | None]
Move = Callable[[Node, Arrays], list[np.ndarray]]

NOTHING = -1
"""Stands for the number 0 among the elements of a tensor: what zero padding adds."""


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


def _data(inputs: Arrays) -> np.ndarray:
    if not inputs or inputs[0] is None:
        raise NotAuditableError("an operand is missing")
    return inputs[0]


def _flatten(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array = _data(inputs)
    axis = node.integer("axis", 1)
    axis = axis + array.ndim if axis < 0 else axis
    return [array.reshape(math.prod(array.shape[:axis]), -1)]


def _reshape(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, target = _data(inputs), _integers(inputs, 1)
    if not node.integer("allowzero", 0):
        target = [array.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return [array.reshape(target)]


def _transpose(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array = _data(inputs)
    return [np.transpose(array, node.integers("perm", list(range(array.ndim))[::-1]))]


def _squeeze(node: Node, inputs: Arrays) -> list[np.ndarray]:
    return [np.squeeze(_data(inputs), tuple(_integers(inputs, 1)))]


def _unsqueeze(node: Node, inputs: Arrays) -> list[np.ndarray]:
    return [np.expand_dims(_data(inputs), tuple(_integers(inputs, 1)))]


def _split(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, axis = _data(inputs), node.integer("axis", 0)
    length, sizes = array.shape[axis], _whole(inputs, 1)
    if sizes is None:
        chunk = -(-length // node.integer("num_outputs", len(node.outputs)))
        sizes = [min(chunk, length - start) for start in range(0, length, chunk)]
    if sum(sizes) != length or len(sizes) != len(node.outputs):
        raise NotAuditableError(f"sizes {sizes} do not split an axis of {length}")
    return np.split(array, np.cumsum(sizes)[:-1].tolist(), axis=axis)


def _slice(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array = _data(inputs)
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
    array, axis, positions = _data(inputs), node.integer("axis", 0), inputs[1]
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
    array, pads, mode = _data(inputs), _integers(inputs, 1), node.text("mode", "constant")
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
        return [np.pad(array, widths, constant_values=NOTHING)]
    return [np.pad(array, widths, mode=mode)]  # type: ignore[reportCallIssue, reportArgumentType]


def _identity(node: Node, inputs: Arrays) -> list[np.ndarray]:
    training = inputs[2] if len(inputs) > 2 else None
    if training is not None and training.any():
        raise NotAuditableError("its training form")
    return [_data(inputs)]


def _space_to_depth(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, block = _data(inputs), node.integer("blocksize", 0)
    n, c, h, w = array.shape
    cut = array.reshape(n, c, h // block, block, w // block, block)
    return [cut.transpose(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)]


def _depth_to_space(node: Node, inputs: Arrays) -> list[np.ndarray]:
    array, block, mode = _data(inputs), node.integer("blocksize", 0), node.text("mode", "DCR")
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
    "Flatten": (_flatten, frozenset({"axis"})),
    "Gather": (_gather, frozenset({"axis"})),
    "Identity": (_identity, frozenset()),
    "Pad": (_pad, frozenset({"mode"})),
    "Reshape": (_reshape, frozenset({"allowzero"})),
    "Slice": (_slice, frozenset()),
    "SpaceToDepth": (_space_to_depth, frozenset({"blocksize"})),
    "Split": (_split, frozenset({"axis", "num_outputs"})),
    "Squeeze": (_squeeze, frozenset()),
    "Transpose": (_transpose, frozenset({"perm"})),
    "Unsqueeze": (_unsqueeze, frozenset()),
}
"""Operators that move numbers, with the attributes that are read."""

PICKS = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Moves that may act on a shape which holds the batch size: every entry of the result is one of the first operand's."""


@dataclass(frozen=True)
class Sized:
    """Integers among which the batch size stands: one array for each size in `Graph.batches`.

    They come from shapes and are only ever picked from, so that an entry is the batch size or the same for all sizes.
    """

    arrays: tuple[np.ndarray, ...]


def sized(arrays: Sequence[np.ndarray]) -> Sized | np.ndarray:
    """Integers found with each batch size; a constant where all agree."""
    agree = all(np.array_equal(arrays[0], other) for other in arrays[1:])
    return arrays[0] if agree else Sized(tuple(arrays))


def shape_of(node: Node, shape: Sequence[int]) -> np.ndarray:
    """What the operator Shape says of a tensor of this shape."""
    rank = len(shape)
    return np.array(shape[node.integer("start", 0) : node.integer("end", rank)], dtype=np.int64)


def folded(node: Node, inputs: Arrays) -> np.ndarray:
    """The value of a node whose operands are constants; only what is exact.

    Raises:
        NotAuditableError: it computes, or rounds.
    """
    if node.operator == "Constant":
        if set(node.attributes) != {"value"} or not isinstance(node.attributes["value"], np.ndarray):
            raise NotAuditableError("a constant that is no tensor")
        array = node.attributes["value"]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotAuditableError("a constant that is NaN or infinite")
        return array
    if node.operator == "Neg":
        return -_data(inputs)
    if node.operator == "Cast":
        return _cast(node, _data(inputs))
    if node.operator in _INTEGERS and len(inputs) == 2:
        left, right = (array for array in inputs)
        if left is not None and right is not None and left.dtype.kind == right.dtype.kind == "i":
            return _arithmetic(node.operator, left, right)
    raise NotAuditableError("arithmetic on constants has no rule here")


_INTEGERS: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Div": lambda a, b: a // b,
    "Mul": lambda a, b: a * b,
    "Sub": lambda a, b: a - b,
}


def _arithmetic(operator: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sizes computed from sizes."""
    one, other = np.broadcast_arrays(left, right)
    if operator == "Div" and ((one < 0) | (other < 1)).any():
        raise NotAuditableError("a quotient of integers that are not sizes")
    found = [_INTEGERS[operator](a, b) for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True)]
    if any(abs(number) >= 2**62 for number in found):
        raise NotAuditableError("integers too large for sizes")
    return np.array(found, dtype=np.int64).reshape(one.shape)


def _cast(node: Node, array: np.ndarray) -> np.ndarray:
    if node.integer("to", 0) == int(onnx.TensorProto.INT64) and array.dtype.kind == "i":
        return array.astype(np.int64)
    target = _FLOATS.get(node.integer("to", 0))
    if target is None or array.dtype.kind != "f":
        raise NotAuditableError("a cast to another type than float64 or float32")
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    if not np.array_equal(cast.astype(np.float64), array.astype(np.float64)):
        raise NotAuditableError("a cast that rounds a constant")
    return cast
