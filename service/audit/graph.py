"""ONNX bytes to a list of nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import numpy_helper

from service.audit.balls import NotAuditableError

OPSETS = range(13, 25)
FLOATS = {int(onnx.TensorProto.DOUBLE): np.float64, int(onnx.TensorProto.FLOAT): np.float32}
"""Formats of data, by their ONNX number."""


@dataclass(frozen=True)
class Node:
    """One operator with its operands."""

    operator: str
    label: str
    """Operator and name, for messages."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, object]

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute.

        Raises:
            NotAuditableError: the attribute is no integer.
        """
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise NotAuditableError(f"attribute {name} must be an integer")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number attribute, a float32 as ONNX stores it; kernels compute with the float32 of a default, too.

        Raises:
            NotAuditableError: the attribute is no finite number.
        """
        value = self.attributes.get(name, float(np.float32(default)))
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise NotAuditableError(f"attribute {name} must be a finite number")
        return float(value)

    def integers(self, name: str, default: Sequence[int]) -> list[int]:
        """Return a list attribute as long as `default`.

        Raises:
            NotAuditableError: the attribute is no such list.
        """
        value = self.attributes.get(name, list(default))
        if not isinstance(value, list) or len(value) != len(default):
            raise NotAuditableError(f"attribute {name} must be a list of {len(default)} integers")
        return [int(entry) for entry in value]

    def text(self, name: str, default: str) -> str:
        """Return a text attribute."""
        value = self.attributes.get(name, default)
        return value if isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Graph:
    """A classifier as its file describes it."""

    input_name: str
    input_shape: tuple[int, ...]
    """Without the batch axis."""
    batches: tuple[int, ...]
    """Batch sizes to probe moves with: the one that the file fixes, or two arbitrary ones."""
    dtype: type[np.float64] | type[np.float32]
    output_name: str
    constants: dict[str, np.ndarray]
    nodes: tuple[Node, ...]


def read_graph(model_bytes: bytes) -> Graph:
    """Parse an ONNX model.

    Raises:
        NotAuditableError: the bytes are no valid model, or hold parts that this audit does not read.
    """
    try:
        model = onnx.load_model_from_string(model_bytes)
        # Before the checker and the conversion of tensors to arrays, which would look for the files.
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model)):
            raise NotAuditableError("weights are stored outside the file, where its digest does not reach")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise NotAuditableError(f"not a valid ONNX model ({str(error).strip().partition(chr(10))[0]})") from error
    versions = [imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        raise NotAuditableError(f"opset {versions}: {OPSETS.start} to {OPSETS.stop - 1} are read here")
    graph = model.graph
    if model.functions or graph.sparse_initializer:
        raise NotAuditableError("local functions or sparse weights")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in constants.values()):
        raise NotAuditableError("a weight that is NaN or infinite")
    if len(graph.input) != 1 or len(graph.output) != 1 or graph.input[0].name in constants:
        raise NotAuditableError("exactly one input, the image, and one output, the logits, are read here")
    tensor = graph.input[0].type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
    if tensor.elem_type not in FLOATS or len(sizes) < 2 or min(sizes[1:]) < 1:
        raise NotAuditableError("the input must be float64 or float32, of a fixed shape after the batch axis")
    return Graph(
        input_name=graph.input[0].name,
        input_shape=tuple(sizes[1:]),
        batches=(sizes[0],) if sizes[0] > 0 else (2, 3),
        dtype=FLOATS[tensor.elem_type],
        output_name=graph.output[0].name,
        constants=constants,
        nodes=tuple(_node(proto) for proto in graph.node),
    )


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model, wherever it is."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                yield from _tensors(part)


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
