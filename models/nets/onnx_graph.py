"""A small builder of ONNX graphs, in which every node is written explicitly instead of traced.

The builder has only the features that `model.onnx` needs: one input `image` and one output `logits`, float64 values
with a dynamic batch axis, weights stored as float32 and cast to float64 (half the bytes, still exact numbers to the
certifier), names that depend on the order of calls only, so that the same network gives the same bytes.

Shapes in this module leave the batch axis out: a `Value` of shape `(1, 28, 28)` is `N x 1 x 28 x 28`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
from jaxtyping import Float64, Int64
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
IR_VERSION = 9
BATCH_AXIS = "N"


@dataclass(frozen=True)
class Value:
    """The name of a tensor in the graph and its shape without the batch axis."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements for one image."""
        return int(np.prod(self.shape, dtype=np.int64))


class GraphBuilder:
    """Collects nodes and initialisers in the order of the calls and serialises them deterministically."""

    image: Value
    """The input, float64."""

    def __init__(self, image_shape: Sequence[int]) -> None:
        self.image = Value("image", tuple(image_shape))
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._stacked: dict[str, list[Value]] = {}
        self._counts: dict[str, int] = {}

    def weight(self, array: Float64[np.ndarray, ...]) -> str:
        """Store float64 numbers that are exact in float32, as a float32 initialiser cast to float64.

        Raises:
            ValueError: a number is not representable in float32; fold the layer first.
        """
        single = array.astype(np.float32)
        if not np.array_equal(single.astype(np.float64), array):
            raise ValueError("the weight is not exact in float32: call fold() on the layer before it is emitted")
        stored, known = self._constant(single, "weight")
        double = f"{stored}_float64"
        if not known:
            self._nodes.append(helper.make_node("Cast", [stored], [double], name=double, to=TensorProto.DOUBLE))
        return double

    def float64(self, array: Float64[np.ndarray, ...]) -> str:
        """Store a float64 constant (biases, masks, means) and return its name."""
        return self._constant(np.asarray(array, dtype=np.float64), "constant")[0]

    def int64(self, array: Int64[np.ndarray, ...] | Sequence[int]) -> str:
        """Store an int64 constant (axes, shapes, indices) and return its name."""
        return self._constant(np.asarray(array, dtype=np.int64), "index")[0]

    def node(
        self, op: str, inputs: Sequence[Value | str], shape: Sequence[int], **attributes: int | Sequence[int]
    ) -> Value:
        """Add a node with one output and return it.

        Args:
            op: ONNX operator.
            inputs: values, or names of constants.
            shape: of the output, without the batch axis.
            attributes: of the operator.
        """
        return self.nodes(op, inputs, [shape], **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[Value | str], shapes: Sequence[Sequence[int]], **attributes: int | Sequence[int]
    ) -> list[Value]:
        """Add a node with several outputs and return them.

        Args:
            op: ONNX operator.
            inputs: values, or names of constants.
            shapes: one for each output, without the batch axis.
            attributes: of the operator.
        """
        name = self._fresh(op.lower())
        names = [name] if len(shapes) == 1 else [f"{name}_{i}" for i in range(len(shapes))]
        sources = [i.name if isinstance(i, Value) else i for i in inputs]
        self._nodes.append(helper.make_node(op, sources, names, name=name, **cast(dict[str, Any], attributes)))
        return [Value(n, tuple(s)) for n, s in zip(names, shapes, strict=True)]

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Reshape `N x x.shape` to `N x shape`."""
        # 0 copies the batch axis.
        return self.node("Reshape", [x, self.int64([0, *shape])], shape)

    def transpose(self, x: Value, axes: Sequence[int]) -> Value:
        """Permute the axes; `axes` counts the batch axis, which must stay first."""
        return self.node("Transpose", [x], [x.shape[a - 1] for a in axes[1:]], perm=list(axes))

    def stack(self, parts: Sequence[Value]) -> Value:
        """Concatenate values along their first axis behind the batch."""
        rows, *rest = zip(*(part.shape for part in parts), strict=True)
        whole = self.node("Concat", parts, [sum(rows), *(size for size, *_ in rest)], axis=1)
        self._stacked[whole.name] = list(parts)
        return whole

    def parts(self, x: Value) -> list[Value]:
        """Return the values of which `stack` made x, or x: who reads them spares a copy."""
        return self._stacked.get(x.name, [x])

    def build(self, logits: Value) -> bytes:
        """Leave out unread tensors, name the output, check and serialise; equal calls give equal bytes.

        Raises:
            onnx.checker.ValidationError: the graph is not valid ONNX.
        """
        read = {logits.name}
        for node in reversed(self._nodes):
            if read.intersection(node.output):
                read.update(node.input)
        self._nodes = [node for node in self._nodes if read.intersection(node.output)]
        for node in self._nodes:
            node.input[:] = ["logits" if name == logits.name else name for name in node.input]
            node.output[:] = ["logits" if name == logits.name else name for name in node.output]
        graph = helper.make_graph(
            self._nodes,
            "model",
            [_value_info(self.image)],
            [_value_info(Value("logits", logits.shape))],
            self._initialisers,
        )
        model = helper.make_model(
            graph,
            producer_name="lipcert",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)

    def _fresh(self, stem: str) -> str:
        self._counts[stem] = self._counts.get(stem, -1) + 1
        return f"{stem}_{self._counts[stem]}"

    def _constant(self, array: np.ndarray, stem: str) -> tuple[str, bool]:
        # Shapes and axes recur in every layer: equal content is stored once.
        key = (array.dtype.str, array.shape, array.tobytes())
        if key in self._constants:
            return self._constants[key], True
        name = self._fresh(stem)
        self._constants[key] = name
        self._initialisers.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name, False


def _value_info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, TensorProto.DOUBLE, [BATCH_AXIS, *value.shape])
