"""Sums of matrix products of parts of one tensor (blocks), bounded by the one matrix that they make. Notation as in
`table`.

A graph that splits a long inner product into blocks, and adds their results, rounds each product fewer times than a
single sum of all of them may. As a sum of branches the blocks would be unrelated: norms and errors of all blocks would
add up.

Theorem. Let a graph compute `y = x_1 W_1 + ... + x_k W_k + c` by matrix products and elementwise additions,
subtractions and changes of sign, in any arrangement, such that no product `x_bi W_bij` and no constant goes through
more than r roundings. Let x be the vector of all x_b, W the matrix of all W_b one above the other, and `|c|` the sum of
the absolute constants. Then

    ||y - y'|| <= ||W|| ||x - x'||                                       (Lipschitz)
    ||y^ - y|| <= ||W|| e + gamma_r (|| |W| || ||x^|| + || |c| ||)       (error, without underflow)

and for one component the same with the norm of its column of W. Proof: y is the linear map W of the one vector x. By
Higham 2002, lemma 3.1, and sections 3.1 and 4.2, `y^_j = sum W_ij x^_i (1 + t_ij) + sum c_j (1 + s_j)`, all `|t|` and
`|s|` at most gamma_r, since each addition multiplies both terms by one factor `1 + d`, `|d| <= u`. So
`y^ - y = W (x^ - x) + D`, where each component of D is at most `gamma_r (|W| |x^| + |c|)`. Each of the operations that
make one element adds at most the smallest normal number by underflow. Nothing is assumed of the x_b: parts that overlap
or repeat, or come from different tensors, count in the bounds of x (`Domain.joint`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.certificate.facts import Facts, LocalError
from service.certificate.matrices import is_small
from service.certificate.norms import absolute_norm_bound, row_norms_up
from service.certificate.rounding import add_up, gamma_up, mul_up, norm_up
from service.certificate.rules.operands import Array
from service.certificate.rules.table import Context
from service.certificate.values import Affine, LinearStep, ProductSum, View

PRODUCTS = "Sum of matrix products x_b W_b: one map W of the vector of all x_b, ||W||_2 L."
_MOST_OPERANDS = 1 << 8
"""Of one sum: a graph may add a sum to itself any number of times."""
_LARGEST_AFFINE = 1 << 19
"""Entries of the matrix of a linear form that is stored, of each partial sum."""


@dataclass(frozen=True)
class Together:
    """Facts about a sum of matrix products."""

    facts: Facts
    affine: Affine | None
    """The sum as a linear form, where it is flat and its matrix small."""
    step: LinearStep | None
    """The sum as one linear step, where the products act on disjoint parts of one nonlinear tensor: multiplied out, the
    steps of the graph would be the same matrix."""


def one_product(view: View, weight_NM: Array, bias_M: Array | None) -> ProductSum:
    """Return `x W + b` as a sum of one matrix product, its bias in any place of the sum.

    Args:
        view: x.
        weight_NM: W.
        bias_M: b.
    """
    n = len(weight_NM)
    added = np.zeros(()) if bias_M is None else np.asarray(np.abs(bias_M))
    return ProductSum((view,), (weight_NM,), added, roundings=n + 1, operations=n + 2)


def constant_added(view: View, constant: Array, sign: float) -> ProductSum | None:
    """Return `sign x + constant` as a sum of matrix products; null where x is no such sum as it stands.

    A runtime may start the sums of the last product from the constant, which is then rounded as often as a product.

    Args:
        view: x.
        constant: of the shape of x.
        sign: 1 or -1.
    """
    before = view.source.products
    if before is None or not view.whole:
        return None
    return ProductSum(
        before.operands,
        before.weights if sign > 0.0 else tuple(np.negative(weight) for weight in before.weights),
        _sum_up(before.added, np.asarray(np.abs(constant))),
        before.roundings + 1,
        before.operations + 1,
    )


def sum_of_products(left: View, right: View, sign: float) -> ProductSum | None:
    """Return `x + sign y` as one sum of matrix products; null where x or y is no such sum, or it is too large.

    Args:
        left: x.
        right: y, of the same shape.
        sign: 1 or -1.
    """
    one, other = left.source.products, right.source.products
    if one is None or other is None or not (left.whole and right.whole):
        return None
    height = sum(len(weight) for weight in (*one.weights, *other.weights))
    if len(one.operands) + len(other.operands) > _MOST_OPERANDS or not is_small(height * one.weights[0].shape[1]):
        return None
    return ProductSum(
        (*one.operands, *other.operands),
        (*one.weights, *(other.weights if sign > 0.0 else (np.negative(weight) for weight in other.weights))),
        _sum_up(one.added, other.added),
        max(one.roundings, other.roundings) + 1,
        one.operations + other.operations + 1,
    )


def moved_alike(left: View, right: View) -> bool:
    """Return whether two sums of matrix products went through the same permutation, which their sum can follow."""
    one, other = left.source, right.source
    return (
        one.products is not None
        and other.products is not None
        and one.center.shape == other.center.shape
        and left.index.size == one.center.size
        and not left.whole
        and left.repetition == 1
        and bool((left.index >= 0).all() and (left.index == right.index).all())
    )


def bounds_of_products(context: Context, products: ProductSum, size: int) -> Together | None:
    """Return the bounds of a sum of matrix products.

    Null where the norm of its matrix is beyond the budget.

    Args:
        context: of this analysis.
        products: the sum.
        size: elements of its result.
    """
    weight_NM = np.concatenate(products.weights)
    norm = context.joint.matrix_norm(weight_NM)
    if not np.isfinite(norm):
        return None
    facts = context.domain.joint(*products.operands)
    spread, row_norm = absolute_norm_bound(weight_NM), float(np.max(row_norms_up(weight_NM.T)))
    shape = (*products.operands[0].shape[:-1], weight_NM.shape[1])
    added = np.ascontiguousarray(np.broadcast_to(products.added, shape))
    rounding = LocalError.relative(
        context.gamma(products.roundings),
        norm=add_up(mul_up(spread, facts.computed_norm), norm_up(added)),
        largest=add_up(mul_up(row_norm, facts.computed_norm), float(np.max(added, initial=0.0))),
    )
    underflow = LocalError.of_each(
        mul_up(4.0 * products.operations, context.precision.smallest_normal, add_up(1.0, facts.largest, row_norm)), size
    )
    result = Facts(
        lipschitz=mul_up(norm, facts.lipschitz),
        error=mul_up(norm, facts.error),
        error_max=mul_up(row_norm, facts.error),
    ).plus(rounding, underflow)
    affine = Affine(weight_NM.T, facts.lipschitz) if len(shape) == 1 and weight_NM.size <= _LARGEST_AFFINE else None
    if not _is_of_one_tensor(products):
        return Together(result, affine, None)
    step = LinearStep(
        operands=products.operands,
        # Block by block: the whole matrix of each partial sum would stay in memory.
        apply=lambda stacks: _applied(stacks, products.weights),
        norm=norm,
        spread=spread,
        terms=products.operations,
        joint=True,
    )
    return Together(result, affine, step)


def _applied(stacks: Sequence[Array], weights: Sequence[Array]) -> Array:
    total = stacks[0] @ weights[0]
    for stack, weight in zip(stacks[1:], weights[1:], strict=True):
        total += stack @ weight
    return total


def _is_of_one_tensor(products: ProductSum) -> bool:
    source = products.operands[0].source
    if source.step is not None or any(view.source is not source for view in products.operands):
        return False
    used = np.concatenate([view.index.ravel() for view in products.operands])
    return bool(used.size and (used >= 0).all() and np.bincount(used).max() == 1)


def _sum_up(one: Array, other: Array) -> Array:
    """Return bounds of the sums of non-negative numbers."""
    return np.asarray((one + other) * (1.0 + gamma_up(4)))
