"""Graphs to attack: shipped artefacts in other precisions and with planted biases, and random residual networks."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
from builders import Graphs
from graph_builder import GraphBuilder
from onnx import TensorProto, numpy_helper

from service.artefact.files import MODEL_FILE


def shipped(folder: Path) -> Graphs:
    """Return the graph of an artefact."""
    model_bytes = (folder / MODEL_FILE).read_bytes()
    graph = onnx.load_model_from_string(model_bytes).graph
    shape = tuple(axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim[1:])
    n_outputs = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    return Graphs(model_bytes, shape, n_outputs)  # type: ignore[arg-type]


def in_float32(graphs: Graphs) -> Graphs:
    """Return the network with every tensor in float32: weights are stored so already, biases are rounded."""

    model = onnx.load_model_from_string(graphs.model)
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
    return replace(graphs, model=model.SerializeToString(deterministic=True))


def with_planted_biases(graphs: Graphs, constant: float, half: bool) -> Graphs:
    """Return the graph with `constant` added to the bias of every hidden layer and compensated in the next bias.

    The compensation `W constant` is rounded once: in real arithmetic only the last roundings of the stored biases
    change; in floating point everything between the two biases passes through numbers as large as `constant`.

    Args:
        graphs: of a network whose hidden layers sort unit j with unit j + n / 2 of n.
        constant: the same for both units of a pair, so sorting preserves its order.
        half: add it to every second pair only.
    """
    model = onnx.load_model_from_string(graphs.model)
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
            total_M = [total + Fraction(constant) * int(a) for total, a in zip(total_M, added_M.tolist(), strict=True)]
        bias.CopyFrom(numpy_helper.from_array(np.array([float(t) for t in total_M]).astype(bias_M.dtype), bias.name))
    return replace(graphs, model=model.SerializeToString(deterministic=True))


def hadamard(size: int) -> np.ndarray:
    """Return the orthogonal matrix of Sylvester's construction; exact for sizes 1, 4, 16..."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def residual(channels: int, blocks: int, side: int, batch_normalisation: bool, seed: int = 0) -> bytes:
    """Return a residual float32 network of ten classes with random weights (He), `2 blocks` convolutions 3 x 3.

    A convolution 1 x 1 from 3 to `channels` stands in front; each block is `x + conv(relu(conv(x)))`; then ReLU, global
    average, affine head.

    Args:
        channels: of each convolution.
        blocks: residual blocks.
        side: of the image, in pixels.
        batch_normalisation: add a BatchNormalization after every 3 x 3 convolution.
        seed: of the weights.
    """
    g = GraphBuilder(np.random.default_rng(seed), np.float32)

    def convolution(value: str, inputs: int, size: int) -> str:
        kernel = g.rng.standard_normal((channels, inputs, size, size)) * np.sqrt(2.0 / (inputs * size * size))
        bias = [] if batch_normalisation and size == 3 else [g.constant(g.rng.standard_normal(channels) / 10)]
        value = g.one("Conv", value, g.constant(kernel), *bias, kernel_shape=[size, size], pads=[size // 2] * 4)
        if not bias:
            scale = g.rng.uniform(0.5, 1.5, channels)
            shift, mean = g.rng.standard_normal((2, channels)) / 10
            statistics = [scale, shift, mean, g.rng.uniform(0.5, 1.5, channels)]
            value = g.one("BatchNormalization", value, *map(g.constant, statistics), epsilon=1e-5)
        return value

    value = convolution("image", 3, 1)
    for _ in range(blocks):
        branch = convolution(g.one("Relu", convolution(value, channels, 3)), channels, 3)
        value = g.one("Add", value, branch)
    value = g.one("Flatten", g.one("GlobalAveragePool", g.one("Relu", value)), axis=1)
    head = g.constant(g.rng.standard_normal((10, channels)) / np.sqrt(channels))
    g.called(g.one("Gemm", value, head, g.constant(np.zeros(10)), transB=1), "logits")
    return g.build({"image": (3, side, side)}, {"logits": (10,)})
