"""`Network` -> canonical ONNX: fixed IR, the lowest opset with all operators, numbered names, no inner declarations.

Equal networks give equal bytes. The runtime runs these bytes with every graph optimisation off, so that each operator
here is one kernel there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.network.operators import Constant, Network, Operand, Operator, Tensor

OPSET = 18
IR_VERSION = 9
BATCH_AXIS = "N"
_ELEMENTS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


def write(network: Network, inputs: Sequence[str] = ("image",), outputs: Sequence[str] = ("logits",)) -> bytes:
    """Return the serialised model.

    Args:
        network: what to write.
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
    element = _ELEMENTS[network.precision]
    graph = helper.make_graph(
        nodes,
        "network",
        [_declared(name, tensor, element) for name, tensor in zip(inputs, network.inputs, strict=True)],
        [_declared(name, tensor, element) for name, tensor in zip(outputs, network.outputs, strict=True)],
        [numpy_helper.from_array(np.asarray(constant.array), name) for constant, name in stored.items()],
    )
    opset = max([OPSET, *(_opset(operator) for operator in network.operators)])
    model = helper.make_model(
        graph, producer_name="lipcert", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", opset)]
    )
    return model.SerializeToString(deterministic=True)


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
