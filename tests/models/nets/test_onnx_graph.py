"""The builder of graphs writes exact weights, each once."""

import numpy as np
import onnx
import pytest

from models.nets.onnx_graph import GraphBuilder


def test_weights_that_are_not_exact_in_float32_are_not_emitted() -> None:
    with pytest.raises(ValueError, match="fold"):
        GraphBuilder((2,)).weight(np.array([[0.1]]))


def test_equal_constants_are_stored_once_and_equal_calls_give_equal_bytes() -> None:
    def build() -> bytes:
        graph = GraphBuilder((2,))
        x = graph.image
        for _ in range(2):
            x = graph.node("Mul", [x, graph.float64(np.array([0.5, 2.0]))], x.shape)
        return graph.build(x)

    assert build() == build()
    assert len(onnx.load_from_string(build()).graph.initializer) == 1
