"""Affine maps of the numbers of a network: matrices, shifts, sums.

Their matrices are multiplied with those of the numbers that they act on, so that a chain of them is one map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, hypotenuse, largest_magnitude, root, smaller, upper
from service.audit.maps import LinearMap, Shared, exact_weights, signs
from service.audit.matrices import Matrix, identity, stacked
from service.audit.moves import ZERO
from service.audit.network import Base, Facts, Network, Values


def linear(
    network: Network,
    ids: np.ndarray,
    operator: LinearMap,
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
    ids, base, forms = forms_of(network, ids)
    facts = network.facts(ids)
    matrix = operator.times(forms)
    added = list(bias) if bias is not None else [arb(0)] * matrix.height
    values = [operator.apply(network.at(point, ids.tolist())) for point in range(len(network.values))]
    if bias is not None:
        values = [[y + b for y, b in zip(products, added, strict=True)] for products in values]
    sizes = [abs(b) for b in (added if constants is None else constants)]
    peak = largest_magnitude(sizes)
    row, total = operator.row_bounds()
    reach = smaller(upper(row * facts.computed), upper(total * facts.largest))
    network.require_no_overflow(upper(reach + peak))
    injected = upper(operator.norm * facts.injected) if facts.injected > 0 else arb(0)
    injected_max = smaller(upper(row * facts.injected), upper(total * facts.injected_max))
    if roundings:
        gamma = network.format.gamma(roundings)
        underflow = upper(arb(4 * (roundings + 2)) * network.format.tiny * (arb(1) + facts.largest + row))
        lost = gamma * (operator.absolute_norm * facts.computed + hypotenuse(sizes))
        injected = upper(injected + lost + underflow * root(arb(matrix.height)))
        injected_max = upper(injected_max + gamma * (reach + peak) + underflow)
    return network.add(base, matrix, values, injected, injected_max)


def forms_of(network: Network, ids: np.ndarray) -> tuple[np.ndarray, Base, Matrix]:
    """Return numbers on one base, that base, and their matrix in their order; the number 0 is a row of zeros.

    Raises:
        NotAuditableError: none of the numbers depends on the image.
    """
    ids = network.on_one_base(ids)
    present = ids != ZERO
    if not present.any():
        raise NotAuditableError("it does not depend on the image")
    places = np.full(len(ids), -1)
    parts: list[tuple[Matrix, np.ndarray, np.ndarray]] = []
    height = 0
    layers = network.layers_of(ids[present])
    for layer in layers:
        size = layer.matrix.height
        here = present & (ids >= layer.start) & (ids < layer.start + size)
        places[here] = ids[here] - layer.start + height
        parts.append((layer.matrix, np.arange(size), np.ones(size, dtype=np.int64)))
        height += size
    chosen = stacked(parts).select(places)
    if not chosen.defect > 0:
        return ids, layers[0].base, chosen
    # A number that is used m times repeats the defect of its row.
    most = int(np.unique(ids[present], return_counts=True)[1].max())
    defect = upper(root(arb(most)) * chosen.defect)
    return ids, layers[0].base, Matrix(chosen.starts, chosen.columns, chosen.values, chosen.width, defect)


def shifted(network: Network, ids: np.ndarray, constants: Sequence[arb], sign: int) -> np.ndarray:
    """Append `sign x + c`: no distance changes, and each result is rounded once; return the identities.

    Args:
        network: the layers so far.
        ids: x, flat.
        constants: c.
        sign: 1 or -1.
    """
    signed = ids if sign == 1 else linear(network, ids, signs(len(ids), sign), 0)
    # In the order of the numbers themselves, their matrix and its norm are known.
    order = np.argsort(signed, kind="stable")
    ordered, base, matrix = forms_of(network, signed[order])
    facts = network.facts(ordered)
    values = [
        [y + constants[place] for y, place in zip(network.at(point, ordered.tolist()), order.tolist(), strict=True)]
        for point in range(len(network.values))
    ]
    return _rounded_once(network, base, matrix, values, facts, facts)[np.argsort(order)]


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
        places = np.arange(2 * n).reshape(2, n).T
        exact = linear(network, together, Shared(exact_weights(np.array([[1.0, sign]])), places, 2 * n), 0)
        layer = network.layer_of(int(exact[0]))
        return _rounded_once(network, layer.base, layer.matrix, values, both, network.facts(exact))
    base = Base(both.lipschitz, both.swing, both.error, both.error_max)
    zero = Facts(*([arb(0)] * 8))
    return _rounded_once(network, base, identity(len(left)), values, zero, both)


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
