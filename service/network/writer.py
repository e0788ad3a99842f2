"""`Network` -> canonical ONNX: fixed IR, the lowest opset with all operators, numbered names, no inner declarations.

Equal networks give equal bytes. The runtime runs these bytes with every graph optimisation off, so that each operator
here is one kernel there. The weights are the last field of the graph, each as it lies in memory: a written graph is a
list of pieces, bytes and arrays in turn, and nothing is copied before they are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from service.network.operators import ELEMENT_TYPES, Constant, Network, Operand, Operator, Tensor

OPSET = 18
IR_VERSION = 9
BATCH_AXIS = "N"
Piece = bytes | np.ndarray


def write(network: Network, inputs: Sequence[str] = ("image",), outputs: Sequence[str] = ("logits",)) -> bytes:
    """Return the serialised model.

    Args:
        network: the graph.
        inputs: names of its inputs.
        outputs: names of its outputs.
    """
    return joined(write_pieces(network, inputs, outputs))


def joined(pieces: Sequence[Piece]) -> bytes:
    """Return the bytes of a written graph."""
    # The arrays lie in memory as the file has them.
    return b"".join(piece if isinstance(piece, bytes) else piece.data for piece in pieces)


def write_pieces(network: Network, inputs: Sequence[str], outputs: Sequence[str]) -> list[Piece]:
    """Return the serialised model as pieces; the arrays are constants of the network.

    Args:
        network: the graph.
        inputs: names of its inputs.
        outputs: names of its outputs.
    """
    names = {tensor.number: f"t{tensor.number}" for operator in network.operators for tensor in operator.results}
    names |= {tensor.number: name for tensor, name in zip(network.inputs, inputs, strict=True)}
    given = {tensor.number for tensor in network.inputs}
    results = list(zip(network.outputs, outputs, strict=True))
    # An output that is an input as it stands needs a node of its own.
    passed = [(names[tensor.number], name) for tensor, name in results if tensor.number in given]
    names |= {tensor.number: name for tensor, name in results if tensor.number not in given}
    stored: dict[Constant, str] = {}

    def named(operand: Operand) -> str:
        if operand is None:
            return ""
        if isinstance(operand, Tensor):
            return names[operand.number]
        return stored.setdefault(operand, f"c{len(stored)}")

    nodes = [
        helper.make_node(
            operator.kind,
            [named(operand) for operand in operator.operands],
            [names[tensor.number] for tensor in operator.results],
            **_attributes(operator),
        )
        for operator in network.operators
    ]
    nodes += [helper.make_node("Identity", [source], [name]) for source, name in passed]
    element = ELEMENT_TYPES[network.precision]
    graph = helper.make_graph(
        nodes,
        "network",
        [_declared(name, tensor, element) for name, tensor in zip(inputs, network.inputs, strict=True)],
        [_declared(name, tensor, element) for name, tensor in zip(outputs, network.outputs, strict=True)],
    )
    opset = max([OPSET, *(_opset(operator) for operator in network.operators)])
    model = onnx.ModelProto(
        ir_version=IR_VERSION, producer_name="lipcert", opset_import=[helper.make_opsetid("", opset)]
    )
    parts: list[Piece] = [graph.SerializeToString(deterministic=True)]
    for constant, name in stored.items():
        parts += _weight(name, constant.array)
    return [
        model.SerializeToString(deterministic=True) + _start(onnx.ModelProto.GRAPH_FIELD_NUMBER, _size(parts)),
        *parts,
    ]


def _declared(name: str, tensor: Tensor, element: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, [BATCH_AXIS, *tensor.shape])


def _attributes(operator: Operator) -> dict[str, Any]:
    """Return the attributes to write: all but pool dilations of 1, for which older opsets have no attribute."""
    stated: dict[str, Any] = dict(operator.attributes)
    if operator.kind in ("AveragePool", "LpPool") and set(stated["dilations"]) == {1}:
        del stated["dilations"]
    return stated


def _opset(operator: Operator) -> int:
    if operator.kind == "AveragePool" and set(dict(operator.attributes)["dilations"]) != {1}:  # type: ignore[arg-type]
        return 19
    return OPSET


def _weight(name: str, array: np.ndarray) -> list[Piece]:
    """Return an initialiser of a graph, field and all."""
    element = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(dims=array.shape, data_type=element, name=name).SerializeToString(deterministic=True)
    tensor += _start(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, array.nbytes)
    # The format is little-endian.
    content = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return [_start(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(tensor) + array.nbytes) + tensor, content]


def _size(parts: Sequence[Piece]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)


def _start(field: int, length: int) -> bytes:
    """Return tag and length of a length-delimited field (Protocol Buffers, "Encoding")."""
    return _varint(field << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    groups: list[int] = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
