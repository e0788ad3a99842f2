"""Products of vectors and weights run with the weights on the left: the same numbers, for any number of images.

Weights are small integers and pixels multiples of 1/8, so that no sum is rounded.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph_builder import GraphBuilder

from service.network.adjoint import differentiate
from service.network.graphs import forward_graph, gradient_graph
from service.network.operators import Network
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine

N, M = 144, 120
"""Numbers before and behind the first product, more than 2^14 weights."""


def model(kind: str, bias: tuple[int, ...] | None = (M,), dtype: type = np.float64, **attributes: object) -> bytes:
    b = GraphBuilder(dtype=dtype)

    def integers(*shape: int) -> str:
        return b.constant(b.rng.integers(-2, 3, shape).astype(float))

    x = b.one("Flatten", "image")
    shape = (M, N) if attributes.get("transB") else (N, M)
    rest = [] if bias is None else [integers(*bias)]
    x = b.one(kind, x, integers(*shape), *rest, **attributes)
    x = b.one("Relu", x)
    return b.model((1, 12, 12), b.one("Gemm", x, integers(3, M), transB=1), 3)


MODELS = {
    "transB": model("Gemm", transB=1),
    "not transposed": model("Gemm"),
    "without bias": model("Gemm", None),
    "one number as bias": model("Gemm", (1,)),
    "a scalar as bias": model("Gemm", ()),
    "a row as bias": model("Gemm", (1, M)),
    "scaled": model("Gemm", transB=1, alpha=0.5, beta=-2.0),
    "MatMul": model("MatMul", None),
}


def kinds(network: Network) -> list[str]:
    return [node.op_type for node in onnx.load_model_from_string(forward_graph(network).content).graph.node]


@pytest.mark.parametrize("images", [1, 3, 20, 40])
@pytest.mark.parametrize("name", MODELS)
def test_products_with_the_weights_on_the_left_are_the_same_numbers(name: str, images: int) -> None:
    network = read(MODELS[name])
    assert kinds(network) == ["Reshape", "Gemm", "Transpose", "Relu", "Gemm"]
    random = np.random.default_rng(0)
    image = random.integers(0, 9, (images, 1, 12, 12)) / 8.0
    weights = random.integers(-3, 4, (images, 3)).astype(float)
    as_read = write(differentiate(network), ("image", "margin_weights"), ("logits", "gradient"))
    expected, found = (
        Engine(content, "cpu", 1).run(["logits", "gradient"], {"image": image, "margin_weights": weights})
        for content in (as_read, gradient_graph(network).content)
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    alone = Engine(forward_graph(network).content, "cpu", 1).run(["logits"], {"image": image})[0]
    np.testing.assert_array_equal(alone, expected[0])


def test_products_in_float32_stay_as_they_are() -> None:
    network = read(model("Gemm", dtype=np.float32))
    assert forward_graph(network).content == write(network)
