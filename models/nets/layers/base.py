"""The interface of all layers, and their composition."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from models.nets.onnx_graph import GraphBuilder, Value


class Layer(nn.Module):
    """A map with a known Lipschitz constant that can write itself as ONNX nodes."""

    lipschitz_constant: float = 1.0

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
        """Evaluate the layer on a batch.

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError

    def fold(self) -> Layer:
        """Return a float64 layer without parametrisation, whose weights are exact in float32."""
        return copy.deepcopy(self).double()

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write the forward nodes and return their value.

        Layers with weights are emitted as folded: the nodes compute the same function as `fold()`.

        Raises:
            NotImplementedError: by this base class.
        """
        raise NotImplementedError


class Chain(Layer):
    """Layers one after the other; its constant is the product of theirs."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lipschitz_constant = math.prod(layer.lipschitz_constant for layer in layers)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
        """Evaluate the layers in order."""
        for layer in self.layers:
            x = layer(x)
        return x

    def fold(self) -> Chain:
        """Return the chain of the folded layers."""
        return Chain([layer.fold() for layer in self._layers()])

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write the layers in order."""
        for layer in self._layers():
            x = layer.emit(graph, x)
        return x


def rounded_to_float32(weight: Tensor) -> Tensor:
    """Return a weight rounded to float32, held in float64."""
    return weight.float().double()


def float64_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a float64 array on the CPU."""
    return tensor.detach().cpu().double().numpy()
