"""Models with one tensor outside the file, in every place where ONNX has tensors; the file with its numbers exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FILE = "numbers.bin"


def write_numbers(folder: Path) -> None:
    """Write the file that the tensors name."""
    (folder / FILE).write_bytes(np.full(3, 5.0).tobytes())


def _outside(name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.DOUBLE, dims=[3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=FILE)
    return tensor


def _model(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [*nodes, helper.make_node("Mul", ["image", "w"], ["logits"])],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.DOUBLE, ["N", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.DOUBLE, ["N", 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _initializer() -> onnx.ModelProto:
    model = _model()
    model.graph.initializer.append(_outside())
    return model


def _attribute() -> onnx.ModelProto:
    return _model(helper.make_node("Constant", [], ["w"], value=_outside()))


def _unused_attribute() -> onnx.ModelProto:
    model = _model(helper.make_node("Constant", [], ["unused"], value=_outside()))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "w"))
    return model


def _list_of_tensors() -> onnx.ModelProto:
    model = _model(helper.make_node("Constant", [], ["w"]))
    model.graph.node[0].attribute.append(helper.make_attribute("value", [_outside()]))
    return model


def _sparse(part: str) -> onnx.ModelProto:
    model = _model()
    values, indices = numpy_helper.from_array(np.ones(3), "w"), numpy_helper.from_array(np.arange(3), "i")
    sparse = helper.make_sparse_tensor(values, indices, [3])
    getattr(sparse, part).CopyFrom(_outside("w"))
    model.graph.sparse_initializer.append(sparse)
    return model


def _sparse_attribute() -> onnx.ModelProto:
    sparse = helper.make_sparse_tensor(_outside(), numpy_helper.from_array(np.arange(3), "i"), [3])
    return _model(helper.make_node("Constant", [], ["w"], sparse_value=sparse))


def _branch() -> onnx.ModelProto:
    held = helper.make_graph(
        [helper.make_node("Identity", ["in"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.DOUBLE, [3])],
    )
    held.initializer.append(_outside("in"))
    model = _model(helper.make_node("If", ["c"], ["w"], then_branch=held, else_branch=held))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    return model


def _function() -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["y"], value=_outside())
    model = _model(helper.make_node("F", [], ["w"], domain="own"))
    model.functions.append(helper.make_function("own", "F", [], ["y"], [node], [helper.make_opsetid("", 18)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def _training() -> onnx.ModelProto:
    model = _model()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "w"))
    model.training_info.add().initialization.initializer.append(_outside("v"))
    return model


OUTSIDE: dict[str, Callable[[], onnx.ModelProto]] = {
    "initializer": _initializer,
    "attribute": _attribute,
    "attribute of a node that is not needed": _unused_attribute,
    "list of tensors": _list_of_tensors,
    "values of a sparse initializer": lambda: _sparse("values"),
    "indices of a sparse initializer": lambda: _sparse("indices"),
    "sparse attribute": _sparse_attribute,
    "branch": _branch,
    "function": _function,
    "training": _training,
}
