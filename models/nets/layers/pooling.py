"""Pooling: norm, maximum or scaled average of windows or of whole channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.nets.layers.base import Layer, Pullback
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

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Write Reshape, ReduceL2; the adjoint is `g x / norm`."""
        C, h, k, w, _ = windowed_shape(x.shape, self.kernel_size)
        y, to_windows = _emit_norm(graph, graph.reshape(x, [C, h, k, w, k]), [3, 5])
        return y, lambda g: graph.reshape(to_windows(g), x.shape)


class GlobalMaxPool2d(Layer):
    """Largest value of each channel. Constant: 1 (`|max x - max y| <= max |x - y| <= ||x - y||`).

    It detects a feature that is strong at one place, wherever that is.
    """

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C 1 1"]:
        """Return the maximum over the pixels; at a tie the gradient goes to one of the largest."""
        return x.flatten(2).max(dim=2).values[:, :, None, None]

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Write Reshape, ReduceMax; the adjoint gives all to the first of the largest."""
        C, H, W = x.shape
        pixels = graph.reshape(x, [C, H * W])
        y = graph.node("ReduceMax", [pixels, graph.int64([2])], [C, 1], keepdims=1)

        def pullback(g: Value) -> Value:
            first = graph.node("ArgMax", [pixels], [C, 1], axis=2, keepdims=1)
            nothing = graph.node("Mul", [pixels, graph.float64(np.zeros(()))], pixels.shape)
            spread = graph.node("ScatterElements", [nothing, first, graph.reshape(g, [C, 1])], pixels.shape, axis=2)
            return graph.reshape(spread, x.shape)

        return graph.reshape(y, [C, 1, 1]), pullback


class GlobalL2Pool2d(Layer):
    """Euclidean norm of each channel. Constant: 1 (triangle inequality)."""

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C 1 1"]:
        """Return `sqrt(sum of squares)`; the gradient at an all-zero channel is taken as zero."""
        return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Write Reshape, ReduceL2; the adjoint is `g x / norm`."""
        C, H, W = x.shape
        y, to_pixels = _emit_norm(graph, graph.reshape(x, [C, H * W]), [2])
        return graph.reshape(y, [C, 1, 1]), lambda g: graph.reshape(to_pixels(graph.reshape(g, [C])), x.shape)


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

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Write Reshape, ReduceSum, Div; the adjoint spreads `g / k` over the window."""
        C, h, k, w, _ = windowed_shape(x.shape, self.kernel_size)
        windows = graph.reshape(x, [C, h, k, w, k])
        divisor = graph.float64(np.array(float(k)))
        total = graph.node("ReduceSum", [windows, graph.int64([3, 5])], [C, h, w], keepdims=0)
        y = graph.node("Div", [total, divisor], total.shape)

        def pullback(g: Value) -> Value:
            share = graph.reshape(graph.node("Div", [g, divisor], y.shape), [C, h, 1, w, 1])
            window = graph.float64(np.ones((1, 1, 1, k, 1, k)))
            return graph.reshape(graph.node("Mul", [share, window], windows.shape), x.shape)

        return y, pullback


def _emit_norm(graph: GraphBuilder, x: Value, axes: Sequence[int]) -> tuple[Value, Pullback]:
    """Write the Euclidean norm over `axes` (which count the batch axis); the adjoint is `g x / norm`, 0 at norm 0."""
    pooled = [size for axis, size in enumerate(x.shape, 1) if axis not in axes]
    spread = [1 if axis in axes else size for axis, size in enumerate(x.shape, 1)]
    y = graph.node("ReduceL2", [x, graph.int64(list(axes))], pooled, keepdims=0)

    def pullback(g: Value) -> Value:
        positive = graph.node("Max", [y, graph.float64(np.array(np.finfo(np.float64).tiny))], pooled)
        ratio = graph.reshape(graph.node("Div", [g, positive], pooled), spread)
        return graph.node("Mul", [x, ratio], x.shape)

    return y, pullback
