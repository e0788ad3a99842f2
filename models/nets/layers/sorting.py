"""Activations that sort, and so preserve the norm of gradients."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.nets.layers.base import Layer
from models.nets.onnx_graph import GraphBuilder, Value


class GroupSort2(Layer):
    """Sort in groups of two: channel c of the first half with channel c of the second half. Constant: 1.

    `(a, b) -> (max(a, b), min(a, b))` permutes the coordinates, so the Jacobian is orthogonal wherever it
    exists (Anil, Lucas and Grosse, Sorting out Lipschitz function approximation, ICML 2019). At ties either
    order is a valid element of the generalised Jacobian.
    """

    def forward(self, x: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
        """Return `concat(max(a, b), min(a, b))` for the halves a, b of axis 1.

        Raises:
            ValueError: the number of channels is odd.
        """
        _require_even(x.shape[1])
        return _Sort.apply(x)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Split, Max, Min, Concat."""
        _require_even(x.shape[0])
        half = (x.shape[0] // 2, *x.shape[1:])
        split = graph.int64([half[0], half[0]])
        a, b = graph.nodes("Split", [x, split], [half, half], axis=1)
        upper, lower = graph.node("Max", [a, b], half), graph.node("Min", [a, b], half)
        return graph.node("Concat", [upper, lower], x.shape, axis=1)


class _Sort(torch.autograd.Function):
    """Sort of two halves with its adjoint: autograd would read both halves twice, and split the gradient of a tie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = x.chunk(2, dim=1)
        ctx.save_for_backward(a >= b)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        upper, lower = gradient.chunk(2, dim=1)
        return torch.cat([torch.where(kept, upper, lower), torch.where(kept, lower, upper)], dim=1)


class FullSort(Layer):
    """Sort all features of `N x D` in descending order. Constant: 1 (a permutation of the coordinates)."""

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return the features in descending order, the order of ONNX TopK."""
        return torch.sort(x, dim=1, descending=True).values

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write TopK of all features; its second output, their order, is not used."""
        count = graph.int64([x.shape[0]])
        return graph.nodes("TopK", [x, count], [x.shape, x.shape], axis=1, largest=1, sorted=1)[0]


def _require_even(channels: int) -> None:
    if channels % 2:
        raise ValueError(f"GroupSort2 pairs channels and needs an even number of them, not {channels}")
