"""Reading of ONNX bytes: a checked list of nodes and constants.

Everything that can be read in two ways is refused here: several inputs or outputs, other operator domains, external
weights, functions, number formats without an error analysis. All reasons are collected before anything is raised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from service.certificate.limits import fits, size_error
from service.certificate.rounding import FLOAT32, FLOAT64, Precision
from service.certificate.statement import UnsupportedGraphError

PROBE_BATCH = 2**61 - 1
"""Stands for the batch size N wherever a shape holds it: a prime that no tensor's dimension equals, nor any number that
a graph could name as one."""

PRECISIONS: dict[int, Precision] = {onnx.TensorProto.DOUBLE: FLOAT64, onnx.TensorProto.FLOAT: FLOAT32}

_OPSETS = range(13, 25)

_WHY_NOT: dict[int, str] = {
    onnx.TensorProto.FLOAT16: "float16 has too little precision for a certificate; export float64 (or float32)",
    onnx.TensorProto.BFLOAT16: "bfloat16 has too little precision for a certificate; export float64 (or float32)",
}


@dataclass(frozen=True)
class Node:
    """One operator of the graph, attributes decoded to Python values."""

    label: str
    """Operator, and the node's name or first output: its name in messages."""
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, object]
    proto: onnx.NodeProto


@dataclass(frozen=True)
class Graph:
    """An ONNX model as the analysis reads it."""

    input_names: tuple[str, ...]
    """One, unless `refusals` says otherwise."""
    input_shape: tuple[int, ...]
    """Without the batch axis, e.g. `(C, H, W)`; empty where the image cannot be analysed."""
    batch: int
    """The batch size of the graph's input; `PROBE_BATCH` where it is free."""
    precision: Precision
    output_name: str
    initializers: dict[str, NDArray[np.generic]]
    nodes: tuple[Node, ...]
    refusals: tuple[str, ...]
    """Obstacles to a proof that are known already; the operators are still visited, so that all obstacles are named."""


def _dimension(dimension: onnx.TensorShapeProto.Dimension) -> int | None:
    return dimension.dim_value if dimension.HasField("dim_value") and dimension.dim_value > 0 else None


def _attribute(attribute: onnx.AttributeProto) -> object:
    if attribute.ref_attr_name:
        raise ValueError("refers to an attribute of a function that the graph is not in")
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        if value.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("is stored outside the file, where its digest does not reach")
        return numpy_helper.to_array(value)
    return value


def _attributes(label: str, proto: onnx.NodeProto, reasons: list[str]) -> dict[str, object]:
    """Return the attributes by name; those that cannot be read are added to `reasons`."""
    found: dict[str, object] = {}
    for attribute in proto.attribute:
        try:
            found[attribute.name] = _attribute(attribute)
        except ValueError as error:
            reasons.append(f"{label}: attribute {attribute.name}: {error}")
    return found


def _type_name(data_type: int) -> str:
    try:
        return onnx.TensorProto.DataType.Name(data_type).lower()
    except ValueError:
        return f"type {data_type}"


def read_graph(model_bytes: bytes) -> Graph:
    """Return the graph of an ONNX model, checked.

    Raises:
        UnsupportedGraphError: not an ONNX model. All other obstacles are in `Graph.refusals`.
    """
    model = _parsed(model_bytes)
    graph = model.graph
    reasons = _refused_features(model)
    initializers = _initializers(graph, reasons)
    inputs = [value for value in graph.input if value.name not in initializers]
    if len(inputs) < len(graph.input):
        reasons.append("an initializer is also a graph input, so that a caller could replace the weight")
    input_shape, batch, precision = (), PROBE_BATCH, FLOAT64
    if len(inputs) != 1:
        reasons.append(f"{len(inputs)} inputs; the certifier needs exactly one, the image")
    else:
        input_shape, batch, precision = _image(inputs[0], reasons)
    if len(graph.output) != 1:
        reasons.append(f"{len(graph.output)} outputs; the certifier needs exactly one, the logits")
    return Graph(
        input_names=tuple(value.name for value in inputs),
        input_shape=input_shape,
        batch=batch,
        precision=precision,
        output_name=graph.output[0].name if graph.output else "",
        initializers=initializers,
        nodes=_nodes(graph.node, reasons),
        refusals=tuple(reasons),
    )


def _parsed(model_bytes: bytes) -> onnx.ModelProto:
    try:
        model = onnx.load_model_from_string(model_bytes)
        # Before the checker, which would look for the files.
        outside = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        if outside:
            raise UnsupportedGraphError(
                [
                    f"weight {name!r} is stored outside the file, where its digest does not reach; write one file: "
                    "onnx.save(onnx.load(FILE), FILE)"
                    for name in outside
                ]
            )
        onnx.checker.check_model(model_bytes)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedGraphError([f"not a valid ONNX model: {first_line}"]) from error
    return model


def _refused_features(model: onnx.ModelProto) -> list[str]:
    """Return why the model as a whole is refused: its opsets, functions, sparse weights."""
    reasons: list[str] = []
    opsets = [imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")]
    opset = opsets[-1] if opsets else 0
    if len(opsets) > 1:
        reasons.append(f"it imports several opsets of the standard operators, {opsets}: runtimes may take either")
    if opset not in _OPSETS:
        reasons.append(f"opset {opset}: the rules are proved for opsets {_OPSETS.start} to {_OPSETS.stop - 1}")
    if model.functions:
        reasons.append("the model defines its own functions; inline them before the export")
    if model.graph.sparse_initializer:
        reasons.append("sparse initializers; store them dense")
    return reasons


def _initializers(graph: onnx.GraphProto, reasons: list[str]) -> dict[str, NDArray[np.generic]]:
    found: dict[str, NDArray[np.generic]] = {}
    for tensor in graph.initializer:
        try:
            array = numpy_helper.to_array(tensor)
        except ValueError as error:
            reasons.append(f"weight {tensor.name!r}: {error}")
            continue
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            reasons.append(f"weight {tensor.name!r} holds NaN or infinity")
            continue
        found[tensor.name] = array
    return found


def _image(value: onnx.ValueInfoProto, reasons: list[str]) -> tuple[tuple[int, ...], int, Precision]:
    """Return shape (empty where it is refused), batch size and format of the input."""
    tensor_type = value.type.tensor_type
    element = tensor_type.elem_type
    batch, *shape = [_dimension(dimension) for dimension in tensor_type.shape.dim] or [None]
    if element not in PRECISIONS:
        why = _WHY_NOT.get(element, "the certifier has an error analysis for float64 and float32 only")
        reasons.append(f"input {value.name!r} is {_type_name(element)}: {why}")
    sizes = tuple(size for size in shape if size is not None)
    if not sizes or len(sizes) < len(shape):
        reasons.append(f"input {value.name!r} needs a fixed shape after the batch axis, found {[batch, *shape]}")
        sizes = ()
    elif not fits(*sizes):
        reasons.append(f"input {value.name!r}: image {size_error(math.prod(sizes))}")
        sizes = ()
    return sizes, batch or PROBE_BATCH, PRECISIONS.get(element, FLOAT64)


def _nodes(protos: Sequence[onnx.NodeProto], reasons: list[str]) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for proto in protos:
        label = f"{proto.op_type} {proto.name or (proto.output[0] if proto.output else '')!r}"
        standard = proto.domain in ("", "ai.onnx")
        nodes.append(
            Node(
                label=label,
                operator=proto.op_type if standard else f"{proto.domain}::{proto.op_type}",
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes=_attributes(label, proto, reasons),
                proto=proto,
            )
        )
    return tuple(nodes)
