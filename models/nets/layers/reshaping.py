"""Permutations and rescalings of pixels: space-to-depth, flattening, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from models.nets.layers.base import Layer
from models.nets.onnx_graph import GraphBuilder, Value


class SpaceToDepth(Layer):
    """Move each k x k window into the channels: `C x H x W -> C k^2 x H/k x W/k`. Constant: 1.

    The order of channels is that of the operator of ONNX: `(i k + j) C + c`.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D A B"]:
        """Return the permuted pixels.

        Raises:
            ValueError: H or W is not a multiple of k.
        """
        C, h, k, w, _ = windowed_shape(tuple(x.shape[1:]), self.kernel_size)
        windows = x.reshape(x.shape[0], C, h, k, w, k)
        return windows.permute(0, 3, 5, 1, 2, 4).reshape(x.shape[0], C * k * k, h, w)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write SpaceToDepth."""
        C, h, k, w, _ = windowed_shape(x.shape, self.kernel_size)
        return graph.node("SpaceToDepth", [x], [C * k * k, h, w], blocksize=k)


class Flatten(Layer):
    """`N x C x H x W -> N x D`. Constant: 1."""

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N D"]:
        """Return the pixels in row-major order."""
        return x.flatten(1)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Flatten."""
        return graph.node("Flatten", [x], [x.size], axis=1)


class Normalize(Layer):
    """`(x - mean) / std` for each channel: a first layer, so that images stay in [0, 1] outside.

    Constant: `1 / min(std)`: the channel with the smallest std stretches most.

    Raises:
        ValueError: lengths differ, or an std is not positive.
    """

    def __init__(self, mean_C: Sequence[float], std_C: Sequence[float]) -> None:
        super().__init__()
        if len(mean_C) != len(std_C) or min(std_C) <= 0:
            raise ValueError(f"mean and std need one entry for each channel and std > 0, not {mean_C} and {std_C}")
        self.mean_C = tuple(float(m) for m in mean_C)
        self.std_C = tuple(float(s) for s in std_C)
        self.lipschitz_constant = 1.0 / min(self.std_C)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Return `(x - mean) / std`."""
        return (x - x.new_tensor(self.mean_C)[:, None, None]) / x.new_tensor(self.std_C)[:, None, None]

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Sub, Div."""
        mean = graph.float64(np.array(self.mean_C)[:, None, None])
        std = graph.float64(np.array(self.std_C)[:, None, None])
        return graph.node("Div", [graph.node("Sub", [x, mean], x.shape), std], x.shape)


def windowed_shape(shape: tuple[int, ...], k: int) -> tuple[int, int, int, int, int]:
    """Return the shape `(C, H/k, k, W/k, k)` of an image `(C, H, W)` cut into k x k windows.

    Raises:
        ValueError: H or W is not a multiple of k.
    """
    C, H, W = shape
    if H % k or W % k:
        raise ValueError(f"{H} x {W} is not a multiple of the window {k} x {k}: pad or crop the image first")
    return C, H // k, k, W // k, k
