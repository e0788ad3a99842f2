"""Orthogonal matrices, and dense layers with them.

Axes: N batch, D features, O outputs, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.nets.layers.base import Layer, float64_array, rounded_to_float32
from models.nets.onnx_graph import GraphBuilder, Value
from models.parts import Parametrisation


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

    `cayley`: the parameter is unconstrained, and every forward pass applies the Cayley transform. `stiefel`: the
    parameter itself is orthogonal; `models.training.optimisers.StiefelMuon` must train it.
    """

    def __init__(self, out_features: int, in_features: int, parametrisation: Parametrisation = "cayley") -> None:
        super().__init__()
        self.parametrisation: Parametrisation = parametrisation
        self.raw = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.orthogonal_(self.raw)

    def forward(self) -> Float[Tensor, "O D"]:
        """Return the matrix in the precision of the parameter, under autocast too: in bfloat16 it is not orthogonal."""
        if self.parametrisation == "stiefel":
            return self.raw
        with torch.autocast(self.raw.device.type, enabled=False):
            return cayley(self.raw)

    def fold(self) -> Float[Tensor, "O D"]:
        """Return the matrix evaluated in float64, rounded to float32, held in float64."""
        raw = self.raw.detach().double()
        return rounded_to_float32(cayley(raw) if self.parametrisation == "cayley" else newton_schulz(raw, 4))


def stiefel_matrices(network: nn.Module) -> list[OrthogonalMatrix]:
    """Return the matrices whose parameter itself is orthogonal, which their optimiser must preserve."""
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
        """Return the matrix W."""
        return self.weight_OD

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """Return `W x + b`."""
        return F.linear(x, self.weight_OD, self.bias_O)

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write one Gemm."""
        W = graph.weight(float64_array(self.weight_OD))
        return graph.node("Gemm", [x, W, graph.float64(float64_array(self.bias_O))], [self.bias_O.shape[0]], transB=1)


class OrthogonalDense(Layer):
    """Dense layer with orthogonal weights. Constant: 1, and it is attained (gradient norm preserving)."""

    def __init__(self, in_features: int, out_features: int, parametrisation: Parametrisation = "cayley") -> None:
        super().__init__()
        self.matrix = OrthogonalMatrix(out_features, in_features, parametrisation)
        self.bias_O = nn.Parameter(torch.zeros(out_features))

    def weight(self) -> Float[Tensor, "O D"]:
        """Return the orthogonal matrix."""
        return self.matrix()

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N O"]:
        """Return `W x + b`."""
        return F.linear(x, self.matrix(), self.bias_O)

    def fold(self) -> Affine:
        """Return the same map with its matrix evaluated."""
        return Affine(self.matrix.fold(), self.bias_O.detach().double())

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write the nodes of the folded layer."""
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
        """Return the rows divided by their norms."""
        return F.normalize(self.raw, dim=1)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """Return `W x + b`."""
        return F.linear(x, self.weight(), self.bias_K)

    def fold(self) -> Affine:
        """Return the same map with its rows normalised."""
        return Affine(rounded_to_float32(F.normalize(self.raw.detach().double(), dim=1)), self.bias_K.detach().double())

    def emit(self, graph: GraphBuilder, x: Value) -> Value:
        """Write the nodes of the folded layer."""
        return self.fold().emit(graph, x)
