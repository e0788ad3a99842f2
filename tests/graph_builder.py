"""One builder of ONNX graphs for tests and benchmarks, with onnx.helper alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

IR_VERSION = 9
Shape = Sequence[int]


@dataclass
class GraphBuilder:
    """Collects nodes and constants; floating-point constants are stored as `dtype`."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    dtype: type = np.float64
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0
    opset: int = 18

    def name(self, stem: str = "t") -> str:
        """Return a name that is not taken."""
        self.count += 1
        return f"{stem}{self.count}"

    def constant(self, array: np.ndarray) -> str:
        """Store a constant and return its name."""
        name = self.name("c")
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        """Add a node and return the names of its outputs."""
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names

    def one(self, operator: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output and return its name."""
        return self.add(operator, *inputs, **attributes)[0]

    def called(self, value: str, name: str) -> None:
        """Give a value another name, for an output."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))

    def model(self, input_shape: tuple[int, ...], output: str, output_size: int, batch: object = "N") -> bytes:
        """Return the graph from `image` to `logits`, without a check: it may be invalid on purpose."""
        self.called(output, "logits")
        return self._proto({"image": input_shape}, {"logits": (output_size,)}, batch).SerializeToString()

    def build(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> bytes:
        """Return the checked graph with these inputs and outputs; their shapes are without the batch axis."""
        proto = self._proto(inputs, outputs, "N")
        onnx.checker.check_model(proto, full_check=True)
        return proto.SerializeToString(deterministic=True)

    def _proto(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape], batch: object) -> onnx.ModelProto:
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        declared_inputs, declared_outputs = (
            [helper.make_tensor_value_info(name, element, [batch, *shape]) for name, shape in values.items()]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph(self.nodes, "test", declared_inputs, declared_outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=IR_VERSION)
