"""Weights of norm at most 1 that `models.layers` does not have, as modules that evaluate to a matrix or a kernel.

Only what the comparison of `docs/layers.md` needs. A `Dense` or `Convolution` takes any such module, so that all
rows of the table share everything but the parametrisation. `fold` and `emit` are as in `models.layers`, except that
only the forward graph is written: what is compared here is proved, not served.

Axes: N batch, D features in, O features or channels out, C channels in, H hidden features, k kernel size.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.layers import Affine, Layer, OrthogonalMatrix, Pullback
from models.onnx_graph import GraphBuilder, Value


class Weight(nn.Module):
    """A module without inputs whose value is a matrix O x D or a kernel O x C x k x k."""

    def forward(self) -> Tensor:
        """The weight in the precision of the parameters."""
        raise NotImplementedError

    def fold(self) -> Tensor:
        """The weight evaluated in float64, rounded to float32, held in float64."""
        with torch.no_grad():
            return copy.deepcopy(self).double()().float().double()


class QrMatrix(Weight):
    """The orthogonal factor of a QR decomposition, with the signs that make it unique (diagonal of R positive).

    Rows are orthonormal where they are fewer than the columns, else columns are.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(nn.init.orthogonal_(torch.empty(out_features, in_features)))

    def forward(self) -> Float[Tensor, "O D"]:
        """Q, or its transpose."""
        wide = self.raw.shape[0] < self.raw.shape[1]
        Q, R = torch.linalg.qr(self.raw.T if wide else self.raw)
        Q = Q * torch.where(R.diagonal() < 0.0, -1.0, 1.0)
        return Q.T if wide else Q


class AolMatrix(Weight):
    """Almost-orthogonal: the rows, or the columns where they are fewer, divided by the root of a row sum.

    `W = P D` with `D_ii = (sum_j |P^T P|_ij)^(-1/2)` has norm at most 1, since `D^-2 - P^T P` is diagonally dominant
    (Prach and Lampert, Almost-orthogonal layers for efficient general-purpose Lipschitz networks, ECCV 2022, theorem
    1). The norm of a matrix is that of its transpose, so the smaller of the two Gram matrices may be taken.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(nn.init.orthogonal_(torch.empty(out_features, in_features)))

    def forward(self) -> Float[Tensor, "O D"]:
        """The rescaled matrix."""
        axis = 0 if self.raw.shape[0] <= self.raw.shape[1] else 1
        gram = self.raw @ self.raw.T if axis == 0 else self.raw.T @ self.raw
        scale = gram.abs().sum(1).rsqrt()
        return self.raw * (scale[:, None] if axis == 0 else scale)


class AolKernel(Weight):
    """As `AolMatrix`, for a convolution of any image size: the sums go over channels and offsets (theorem 2 there).

    It starts as an orthogonal convolution: an orthogonal matrix whose channels are moved by one offset each.
    """

    def __init__(self, out_channels: int, in_channels: int, kernel_size: int) -> None:
        super().__init__()
        matrix_OC = nn.init.orthogonal_(torch.empty(out_channels, in_channels))
        place = torch.arange(max(out_channels, in_channels)) % kernel_size**2
        kernel = torch.zeros(out_channels, in_channels, kernel_size**2)
        # The offset belongs to the longer axis: the rows (columns) of the shorter stay orthonormal.
        if out_channels <= in_channels:
            kernel[:, torch.arange(in_channels), place] = matrix_OC
        else:
            kernel[torch.arange(out_channels), :, place] = matrix_OC
        self.raw = nn.Parameter(kernel.unflatten(2, (kernel_size, kernel_size)))

    def forward(self) -> Float[Tensor, "O C k k"]:
        """The rescaled kernel."""
        by_rows = self.raw.shape[0] <= self.raw.shape[1]
        scale = kernel_row_sums(self.raw if by_rows else self.raw.transpose(0, 1)).rsqrt()
        return self.raw * (scale[:, None, None, None] if by_rows else scale[:, None, None])


class PointKernel(Weight):
    """A 1 x 1 kernel: the Cayley transform of `models.layers`, orthonormal columns where it widens."""

    def __init__(self, out_channels: int, in_channels: int) -> None:
        super().__init__()
        self.matrix = OrthogonalMatrix(out_channels, in_channels)

    def forward(self) -> Float[Tensor, "O C 1 1"]:
        """The matrix with two more axes."""
        return self.matrix()[:, :, None, None]


def kernel_row_sums(
    kernel_OCkk: Float[Tensor, "O C k k"], log_weight_O: Float[Tensor, " O"] | None = None
) -> Float[Tensor, " O"]:
    """Absolute row sums of `A A^T` for the convolution A on an unbounded image: `sum_{o', offset} |G_oo'| q_o' / q_o`.

    `G[o, o', d] = sum_{c, s} K[o, c, s] K[o', c, s + d]`. On a zero-padded image of any size A A^T is a block of the
    unbounded one with some entries missing, so that its row sums are not larger.
    """
    gram = F.conv2d(kernel_OCkk, kernel_OCkk, padding=kernel_OCkk.shape[-1] - 1).abs().sum((2, 3))
    return gram.sum(1) if log_weight_O is None else (gram * torch.exp(log_weight_O - log_weight_O[:, None])).sum(1)


class Dense(Layer):
    """`W x + b` with W from a module. Constant: 1, as the module claims."""

    def __init__(self, weight: nn.Module, out_features: int) -> None:
        super().__init__()
        self.matrix = weight
        self.bias_O = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """The affine map."""
        return F.linear(x, self.matrix(), self.bias_O)

    def fold(self) -> Affine:
        """The same map with its matrix evaluated."""
        return Affine(self.matrix.fold(), self.bias_O.detach().double())

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """As `Affine`."""
        return self.fold().emit(graph, x)


class Convolution(Layer):
    """Zero-padded convolution of the size of its input, with the kernel from a module. Constant: 1, as it claims."""

    def __init__(self, weight: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.kernel = weight
        self.bias_O = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N O H W"]:
        """The convolution."""
        return F.conv2d(x, self.kernel(), self.bias_O, padding="same")

    def fold(self) -> FoldedConvolution:
        """The same map with its kernel evaluated."""
        return FoldedConvolution(self.kernel.fold(), self.bias_O.detach().double())

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """As `FoldedConvolution`."""
        return self.fold().emit(graph, x)


class FoldedConvolution(Layer):
    """Zero-padded convolution with an odd kernel that is given."""

    kernel_OCkk: Tensor
    bias_O: Tensor

    def __init__(self, kernel_OCkk: Float[Tensor, "O C k k"], bias_O: Float[Tensor, " O"]) -> None:
        super().__init__()
        self.register_buffer("kernel_OCkk", kernel_OCkk)
        self.register_buffer("bias_O", bias_O)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N O H W"]:
        """The convolution."""
        return F.conv2d(x, self.kernel_OCkk, self.bias_O, padding="same")

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """One Conv."""
        out, _, k, _ = self.kernel_OCkk.shape
        inputs = [x, graph.weight(_numpy(self.kernel_OCkk)), graph.float64(_numpy(self.bias_O))]
        return graph.node("Conv", inputs, (out, *x.shape[1:]), pads=[k // 2] * 4), _no_adjoint


class SllDense(Layer):
    """`x - 2 W^T T^-1 relu(W x + b)` with `T_ii = sum_j |W W^T|_ij q_j / q_i`, q > 0. Constant: 1.

    Source: Araujo, Havens, Delattre, Allauzen and Hu, A unified algebraic perspective on Lipschitz neural networks,
    ICLR 2023 (SDP-based Lipschitz layers): `T - W W^T` is positive semidefinite, and relu's slopes lie in [0, 1].
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.raw_HD = nn.Parameter(nn.init.xavier_normal_(torch.empty(hidden, features)))
        self.log_q_H = nn.Parameter(torch.zeros(hidden))
        self.bias_H = nn.Parameter(torch.zeros(hidden))

    def scaled(self) -> tuple[Float[Tensor, "H D"], Float[Tensor, " H"]]:
        """`T^-1/2 W` and `T^-1/2 b`: relu lets a positive factor pass, so T^-1 may stand half on either side."""
        gram = (self.raw_HD @ self.raw_HD.T).abs()
        scale = (gram * torch.exp(self.log_q_H - self.log_q_H[:, None])).sum(1).rsqrt()
        return scale[:, None] * self.raw_HD, scale * self.bias_H

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The residual step."""
        weight_HD, bias_H = self.scaled()
        return x - 2.0 * F.linear(F.relu(F.linear(x, weight_HD, bias_H)), weight_HD.T)

    def fold(self) -> FoldedSllDense:
        """The same map with its weights evaluated."""
        with torch.no_grad():
            weight_HD, bias_H = copy.deepcopy(self).double().scaled()
        return FoldedSllDense(weight_HD.float().double(), bias_H)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """As folded."""
        return self.fold().emit(graph, x)


class FoldedSllDense(Layer):
    """`x - 2 W^T relu(W x + b)`, W given."""

    weight_HD: Tensor
    bias_H: Tensor

    def __init__(self, weight_HD: Float[Tensor, "H D"], bias_H: Float[Tensor, " H"]) -> None:
        super().__init__()
        self.register_buffer("weight_HD", weight_HD)
        self.register_buffer("bias_H", bias_H)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The residual step."""
        return x - 2.0 * F.linear(F.relu(F.linear(x, self.weight_HD, self.bias_H)), self.weight_HD.T)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Gemm, Relu, MatMul, Sub."""
        weight, hidden = _numpy(self.weight_HD), [len(self.bias_H)]
        bias = graph.float64(_numpy(self.bias_H))
        before = graph.node("Gemm", [x, graph.weight(weight), bias], hidden, transB=1)
        active = graph.node("Relu", [before], hidden)
        step = graph.node("MatMul", [active, graph.weight(2.0 * weight)], x.shape)
        return graph.node("Sub", [x, step], x.shape), _no_adjoint


class SllConvolution(Layer):
    """`SllDense` with a zero-padded convolution for W and its adjoint for W^T. Constant: 1."""

    def __init__(self, channels: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        kernel = torch.empty(hidden, channels, kernel_size, kernel_size)
        self.raw_HCkk = nn.Parameter(nn.init.xavier_normal_(kernel))
        self.log_q_H = nn.Parameter(torch.zeros(hidden))
        self.bias_H = nn.Parameter(torch.zeros(hidden))

    def scaled(self) -> tuple[Float[Tensor, "H C k k"], Float[Tensor, " H"]]:
        """Kernel and bias times `T^-1/2`."""
        scale = kernel_row_sums(self.raw_HCkk, self.log_q_H).rsqrt()
        return scale[:, None, None, None] * self.raw_HCkk, scale * self.bias_H

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """The residual step."""
        return _convolution_step(x, *self.scaled())

    def fold(self) -> FoldedSllConvolution:
        """The same map with its weights evaluated."""
        with torch.no_grad():
            kernel, bias_H = copy.deepcopy(self).double().scaled()
        return FoldedSllConvolution(kernel.float().double(), bias_H)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """As folded."""
        return self.fold().emit(graph, x)


class FoldedSllConvolution(Layer):
    """`x - 2 K^T * relu(K * x + b)`, K given."""

    kernel_HCkk: Tensor
    bias_H: Tensor

    def __init__(self, kernel_HCkk: Float[Tensor, "H C k k"], bias_H: Float[Tensor, " H"]) -> None:
        super().__init__()
        self.register_buffer("kernel_HCkk", kernel_HCkk)
        self.register_buffer("bias_H", bias_H)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """The residual step."""
        return _convolution_step(x, self.kernel_HCkk, self.bias_H)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Conv, Relu, ConvTranspose, Sub."""
        kernel, hidden = _numpy(self.kernel_HCkk), (len(self.bias_H), *x.shape[1:])
        pads = [kernel.shape[-1] // 2] * 4
        bias = graph.float64(_numpy(self.bias_H))
        before = graph.node("Conv", [x, graph.weight(kernel), bias], hidden, pads=pads)
        active = graph.node("Relu", [before], hidden)
        step = graph.node("ConvTranspose", [active, graph.weight(2.0 * kernel)], x.shape, pads=pads)
        return graph.node("Sub", [x, step], x.shape), _no_adjoint


def _convolution_step(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    padding = kernel.shape[-1] // 2
    active = F.relu(F.conv2d(x, kernel, bias, padding=padding))
    return x - 2.0 * F.conv_transpose2d(active, kernel, padding=padding)


def _no_adjoint(_: Value) -> Value:
    raise NotImplementedError("the comparison proves forward graphs; no transport graph is written of these layers")


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()
