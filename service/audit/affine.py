"""Affine maps of the numbers of a network: matrices, shifts, sums.

Their matrices are multiplied with those of the numbers that they act on, so that a chain of them is one map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, hypotenuse, largest_magnitude, root, smaller, upper
from service.audit.matrices import Matrix, diagonal, product, stacked
from service.audit.moves import ZERO
from service.audit.network import Base, Facts, Layer, Network, Values


def linear(
    network: Network,
    ids: np.ndarray,
    operator: Matrix,
    roundings: int,
    bias: Sequence[arb] | None = None,
    constants: Sequence[arb] | None = None,
) -> np.ndarray:
    """Append `A x + b`, each result a sum of products computed in any order; return the identities.

    Error: `||y^ - y|| <= ||M_y|| e + ||A|| injected_x + gamma_n (|| |A| || ||x^|| + ||b||)` and underflow (Higham
    2002, section 3.1); one component: with the norm of its own row.

    Args:
        network: the layers so far.
        ids: x, flat.
        operator: A.
        roundings: n, the largest number of roundings of a single product or of the bias; 0: A only moves numbers and
            changes their sign.
        bias: b.
        constants: bound of everything that is added besides the products, where it is more than b.

    Raises:
        NotAuditableError: x does not depend on the image, overflow cannot be excluded, or a matrix is too large.
    """
    ids = network.on_one_base(ids)
    facts = network.facts(ids)
    base = next((network.layer_of(i).base for i in ids.tolist() if i != ZERO), None)
    if base is None:
        raise NotAuditableError("it does not depend on the image")
    matrix = product(operator, _forms(network, ids), network.bits)
    added = list(bias) if bias is not None else [arb(0)] * len(matrix.rows)
    values = [
        [y + b for y, b in zip(operator.apply(network.at(point, ids.tolist())), added, strict=True)]
        for point in range(len(network.values))
    ]
    sizes = [abs(b) for b in (added if constants is None else constants)]
    peak = largest_magnitude(sizes)
    row, total = operator.largest_row, operator.largest_sum
    reach = smaller(upper(row * facts.computed), upper(total * facts.largest))
    network.require_no_overflow(upper(reach + peak))
    injected = upper(operator.norm * facts.injected) if facts.injected > 0 else arb(0)
    injected_max = smaller(upper(row * facts.injected), upper(total * facts.injected_max))
    if roundings:
        gamma = network.format.gamma(roundings)
        underflow = upper(arb(4 * (roundings + 2)) * network.format.tiny * (arb(1) + facts.largest + row))
        lost = gamma * (operator.absolute_norm * facts.computed + hypotenuse(sizes))
        injected = upper(injected + lost + underflow * root(arb(len(matrix.rows))))
        injected_max = upper(injected_max + gamma * (reach + peak) + underflow)
    return network.add(base, matrix, values, injected, injected_max)


def _forms(network: Network, ids: np.ndarray) -> Matrix:
    """Return the matrix of numbers on one base, as rows in their order; the number 0 is a row of zeros."""
    owners: dict[int, tuple[Layer, list[int]]] = {}
    for position, number in enumerate(ids.tolist()):
        if number != ZERO:
            layer = network.layer_of(number)
            owners.setdefault(layer.start, (layer, []))[1].append(position)
    joined = stacked(
        [
            (layer.matrix, (ids[positions] - layer.start).tolist(), [1] * len(positions))
            for layer, positions in owners.values()
        ]
    )
    # A number that is used m times repeats the defect of its row.
    most = int(np.unique(ids[ids != ZERO], return_counts=True)[1].max())
    rows = [{} for _ in range(len(ids))]
    order = [position for _, positions in owners.values() for position in positions]
    for position, row in zip(order, joined.rows, strict=True):
        rows[position] = row
    return Matrix(rows, joined.width, joined.shift, upper(root(arb(most)) * joined.defect))


def shifted(network: Network, ids: np.ndarray, constants: Sequence[arb], sign: int) -> np.ndarray:
    """Append `sign x + c`: no distance changes, and each result is rounded once; return the identities.

    Args:
        network: the layers so far.
        ids: x, flat.
        constants: c.
        sign: 1 or -1.
    """
    signed = linear(network, ids, diagonal(len(ids), sign), 0)
    facts = network.facts(signed)
    layer = network.layer_of(int(signed[0]))
    values = [
        [y + c for y, c in zip(network.at(point, signed.tolist()), constants, strict=True)]
        for point in range(len(network.values))
    ]
    return _rounded_once(network, layer.base, layer.matrix, values, facts, facts)


def add(network: Network, left: np.ndarray, right: np.ndarray, sign: int) -> np.ndarray:
    """Append `x + sign y`, elementwise; return the identities.

    One matrix where both have one base, else the bounds add (triangle inequality).

    Args:
        network: the layers so far.
        left: x, flat.
        right: y, flat.
        sign: 1 or -1.
    """
    both = network.facts(left) + network.facts(right)
    values = [
        [a + b * sign for a, b in zip(network.at(point, left.tolist()), network.at(point, right.tolist()), strict=True)]
        for point in range(len(network.values))
    ]
    together = np.concatenate([left, right])
    if network.shares_base(together):
        n = len(left)
        rows = [{i: 1, n + i: sign} for i in range(n)]
        exact = linear(network, together, Matrix(rows, 2 * n, 0, arb(0)), 0)
        layer = network.layer_of(int(exact[0]))
        return _rounded_once(network, layer.base, layer.matrix, values, both, network.facts(exact))
    base = Base(both.lipschitz, both.swing, both.error, both.error_max)
    zero = Facts(*([arb(0)] * 8))
    return _rounded_once(network, base, diagonal(len(left)), values, zero, both)


def _rounded_once(
    network: Network, base: Base, matrix: Matrix, values: Values, before: Facts, bounds: Facts
) -> np.ndarray:
    """Append sums with one rounding each: `before` are the errors injected so far, `bounds` those of the exact sums."""
    norm = upper(hypotenuse(values[0]) + bounds.swing)
    largest = upper(largest_magnitude(values[0]) + bounds.swing + bounds.error_max)
    network.require_no_overflow(upper(largest + bounds.largest))
    # Each operand and the sum may be taken for zero where it is subnormal.
    unit, tiny = network.format.unit, 4 * network.format.tiny
    return network.add(
        base,
        matrix,
        values,
        upper(before.injected + unit * (norm + bounds.error) + tiny * root(arb(len(values[0])))),
        upper(before.injected_max + unit * largest + tiny),
    )
