"""Orthogonal convolutions: shift the channels, then mix them by an orthogonal matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.nets.layers.base import Chain, Layer, float64_array
from models.nets.layers.linear import OrthogonalMatrix
from models.nets.onnx_graph import GraphBuilder, Value
from models.parts import Parametrisation


class Shift2d(Layer):
    """Move each group of channels by one offset of a k x k neighbourhood; zeros enter at the border.

    Channel c belongs to group `c mod k^2`. For k = 3 the offsets are -1, 0, 1 in each direction, for k = 2
    they are -1, 0. Constant: 1, a permutation of the pixels followed by a mask. It is emitted as just that
    (Gather, Mul), which a certifier can bound without knowing the groups.
    """

    def __init__(self, kernel_size: Literal[2, 3] = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.offsets = [(dy, dx) for dy in range(-1, kernel_size - 1) for dx in range(-1, kernel_size - 1)]

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Return `y[n, c, i, j] = x[n, c, i - dy_c, j - dx_c]`, zero outside."""
        return _Shift.apply(x, self.offsets)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write a circular shift (Gather by a permutation) and a 0/1 mask."""
        source, mask = self._permutation(x.shape)
        inside = graph.float64(mask)
        flat = graph.reshape(x, [x.size])
        shifted = graph.node("Gather", [flat, graph.int64(source)], flat.shape, axis=1)
        return graph.reshape(graph.node("Mul", [shifted, inside], flat.shape), x.shape)

    def _permutation(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        C, H, W = shape
        pixel = np.arange(C * H * W, dtype=np.int64).reshape(shape)
        ones = np.ones((H, W))
        source, mask = np.empty_like(pixel), np.empty(shape)
        for c in range(C):
            dy, dx = self.offsets[c % len(self.offsets)]
            source[c] = np.roll(pixel[c], (dy, dx), (0, 1))
            mask[c] = np.pad(ones, 1)[1 - dy : 1 - dy + H, 1 - dx : 1 - dx + W]
        return source.ravel(), mask.ravel()


class _Shift(torch.autograd.Function):
    """Shift with its adjoint, a shift back, so that neither direction touches an element more than once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.offsets = offsets
        return _shifted(x, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _shifted(gradient, [(-dy, -dx) for dy, dx in ctx.offsets]), None


def _shifted(x: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
    H, W = x.shape[2:]
    y = torch.empty_like(x)
    for group, (dy, dx) in enumerate(offsets):
        part = slice(group, None, len(offsets))
        to_y, to_x = slice(max(dy, 0), H + min(dy, 0)), slice(max(dx, 0), W + min(dx, 0))
        from_y, from_x = slice(max(-dy, 0), H + min(-dy, 0)), slice(max(-dx, 0), W + min(-dx, 0))
        y[:, part, to_y, to_x] = x[:, part, from_y, from_x]
        # Where nothing comes from inside the image: before or behind the pixels that came.
        y[:, part, : to_y.start] = 0
        y[:, part, to_y.stop :] = 0
        y[:, part, :, : to_x.start] = 0
        y[:, part, :, to_x.stop :] = 0
    return y


class ChannelAffine(Layer):
    """`W x + b` along the channel axis at every pixel (a 1 x 1 convolution), weights given."""

    weight_OC: Tensor
    bias_O: Tensor

    def __init__(self, weight_OC: Float[Tensor, "O C"], bias_O: Float[Tensor, " O"]) -> None:
        super().__init__()
        self.register_buffer("weight_OC", weight_OC)
        self.register_buffer("bias_O", bias_O)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N O H W"]:
        """Return the 1 x 1 convolution."""
        return _mix_channels(x, self.weight_OC, self.bias_O)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write MatMul on `N x C x P`, since ONNX Runtime's CPU provider has no float64 Conv."""
        C, H, W = x.shape
        out = self.bias_O.shape[0]
        bias = graph.float64(float64_array(self.bias_O)[:, None])
        weight = graph.weight(float64_array(self.weight_OC))
        mixed = graph.node("MatMul", [weight, graph.reshape(x, [C, H * W])], [out, H * W])
        return graph.reshape(graph.node("Add", [mixed, bias], mixed.shape), [out, H, W])


class OrthogonalConv2d(Layer):
    """Zero-padded k x k convolution of norm at most 1: shift channel groups, mix them orthogonally.

    The layer is one factor of the block-orthogonal convolutions BCOP (Li et al., Preventing gradient attenuation in
    Lipschitz constrained convolutional networks, NeurIPS 2019) and the shift-and-mix of LipNeXt. Constant: 1
    (shift 1, orthogonal mixing 1); the norm is lost only where the shift pushes pixels over the border.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Literal[2, 3] = 3,
        parametrisation: Parametrisation = "cayley",
    ) -> None:
        super().__init__()
        self.shift = Shift2d(kernel_size)
        self.matrix = OrthogonalMatrix(out_channels, in_channels, parametrisation)
        self.bias_O = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N O H W"]:
        """Shift, mix, add the bias."""
        return _mix_channels(self.shift(x), self.matrix(), self.bias_O)

    def fold(self) -> Chain:
        """Return shift and mixing as two layers."""
        return Chain([self.shift.fold(), ChannelAffine(self.matrix.fold(), self.bias_O.detach().double())])

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write the nodes of `Shift2d`, then those of `ChannelAffine`."""
        return self.fold().emit(graph, x)


def _mix_channels(x: Tensor, weight_OC: Tensor, bias_O: Tensor) -> Tensor:
    return F.conv2d(x, weight_OC[:, :, None, None], bias_O)
