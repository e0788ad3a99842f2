"""Graphs to attack: shipped artefacts in other precisions and with planted biases, and small networks whose distance to
the boundary is known.

Hidden layers sort pairs of units: unit j with unit j + n / 2 of n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.artefact.card import MODEL_FILE, TRANSPORT_FILE, Card, InputShape, write_artefact
from service.inference.classifier import Classifier

OPSET, IR_VERSION = 18, 9
Affine = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Graphs:
    """The two graphs of an artefact, and what its card has to say."""

    model: bytes
    transport: bytes
    shape: tuple[int, int, int]
    n_outputs: int

    def load(self, threads: int = 1) -> Classifier:
        """Certify and serve these bytes, from an artefact on disk that is gone afterwards."""
        channels, height, width = self.shape
        card = Card(
            name="attacked",
            labels=[f"class {k}" for k in range(max(2, self.n_outputs))],
            input=InputShape(channels=channels, height=height, width=width),
        )
        with TemporaryDirectory() as folder:
            write_artefact(Path(folder), card, self.model, self.transport)
            return Classifier.load(Path(folder), "cpu", threads)


def shipped(folder: Path) -> Graphs:
    """The graphs of an artefact."""
    model_bytes = (folder / MODEL_FILE).read_bytes()
    graph = onnx.load_model_from_string(model_bytes).graph
    shape = tuple(axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim[1:])
    n_outputs = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    return Graphs(model_bytes, (folder / TRANSPORT_FILE).read_bytes(), shape, n_outputs)  # type: ignore[arg-type]


def in_float32(graphs: Graphs) -> Graphs:
    """The same network with every tensor in float32: weights are stored so already, biases are rounded."""

    def convert(content: bytes) -> bytes:
        model = onnx.load_model_from_string(content)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.DOUBLE:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.DOUBLE:
                    attribute.i = TensorProto.FLOAT
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)

    return Graphs(convert(graphs.model), convert(graphs.transport), graphs.shape, graphs.n_outputs)


def with_planted_biases(graphs: Graphs, constant: float, half: bool) -> Graphs:
    """Add `constant` to the bias of every hidden layer and take `W constant` off the next bias, rounded once.

    In real arithmetic that changes nothing but the last roundings of the stored biases; in floating point everything
    between the two passes through numbers as large as `constant`. Both units of a pair get it, so sorting keeps its
    order; with `half`, only every second pair does.
    """

    def plant(content: bytes) -> bytes:
        model = onnx.load_model_from_string(content)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
        gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
        added_M = np.zeros(0)
        for layer, node in enumerate(gemms):
            weight_MN = numpy_helper.to_array(tensors[casts.get(node.input[1], node.input[1])])
            bias = tensors[node.input[2]]
            bias_M = numpy_helper.to_array(bias)
            total_M = [Fraction(value) for value in bias_M.tolist()]
            if layer > 0:
                total_M = [
                    total - Fraction(constant) * sum((Fraction(w) for w in row_N[added_M].tolist()), Fraction(0))
                    for total, row_N in zip(total_M, weight_MN, strict=True)
                ]
            if layer < len(gemms) - 1:
                added_M = np.ones(len(bias_M), bool)
                added_M[: len(bias_M) // 2 : 2] = not half
                added_M[len(bias_M) // 2 :: 2] = not half
                total_M = [
                    total + Fraction(constant) * int(a) for total, a in zip(total_M, added_M.tolist(), strict=True)
                ]
            bias.CopyFrom(
                numpy_helper.from_array(np.array([float(t) for t in total_M]).astype(bias_M.dtype), bias.name)
            )
        return model.SerializeToString(deterministic=True)

    return Graphs(plant(graphs.model), plant(graphs.transport), graphs.shape, graphs.n_outputs)


def dense(hidden: Sequence[Affine], head: Affine, shape: tuple[int, int, int], dtype: type) -> Graphs:
    """Layers `(W, b)`, each but the head followed by the sorting of pairs; numbers are rounded to `dtype`."""
    model, transport = _Writer(dtype), _Writer(dtype)
    model.network(hidden, head)
    pullback = transport.network(hidden, head)
    transport.node("Reshape", [pullback("margin_weights"), transport.constant(np.array([0, *shape]))], "gradient")
    outputs = len(head[1])
    return Graphs(
        model.build({"image": shape}, {"logits": (outputs,)}),
        transport.build({"image": shape, "margin_weights": (outputs,)}, {"logits": (outputs,), "gradient": shape}),
        shape,
        outputs,
    )


class _Writer:
    def __init__(self, dtype: type) -> None:
        self._dtype = dtype
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self._constants)}"
        value = value.astype(self._dtype) if value.dtype.kind == "f" else value
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: object) -> str:
        names = list(outputs) or [f"value_{len(self._nodes)}"]
        self._nodes.append(helper.make_node(operator, inputs, names, name=f"node_{len(self._nodes)}", **attributes))
        return names[0]

    def network(self, hidden: Sequence[Affine], head: Affine) -> Callable[[str], str]:
        """Emit the layers; the result emits the adjoint."""
        value = self.node("Flatten", ["image"], axis=1)
        sorts: list[tuple[str, str, str]] = []
        for weight_MN, bias_M in hidden:
            weight = self.constant(weight_MN)
            value = self.node("Gemm", [value, weight, self.constant(bias_M)], transB=1)
            left, right = self.halves(value, len(bias_M))
            sorts.append((weight, left, right))
            value = self.node("Concat", [self.node("Max", [left, right]), self.node("Min", [left, right])], axis=1)
        last = self.constant(head[0])
        self.node("Gemm", [value, last, self.constant(head[1])], "logits", transB=1)

        def pullback(weights: str) -> str:
            gradient = self.node("MatMul", [weights, last])
            for (weight, left, right), (_, bias_M) in zip(reversed(sorts), reversed(hidden), strict=True):
                order = self.node("GreaterOrEqual", [left, right])
                high, low = self.halves(gradient, len(bias_M))
                parts = [self.node("Where", [order, high, low]), self.node("Where", [order, low, high])]
                gradient = self.node("MatMul", [self.node("Concat", parts, axis=1), weight])
            return gradient

        return pullback

    def halves(self, value: str, size: int) -> tuple[str, str]:
        names = f"left_{len(self._nodes)}", f"right_{len(self._nodes)}"
        self.node("Split", [value, self.constant(np.array([size // 2, size - size // 2]))], *names, axis=1)
        return names

    def build(self, inputs: dict[str, Sequence[int]], outputs: dict[str, Sequence[int]]) -> bytes:
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self._dtype))

        def declared(values: dict[str, Sequence[int]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(name, element, ["N", *shape]) for name, shape in values.items()]

        graph = helper.make_graph(self._nodes, "network", declared(inputs), declared(outputs), self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def hadamard(size: int) -> np.ndarray:
    """The orthogonal matrix of Sylvester's construction; its entries `+-1 / sqrt(size)` are exact for 1, 4, 16..."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def residual(
    channels: int, blocks: int, side: int, batch_normalisation: bool, classes: int = 10, seed: int = 0
) -> bytes:
    """A residual float32 network for 3 x side x side images with random weights (He), `2 blocks` convolutions 3 x 3.

    A convolution 1 x 1 from 3 to `channels` stands in front; each block is `x + conv(relu(conv(x)))`, with a
    BatchNormalization after every 3 x 3 convolution if asked for; then ReLU, global average, affine head.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value.astype(np.float32), f"constant_{len(constants)}"))
        return constants[-1].name

    def node(operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = output or f"value_{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [name], name=f"node_{len(nodes)}", **attributes))
        return name

    def convolution(value: str, inputs: int, size: int) -> str:
        kernel = rng.standard_normal((channels, inputs, size, size)) * np.sqrt(2.0 / (inputs * size * size))
        bias = [] if batch_normalisation and size == 3 else [constant(rng.standard_normal(channels) / 10)]
        value = node("Conv", value, constant(kernel), *bias, kernel_shape=[size, size], pads=[size // 2] * 4)
        if not bias:
            statistics = [
                rng.uniform(0.5, 1.5, channels),
                rng.standard_normal(channels) / 10,
                rng.standard_normal(channels) / 10,
                rng.uniform(0.5, 1.5, channels),
            ]
            value = node("BatchNormalization", value, *map(constant, statistics), epsilon=1e-5)
        return value

    value = convolution("image", 3, 1)
    for _ in range(blocks):
        branch = convolution(node("Relu", convolution(value, channels, 3)), channels, 3)
        value = node("Add", value, branch)
    value = node("Flatten", node("GlobalAveragePool", node("Relu", value)), axis=1)
    head = constant(rng.standard_normal((classes, channels)) / np.sqrt(channels))
    node("Gemm", value, head, constant(np.zeros(classes)), output="logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)
