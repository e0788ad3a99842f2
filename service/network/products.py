"""Matrix products as they run: the weights on the left, one column for each image.

In float64 the runtime copies the right operand of a product into panels, each time. With the weights there, that takes
longer than the product of a few images; so the images stand there: `y^T = W x^T + b`, transposed back. The sums are the
same, in another order, which may depend on the number of images; no bound depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.network.operators import Constant, Operator, Precision, Tensor

_FEWEST = 1 << 14
"""Weights of a matrix that is worth a transposition of the result."""


@dataclass(frozen=True)
class Turned:
    """`y^T = alpha W x^T + beta b`."""

    weight: Constant
    """W, one row for each result."""
    bias: Constant | None
    """b, a column."""
    alpha: float
    beta: float


def turned(operator: Operator, precision: Precision) -> Turned | None:
    """Return a product of vectors and weights in the form in which it runs; null for any other operator.

    In float32 the runtime multiplies one vector with a matrix as it lies in memory, and the form would gain nothing.

    Args:
        operator: of a network.
        precision: of the network.
    """
    if precision != "float64" or operator.kind not in ("Gemm", "MatMul"):
        return None
    x, weight, *rest = operator.operands
    if not isinstance(x, Tensor) or len(x.shape) != 1 or not isinstance(weight, Constant):
        return None
    if weight.array.size < _FEWEST or weight.array.ndim != 2:
        return None
    if operator.kind == "MatMul":
        return Turned(Constant(weight.array.T), None, 1.0, 1.0)
    bias = rest[0] if rest else None
    rows = weight if operator.integer("transB") else Constant(weight.array.T)
    column = Constant(np.atleast_2d(bias.array).T) if isinstance(bias, Constant) else None
    return Turned(rows, column, operator.number("alpha"), operator.number("beta"))
