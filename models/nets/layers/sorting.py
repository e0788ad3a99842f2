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
        return graph.stack([upper, lower])


class _Sort(torch.autograd.Function):
    """Sort of two halves with its adjoint: autograd would read both halves twice, and split the gradient of a tie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = x.chunk(2, dim=1)
        ctx.save_for_backward(a >= b)
        y = torch.empty_like(x)
        upper, lower = y.chunk(2, dim=1)
        torch.maximum(a, b, out=upper)
        torch.minimum(a, b, out=lower)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return _exchanged(gradient, kept)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as long as a number, by its bytes."""


def _exchanged(gradient: Tensor, kept: Tensor) -> Tensor:
    """Return the halves of axis 1 with their elements exchanged where told so, bit for bit."""
    upper, lower = gradient.chunk(2, dim=1)
    result = torch.empty_like(gradient)
    if gradient.is_cuda:
        first, second = result.chunk(2, dim=1)
        torch.where(kept, upper, lower, out=first)
        torch.where(kept, lower, upper, out=second)
        return result
    # A choice by a mask takes a CPU five times as long: l ^ ((u ^ l) & mask) is u where the mask has all bits, else l.
    integer = _BITS[gradient.element_size()]
    upper, lower = upper.view(integer), lower.view(integer)
    first, second = result.view(integer).chunk(2, dim=1)
    difference = torch.bitwise_xor(upper, lower).bitwise_and_(kept.to(integer).neg_())
    torch.bitwise_xor(lower, difference, out=first)
    torch.bitwise_xor(upper, difference, out=second)
    return result


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
