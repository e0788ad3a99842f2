"""Orthogonal convolutions: shift the channels, then mix them by an orthogonal matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.nets.layers.base import Chain, Layer, float64_array
from models.nets.layers.linear import OrthogonalMatrix
from models.nets.onnx_graph import GraphBuilder, Value
from models.parts import Parametrisation

CHANNEL_ORDER = 2
"""Version of the assignment of channels to offsets, in checkpoints; the first had neighbouring channels at different
offsets."""


class Shift2d(Layer):
    """Move each group of channels by one offset of a k x k neighbourhood; zeros enter at the border.

    Each half of the channels consists of k^2 runs of neighbouring channels, as equal as can be, one for each offset; in
    the second half they begin with the middle offset, so that the two channels of a pair that GroupSort2 sorted move to
    different places. For k = 3 the offsets are -1, 0, 1 in each direction, for k = 2 they are -1, 0.

    Constant: 1, a permutation of the pixels followed by a mask. It is emitted as just that, in long rows: a run of
    channels is one row of numbers, rolled by Split and Concat.
    """

    def __init__(self, kernel_size: Literal[2, 3] = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.offsets = [(dy, dx) for dy in range(-1, kernel_size - 1) for dx in range(-1, kernel_size - 1)]

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """Return `y[n, c, i, j] = x[n, c, i - dy_c, j - dx_c]`, zero outside."""
        return _Shift.apply(x, [*chain(*self.halves(x.shape[1]))])

    def halves(self, channels: int) -> list[list[Run]]:
        """Return the runs of each half of the channels, in order."""
        middle, count = (channels + 1) // 2, len(self.offsets)
        found: list[list[Run]] = []
        for start, size, turned in ((0, middle, 0), (middle, channels - middle, count // 2)):
            cuts = [start + size * k // count for k in range(count + 1)]
            offsets = self.offsets[turned:] + self.offsets[:turned]
            found.append([Run(slice(*cut), *at) for cut, at in zip(pairwise(cuts), offsets, strict=True)])
        return [[run for run in runs if run.size] for runs in found]

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write Split and Concat, which roll the pixels of each run as one row, and a 0/1 mask."""
        channels, height, width = x.shape
        halves, sources = self.halves(channels), graph.parts(x)
        if [source.shape[0] for source in sources] != [channels // 2, channels // 2]:
            sources, halves = [x], [[*chain(*halves)]]
        rolled: list[Value] = []
        mask = np.zeros(x.shape)
        for source, runs in zip(sources, halves, strict=True):
            sizes: list[int] = []
            order: list[int] = []
            for run in runs:
                mask[run.channels, *run.to(height, width)] = 1.0
                length = run.size * height * width
                ahead = -(run.dy * width + run.dx) % length
                order += [part + len(sizes) for part in ((1, 0) if ahead else (0,))]
                sizes += [ahead, length - ahead] if ahead else [length]
            row = graph.reshape(source, [source.size])
            pieces = graph.nodes("Split", [row, graph.int64(sizes)], [[size] for size in sizes], axis=1)
            rolled += [pieces[part] for part in order]
        flat = graph.stack(rolled)
        return graph.reshape(graph.node("Mul", [flat, graph.float64(mask.ravel())], flat.shape), x.shape)


class Run(NamedTuple):
    """Neighbouring channels that move by one offset."""

    channels: slice
    dy: int
    dx: int

    @property
    def size(self) -> int:
        """Number of channels."""
        return self.channels.stop - self.channels.start

    def to(self, height: int, width: int) -> tuple[slice, slice]:
        """Return the pixels that get one from inside the image."""
        return _overlap(self.dy, height), _overlap(self.dx, width)

    def back(self) -> Run:
        """Return the adjoint move."""
        return Run(self.channels, -self.dy, -self.dx)


def _overlap(distance: int, length: int) -> slice:
    return slice(max(distance, 0), max(length + min(distance, 0), 0))


class _Shift(torch.autograd.Function):
    """Shift with its adjoint, a shift back, so that neither direction touches an element more than once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: Sequence[Run]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.runs = runs
        return _shifted(x, runs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _shifted(gradient, [run.back() for run in ctx.runs]), None


def _shifted(x: Tensor, runs: Sequence[Run]) -> Tensor:
    H, W = x.shape[2:]
    y = torch.empty_like(x)
    for run in runs:
        to_y, to_x = run.to(H, W)
        from_y, from_x = run.back().to(H, W)
        part = y[:, run.channels]
        part[:, :, to_y, to_x] = x[:, run.channels, from_y, from_x]
        # Where nothing comes from inside the image: before or behind the pixels that came.
        part[:, :, : to_y.start] = 0
        part[:, :, to_y.stop :] = 0
        part[..., : to_x.start] = 0
        part[..., to_x.stop :] = 0
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
