"""Layers whose Lipschitz constant in the Euclidean norm is known, and their ONNX nodes.

Each layer states its constant in `lipschitz_constant`; all are 1 except `Normalize`, and a composition has at
most the product. That is the claim of the trainer; the proof is made from the exported bytes by
`service.certificate`.

A layer emits itself once, as a pair: the forward value and its pullback, the function that emits the adjoint
(the vector-Jacobian product) of that value. So `model.onnx` and `transport.onnx` come from the same lines.

Weights are trained in float32 through a parametrisation. `fold()` gives the layer that is served: the
parametrisation evaluated in float64, rounded to float32, held in float64.

Axes: N batch, C channels, H height, W width (A, B after pooling), D features, K classes, P pixels (H * W), O outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.nets.onnx_graph import GraphBuilder, Value

Pullback = Callable[[Value], Value]
Parametrisation = Literal["cayley", "stiefel"]


class Layer(nn.Module):
    """A map with a known Lipschitz constant that can write itself as ONNX nodes."""

    lipschitz_constant: float = 1.0

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
        """Evaluate the layer on a batch."""
        raise NotImplementedError

    def fold(self) -> Layer:
        """Return a float64 layer without parametrisation, whose weights are exact in float32."""
        return copy.deepcopy(self).double()

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Write the forward nodes; the returned pullback writes the adjoint nodes when called.

        Layers with weights are emitted as folded: what is written is what `fold()` evaluates.
        """
        raise NotImplementedError


def cayley(raw_OD: Float[Tensor, "O D"]) -> Float[Tensor, "O D"]:
    """Map any matrix to one with orthonormal rows (O <= D) or columns (O >= D).

    For a tall matrix `[U; V]` with U square and `A = U - U^T + V^T V`, the columns of
    `[(I - A)(I + A)^-1; -2 V (I + A)^-1]` are orthonormal (Trockman and Kolter, Orthogonalizing convolutional
    layers with the Cayley transform, ICLR 2021, section 4). `I + A` is always invertible, since the symmetric
    part of A is `V^T V >= 0`.
    """
    if raw_OD.shape[0] < raw_OD.shape[1]:
        return cayley(raw_OD.T).T
    n = raw_OD.shape[1]
    U, V = raw_OD[:n], raw_OD[n:]
    A = U - U.T + V.T @ V
    identity = torch.eye(n, dtype=raw_OD.dtype, device=raw_OD.device)
    inverse = torch.linalg.inv(identity + A)
    return torch.cat([(identity - A) @ inverse, -2.0 * V @ inverse])


def newton_schulz(near_OD: Float[Tensor, "O D"], iterations: int) -> Float[Tensor, "O D"]:
    """Pull a nearly orthogonal matrix back to its polar factor: `W <- 3/2 W - 1/2 W W^T W`.

    Converges, at the end quadratically, for singular values in (0, sqrt 3) (Bjorck and Bowie, SIAM Journal on
    Numerical Analysis 8, 1971).
    """
    for _ in range(iterations):
        if near_OD.shape[0] <= near_OD.shape[1]:
            near_OD = 1.5 * near_OD - 0.5 * (near_OD @ near_OD.T) @ near_OD
        else:
            near_OD = 1.5 * near_OD - 0.5 * near_OD @ (near_OD.T @ near_OD)
    return near_OD


class OrthogonalMatrix(nn.Module):
    """A trainable O x D matrix with orthonormal rows or columns, whichever are fewer.

    `cayley` keeps an unconstrained parameter and applies the Cayley transform in every forward pass. `stiefel`
    keeps the parameter itself orthogonal, which is up to `models.training.optimisers.StiefelMuon`.
    """

    def __init__(self, out_features: int, in_features: int, parametrisation: Parametrisation = "cayley") -> None:
        super().__init__()
        self.parametrisation: Parametrisation = parametrisation
        self.raw = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.orthogonal_(self.raw)

    def forward(self) -> Float[Tensor, "O D"]:
        """The matrix in the precision of the parameter, under autocast too: products in bfloat16 are not orthogonal."""
        if self.parametrisation == "stiefel":
            return self.raw
        with torch.autocast(self.raw.device.type, enabled=False):
            return cayley(self.raw)

    def fold(self) -> Float[Tensor, "O D"]:
        """The matrix evaluated in float64, rounded to float32, held in float64."""
        raw = self.raw.detach().double()
        return _exact_in_float32(cayley(raw) if self.parametrisation == "cayley" else newton_schulz(raw, 4))


def stiefel_matrices(network: nn.Module) -> list[OrthogonalMatrix]:
    """The matrices whose parameter itself is orthogonal and must be kept so by its optimiser."""
    return [m for m in network.modules() if isinstance(m, OrthogonalMatrix) and m.parametrisation == "stiefel"]


class Affine(Layer):
    """`x -> W x + b` on `N x D`, weights given: the folded form of the dense layers.

    The constant stated is the one of the layer it was folded from.
    """

    weight_OD: Tensor
    bias_O: Tensor

    def __init__(
        self, weight_OD: Float[Tensor, "O D"], bias_O: Float[Tensor, " O"], lipschitz_constant: float = 1.0
    ) -> None:
        super().__init__()
        self.lipschitz_constant = lipschitz_constant
        self.register_buffer("weight_OD", weight_OD)
        self.register_buffer("bias_O", bias_O)

    def weight(self) -> Float[Tensor, "O D"]:
        """The matrix W."""
        return self.weight_OD

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """`W x + b`."""
        return F.linear(x, self.weight_OD, self.bias_O)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """One Gemm; the adjoint is `g -> g W`."""
        W = graph.weight(_numpy(self.weight_OD))
        y = graph.node("Gemm", [x, W, graph.float64(_numpy(self.bias_O))], [self.bias_O.shape[0]], transB=1)
        return y, lambda g: graph.node("MatMul", [g, W], x.shape)


class OrthogonalDense(Layer):
    """Dense layer with orthogonal weights. Constant: 1, and it is attained (gradient norm preserving)."""

    def __init__(self, in_features: int, out_features: int, parametrisation: Parametrisation = "cayley") -> None:
        super().__init__()
        self.matrix = OrthogonalMatrix(out_features, in_features, parametrisation)
        self.bias_O = nn.Parameter(torch.zeros(out_features))

    def weight(self) -> Float[Tensor, "O D"]:
        """The orthogonal matrix."""
        return self.matrix()

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """`W x + b`."""
        return F.linear(x, self.matrix(), self.bias_O)

    def fold(self) -> Affine:
        """The same map with its matrix evaluated."""
        return Affine(self.matrix.fold(), self.bias_O.detach().double())

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """As `Affine`."""
        return self.fold().emit(graph, x)


class UnitHead(Layer):
    """Last layer: one row of unit norm for each class, so that every logit is 1-Lipschitz on its own.

    `lipschitz_constant` is the constant of each logit. The logit map as a whole may have up to `sqrt(K)`,
    which is why radii are computed from the pairs: `f_i - f_j` has the constant `||w_i - w_j|| <= 2`.
    """

    def __init__(self, in_features: int, classes: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(classes, in_features) / math.sqrt(in_features))
        self.bias_K = nn.Parameter(torch.zeros(classes))

    def weight(self) -> Float[Tensor, "K D"]:
        """The rows divided by their norms."""
        return F.normalize(self.raw, dim=1)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """`W x + b`."""
        return F.linear(x, self.weight(), self.bias_K)

    def fold(self) -> Affine:
        """The same map with its rows normalised."""
        return Affine(_exact_in_float32(F.normalize(self.raw.detach().double(), dim=1)), self.bias_K.detach().double())

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """As `Affine`."""
        return self.fold().emit(graph, x)


class Shift2d(Layer):
    """Move each group of channels by one offset of a k x k neighbourhood; what enters the image is zero.

    Channel c belongs to group `c mod k^2`. For k = 3 the offsets are -1, 0, 1 in each direction, for k = 2
    they are -1, 0. Constant: 1, a permutation of the pixels followed by a mask. It is emitted as just that
    (Gather, Mul), which any certifier bounds without looking at groups.
    """

    def __init__(self, kernel_size: Literal[2, 3] = 3) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.offsets = [(dy, dx) for dy in range(-1, kernel_size - 1) for dx in range(-1, kernel_size - 1)]

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """`y[n, c, i, j] = x[n, c, i - dy_c, j - dx_c]`, zero outside."""
        return _Shift.apply(x, self.offsets)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Circular shift (Gather by a permutation) and a 0/1 mask; the adjoint masks and permutes back."""
        source, mask = self._permutation(x.shape)
        inverse = np.argsort(source)
        mask_name = graph.float64(mask)

        def gather(value: Value, index: np.ndarray) -> Value:
            return graph.node("Gather", [value, graph.int64(index)], value.shape, axis=1)

        flat = graph.reshape(x, [x.size])
        y = graph.reshape(graph.node("Mul", [gather(flat, source), mask_name], flat.shape), x.shape)

        def pullback(g: Value) -> Value:
            masked = graph.node("Mul", [graph.reshape(g, [x.size]), mask_name], [x.size])
            return graph.reshape(gather(masked, inverse), x.shape)

        return y, pullback

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
    """The adjoint moves back, so that neither direction touches an element more than once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.offsets = offsets
        return _shifted(x, offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _shifted(gradient, [(-dy, -dx) for dy, dx in ctx.offsets]), None


def _shifted(x: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
    H, W = x.shape[2:]
    y = torch.zeros_like(x)
    for group, (dy, dx) in enumerate(offsets):
        part = slice(group, None, len(offsets))
        to_y, to_x = slice(max(dy, 0), H + min(dy, 0)), slice(max(dx, 0), W + min(dx, 0))
        from_y, from_x = slice(max(-dy, 0), H + min(-dy, 0)), slice(max(-dx, 0), W + min(-dx, 0))
        y[:, part, to_y, to_x] = x[:, part, from_y, from_x]
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
        """The 1 x 1 convolution."""
        return _mix_channels(x, self.weight_OC, self.bias_O)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """MatMul on `N x C x P`, since ONNX Runtime's CPU provider has no float64 Conv."""
        C, H, W = x.shape
        out = self.bias_O.shape[0]
        weight = _numpy(self.weight_OC)
        bias = graph.float64(_numpy(self.bias_O)[:, None])
        mixed = graph.node("MatMul", [graph.weight(weight), graph.reshape(x, [C, H * W])], [out, H * W])
        y = graph.reshape(graph.node("Add", [mixed, bias], mixed.shape), [out, H, W])

        def pullback(g: Value) -> Value:
            flat = graph.reshape(g, [out, H * W])
            back = graph.node("MatMul", [graph.weight(np.ascontiguousarray(weight.T)), flat], [C, H * W])
            return graph.reshape(back, x.shape)

        return y, pullback


class OrthogonalConv2d(Layer):
    """Zero-padded k x k convolution of norm at most 1: shift channel groups, mix them orthogonally.

    It is one factor of the block-orthogonal convolutions BCOP (Li et al., Preventing gradient attenuation in
    Lipschitz constrained convolutional networks, NeurIPS 2019) and the shift-and-mix of LipNeXt. Constant: 1
    (shift 1, orthogonal mixing 1); only what the shift pushes over the border is lost.
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
        """Shift and mixing as layers of their own."""
        return Chain([self.shift.fold(), ChannelAffine(self.matrix.fold(), self.bias_O.detach().double())])

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """The nodes of `Shift2d`, then those of `ChannelAffine`."""
        return self.fold().emit(graph, x)


class Chain(Layer):
    """Layers one after the other; its constant is the product of theirs."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.lipschitz_constant = math.prod(layer.lipschitz_constant for layer in layers)

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N ..."]:
        """The composition."""
        for layer in self.layers:
            x = layer(x)
        return x

    def fold(self) -> Chain:
        """The chain of the folded layers."""
        return Chain([layer.fold() for layer in self._layers()])

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Forward in order; the adjoint in reverse order."""
        pullbacks: list[Pullback] = []
        for layer in self._layers():
            x, pullback = layer.emit(graph, x)
            pullbacks.append(pullback)

        def reverse(g: Value) -> Value:
            for pullback in reversed(pullbacks):
                g = pullback(g)
            return g

        return x, reverse


class GroupSort2(Layer):
    """Sort in groups of two: channel c of the first half with channel c of the second half. Constant: 1.

    `(a, b) -> (max(a, b), min(a, b))` permutes the coordinates, so the Jacobian is orthogonal wherever it
    exists (Anil, Lucas and Grosse, Sorting out Lipschitz function approximation, ICML 2019). At ties either
    order is a valid element of the generalised Jacobian.
    """

    def forward(self, x: Float[Tensor, "N C ..."]) -> Float[Tensor, "N C ..."]:
        """`concat(max(a, b), min(a, b))` for the halves a, b of axis 1."""
        _require_even(x.shape[1])
        return _Sort.apply(x)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Split, Max, Min, Concat; the adjoint undoes the permutation with Where."""
        _require_even(x.shape[0])
        half = (x.shape[0] // 2, *x.shape[1:])
        split = graph.int64([half[0], half[0]])
        a, b = graph.nodes("Split", [x, split], [half, half], axis=1)
        y = graph.node("Concat", [graph.node("Max", [a, b], half), graph.node("Min", [a, b], half)], x.shape, axis=1)

        def pullback(g: Value) -> Value:
            kept = graph.node("GreaterOrEqual", [a, b], half)
            upper, lower = graph.nodes("Split", [g, split], [half, half], axis=1)
            to_a = graph.node("Where", [kept, upper, lower], half)
            to_b = graph.node("Where", [kept, lower, upper], half)
            return graph.node("Concat", [to_a, to_b], x.shape, axis=1)

        return y, pullback


class _Sort(torch.autograd.Function):
    """Autograd would go through both halves twice, and split the gradient of a tie."""

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
        """Descending order, the order of ONNX TopK."""
        return torch.sort(x, dim=1, descending=True).values

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """TopK of all; the adjoint scatters the cotangent to where the values came from."""
        y, order = graph.nodes("TopK", [x, graph.int64([x.shape[0]])], [x.shape, x.shape], axis=1, largest=1, sorted=1)
        # Every place is written once, so the data that ScatterElements starts from does not matter.
        return y, lambda g: graph.node("ScatterElements", [g, order, g], x.shape, axis=1)


class L2Pool2d(Layer):
    """Euclidean norm of each non-overlapping k x k window. Constant: 1 (triangle inequality)."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C A B"]:
        """`sqrt(sum of squares)`; the gradient at an all-zero window is taken as zero.

        Raises:
            ValueError: H or W is not a multiple of k (an incomplete window would be dropped).
        """
        windows = x.reshape(x.shape[0], *_windows(tuple(x.shape[1:]), self.kernel_size))
        return torch.linalg.vector_norm(windows, dim=(3, 5))

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Reshape, ReduceL2; the adjoint is `g x / norm`."""
        C, h, k, w, _ = _windows(x.shape, self.kernel_size)
        y, to_windows = _emit_norm(graph, graph.reshape(x, [C, h, k, w, k]), [3, 5])
        return y, lambda g: graph.reshape(to_windows(g), x.shape)


class GlobalMaxPool2d(Layer):
    """Largest value of each channel, wherever it is. Constant: 1 (a maximum moves no further than what it is taken of).

    As a detector: one place where a feature is strong is enough.
    """

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C 1 1"]:
        """`max` over the pixels; at a tie the gradient goes to one of the largest."""
        return x.flatten(2).max(dim=2).values[:, :, None, None]

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Reshape, ReduceMax; the adjoint gives all to the first of the largest."""
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
        """`sqrt(sum of squares)`; the gradient at an all-zero channel is taken as zero."""
        return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Reshape, ReduceL2; the adjoint is `g x / norm`."""
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
        """`sum / k`.

        Raises:
            ValueError: H or W is not a multiple of k.
        """
        windows = x.reshape(x.shape[0], *_windows(tuple(x.shape[1:]), self.kernel_size))
        return windows.sum(dim=(3, 5)) / self.kernel_size

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Reshape, ReduceSum, Div; the adjoint spreads `g / k` over the window."""
        C, h, k, w, _ = _windows(x.shape, self.kernel_size)
        windows = graph.reshape(x, [C, h, k, w, k])
        divisor = graph.float64(np.array(float(k)))
        total = graph.node("ReduceSum", [windows, graph.int64([3, 5])], [C, h, w], keepdims=0)
        y = graph.node("Div", [total, divisor], total.shape)

        def pullback(g: Value) -> Value:
            share = graph.reshape(graph.node("Div", [g, divisor], y.shape), [C, h, 1, w, 1])
            window = graph.float64(np.ones((1, 1, 1, k, 1, k)))
            return graph.reshape(graph.node("Mul", [share, window], windows.shape), x.shape)

        return y, pullback


class SpaceToDepth(Layer):
    """Move each k x k window into the channels: `C x H x W -> C k^2 x H/k x W/k`. Constant: 1.

    The order of channels is that of `torch.nn.PixelUnshuffle`: `c k^2 + i k + j`.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D A B"]:
        """The permutation.

        Raises:
            ValueError: H or W is not a multiple of k.
        """
        C, h, k, w, _ = _windows(tuple(x.shape[1:]), self.kernel_size)
        windows = x.reshape(x.shape[0], C, h, k, w, k)
        return windows.permute(0, 1, 3, 5, 2, 4).reshape(x.shape[0], C * k * k, h, w)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Reshape, Transpose, Reshape; the adjoint is the inverse."""
        C, h, k, w, _ = _windows(x.shape, self.kernel_size)
        windows = graph.reshape(x, [C, h, k, w, k])
        y = graph.reshape(graph.transpose(windows, [0, 1, 3, 5, 2, 4]), [C * k * k, h, w])

        def pullback(g: Value) -> Value:
            deep = graph.reshape(g, [C, k, k, h, w])
            return graph.reshape(graph.transpose(deep, [0, 1, 4, 2, 5, 3]), x.shape)

        return y, pullback


class Flatten(Layer):
    """`N x C x H x W -> N x D`. Constant: 1."""

    def forward(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "N D"]:
        """Row-major order."""
        return x.flatten(1)

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Flatten; the adjoint reshapes back."""
        return graph.node("Flatten", [x], [x.size], axis=1), lambda g: graph.reshape(g, x.shape)


class Normalize(Layer):
    """`(x - mean) / std` for each channel: a first layer, so that images stay in [0, 1] outside.

    Constant: `1 / min(std)`: the channel with the smallest std stretches most.
    """

    def __init__(self, mean_C: Sequence[float], std_C: Sequence[float]) -> None:
        super().__init__()
        if len(mean_C) != len(std_C) or min(std_C) <= 0:
            raise ValueError(f"mean and std need one entry a channel and std > 0, not {mean_C} and {std_C}")
        self.mean_C = tuple(float(m) for m in mean_C)
        self.std_C = tuple(float(s) for s in std_C)
        self.lipschitz_constant = 1.0 / min(self.std_C)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        """`(x - mean) / std`."""
        return (x - x.new_tensor(self.mean_C)[:, None, None]) / x.new_tensor(self.std_C)[:, None, None]

    def emit(self, graph: GraphBuilder, x: Value) -> tuple[Value, Pullback]:
        """Sub, Div; the adjoint divides."""
        mean = graph.float64(np.array(self.mean_C)[:, None, None])
        std = graph.float64(np.array(self.std_C)[:, None, None])
        y = graph.node("Div", [graph.node("Sub", [x, mean], x.shape), std], x.shape)
        return y, lambda g: graph.node("Div", [g, std], x.shape)


def _mix_channels(x: Tensor, weight_OC: Tensor, bias_O: Tensor) -> Tensor:
    return F.conv2d(x, weight_OC[:, :, None, None], bias_O)


def _emit_norm(graph: GraphBuilder, x: Value, axes: Sequence[int]) -> tuple[Value, Pullback]:
    """Euclidean norm over `axes` (which count the batch axis), and its adjoint `g x / norm`, 0 where the norm is."""
    pooled = [size for axis, size in enumerate(x.shape, 1) if axis not in axes]
    spread = [1 if axis in axes else size for axis, size in enumerate(x.shape, 1)]
    y = graph.node("ReduceL2", [x, graph.int64(list(axes))], pooled, keepdims=0)

    def pullback(g: Value) -> Value:
        positive = graph.node("Max", [y, graph.float64(np.array(np.finfo(np.float64).tiny))], pooled)
        ratio = graph.reshape(graph.node("Div", [g, positive], pooled), spread)
        return graph.node("Mul", [x, ratio], x.shape)

    return y, pullback


def _windows(shape: tuple[int, ...], k: int) -> tuple[int, int, int, int, int]:
    C, H, W = shape
    if H % k or W % k:
        raise ValueError(f"{H} x {W} is not a multiple of the window {k} x {k}: pad or crop the image first")
    return C, H // k, k, W // k, k


def _require_even(channels: int) -> None:
    if channels % 2:
        raise ValueError(f"GroupSort2 pairs channels and needs an even number of them, not {channels}")


def _exact_in_float32(weight: Tensor) -> Tensor:
    return weight.float().double()


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
