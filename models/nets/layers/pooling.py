"""Pooling: norm, maximum or scaled average of windows or of whole channels."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.nets.layers.base import Layer
from models.nets.layers.reshaping import windowed_shape
from models.nets.onnx_graph import GraphBuilder, Value


class L2Pool2d(Layer):
    """Euclidean norm of each non-overlapping k x k window. Constant: 1 (triangle inequality)."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C A B"]:
        """Return `sqrt(sum of squares)`; the gradient at an all-zero window is taken as zero.

        Raises:
            ValueError: H or W is not a multiple of k (an incomplete window would be lost).
        """
        windows = x.reshape(x.shape[0], *windowed_shape(tuple(x.shape[1:]), self.kernel_size))
        return torch.linalg.vector_norm(windows, dim=(3, 5))

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Reshape, ReduceL2."""
        C, h, k, w, _ = windowed_shape(x.shape, self.kernel_size)
        windows = graph.reshape(x, [C, h, k, w, k])
        return graph.node("ReduceL2", [windows, graph.int64([3, 5])], [C, h, w], keepdims=0)


class GlobalMaxPool2d(Layer):
    """Largest value of each channel. Constant: 1 (`|max x - max y| <= max |x - y| <= ||x - y||`).

    It detects a feature that is strong at one place, wherever that is.
    """

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C 1 1"]:
        """Return the maximum over the pixels; at a tie the gradient goes to one of the largest."""
        return x.flatten(2).max(dim=2).values[:, :, None, None]

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Reshape, ReduceMax, Reshape."""
        C, H, W = x.shape
        pixels = graph.reshape(x, [C, H * W])
        largest = graph.node("ReduceMax", [pixels, graph.int64([2])], [C, 1], keepdims=1)
        return graph.reshape(largest, [C, 1, 1])


class GlobalL2Pool2d(Layer):
    """Euclidean norm of each channel. Constant: 1 (triangle inequality)."""

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C 1 1"]:
        """Return `sqrt(sum of squares)`; the gradient at an all-zero channel is taken as zero."""
        return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Reshape, ReduceL2, Reshape."""
        C, H, W = x.shape
        norms = graph.node("ReduceL2", [graph.reshape(x, [C, H * W]), graph.int64([2])], [C], keepdims=0)
        return graph.reshape(norms, [C, 1, 1])


class ScaledAvgPool2d(Layer):
    """k times the average of each non-overlapping k x k window. Constant: 1.

    A window's sum has norm `sqrt(k^2) = k`; the sum divided by k has norm 1 (a plain average: 1/k).
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C A B"]:
        """Return `sum / k`.

        Raises:
            ValueError: H or W is not a multiple of k.
        """
        windows = x.reshape(x.shape[0], *windowed_shape(tuple(x.shape[1:]), self.kernel_size))
        return windows.sum(dim=(3, 5)) / self.kernel_size

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Reshape, ReduceSum, Div."""
        C, h, k, w, _ = windowed_shape(x.shape, self.kernel_size)
        windows = graph.reshape(x, [C, h, k, w, k])
        divisor = graph.float64(np.array(float(k)))
        total = graph.node("ReduceSum", [windows, graph.int64([3, 5])], [C, h, w], keepdims=0)
        return graph.node("Div", [total, divisor], total.shape)
