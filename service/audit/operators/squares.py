"""Squares, and square roots of their sums, as exporters write L2 norms: Pow, AveragePool, Mul, Sign, Abs, Pow."""

from __future__ import annotations

import numpy as np

from service.audit.affine import linear
from service.audit.balls import NotAuditableError
from service.audit.functions import product
from service.audit.graph import Node
from service.audit.maps import Shared, exact_weights
from service.audit.network import Network, Tensor
from service.audit.operators.pooling import POOL_ATTRIBUTES, pool_windows
from service.audit.operators.reductions import REDUCE_ATTRIBUTES, reduced, sums
from service.audit.operators.table import Operands, Signs, floats, rule, tensor
from service.audit.roots import roots

_ROUNDINGS_OF_POW = 16
"""Assumption 5 of docs/soundness.md: `pow` with the exponents 2 and 1/2 is as accurate as this many roundings."""


def _squared(network: Network, ids: np.ndarray, roundings: int) -> np.ndarray:
    unique, inverse = np.unique(ids, return_inverse=True)
    return product(network, unique, unique, roundings)[inverse.reshape(ids.shape)]


@rule("Pow")
def _pow(network: Network, node: Node, operands: Operands) -> Tensor:
    x, exponent = tensor(operands), floats(operands, 1)
    if exponent.size != 1 or exponent.ndim > len(x.shape) + 1:
        raise NotAuditableError("the exponent must be one number")
    match float(exponent.item()):
        case 1.0:
            return x
        case 2.0:
            return Tensor(_squared(network, x.ids, _ROUNDINGS_OF_POW))
        case 0.5:
            return Tensor(roots(network, x.ids, _ROUNDINGS_OF_POW))
        case other:
            raise NotAuditableError(f"a power of {other}: 1, 2, and 1/2 of a sum of squares are read here")


@rule("Sqrt")
def _sqrt(network: Network, node: Node, operands: Operands) -> Tensor:
    return Tensor(roots(network, tensor(operands).ids, 1))


@rule("Sign")
def _sign(network: Network, node: Node, operands: Operands) -> Signs:
    x = tensor(operands)
    if not network.origins.are_squares(x.ids):
        raise NotAuditableError("it jumps and has no Lipschitz constant; it is read as a factor of a sum of squares")
    return Signs(x.ids)


@rule("ReduceSumSquare", attributes=REDUCE_ATTRIBUTES)
def _reduce_sum_square(network: Network, node: Node, operands: Operands) -> Tensor:
    groups, shape = reduced(node, operands, tensor(operands))
    return Tensor(sums(network, _squared(network, groups, 1), mean=False).reshape(shape))


@rule("LpPool", attributes=(*POOL_ATTRIBUTES, "p"))
def _lp_pool(network: Network, node: Node, operands: Operands) -> Tensor:
    x = tensor(operands)
    if node.integer("p", 2) != 2:
        raise NotAuditableError("p other than 2")
    shape, places = pool_windows(node, x)
    squares = _squared(network, x.flat, _ROUNDINGS_OF_POW)
    operator = Shared(exact_weights(np.ones((1, places.shape[1]))), places, x.flat.size)
    added = linear(network, squares, operator, places.shape[1] + 1)
    return Tensor(roots(network, added, _ROUNDINGS_OF_POW).reshape(shape))
