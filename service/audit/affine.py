"""Affine maps of the numbers of a network: matrices, shifts, sums.

Their matrices are multiplied with those of the numbers that they act on, so that a chain of them is one map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, hypotenuse, largest_magnitude, root, smaller, upper
from service.audit.maps import LinearMap, Shared, exact_weights, signs
from service.audit.matrices import Matrix, identity, stacked
from service.audit.moves import ZERO
from service.audit.network import Base, Facts, Layer, Network, Parts, Values

LARGEST_SUM = 8192
"""Most numbers whose terms on several bases are followed beside their sum."""
MOST_PARTS = 12
"""Most bases of one sum."""


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
    given = ids
    ids, base, operand = forms_of(network, ids)
    facts = network.facts(ids)
    matrix = operator.times(operand)
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
    underflow = arb(0)
    if roundings:
        gamma = network.format.gamma(roundings)
        underflow = upper(arb(4 * (roundings + 2)) * network.format.tiny * (arb(1) + facts.largest + row))
        lost = gamma * (operator.absolute_norm * facts.computed + hypotenuse(sizes))
        injected = upper(injected + lost + underflow * root(arb(matrix.height)))
        injected_max = upper(injected_max + gamma * (reach + peak) + underflow)
    parts = mapped(operator, parts_of(network, given))
    results = network.add(base, matrix, values, injected, injected_max, parts)
    if constants is None:
        network.origins.add_products(results, given, operator, roundings, bias, underflow)
    return results


def forms_of(network: Network, ids: np.ndarray) -> tuple[np.ndarray, Base, Matrix]:
    """Return numbers on one base, that base, and their matrix in their order; the number 0 is a row of zeros.

    Raises:
        NotAuditableError: none of the numbers depends on the image.
    """
    ids = network.on_one_base(ids)
    present = ids != ZERO
    if not present.any():
        raise NotAuditableError("it does not depend on the image")
    layers = network.layers_of(ids[present])
    return ids, layers[0].base, _rows(ids, [(layer, layer.matrix) for layer in layers])


def _rows(ids: np.ndarray, owners: Sequence[tuple[Layer, Matrix]]) -> Matrix:
    """Return the rows of some numbers in the matrices of their layers; zeros for numbers of other layers."""
    places, height = np.full(len(ids), -1), 0
    for layer, matrix in owners:
        here = (ids >= layer.start) & (ids < layer.start + matrix.height)
        places[here] = ids[here] - layer.start + height
        height += matrix.height
    whole = stacked([(matrix, np.arange(matrix.height), np.ones(matrix.height, np.int64)) for _, matrix in owners])
    chosen = whole.select(places)
    if not chosen.defect > 0:
        return chosen
    # A number that is used m times repeats the defect of its row.
    most = int(np.unique(ids[places >= 0], return_counts=True)[1].max(initial=0))
    if most <= 1:
        return chosen
    defect = upper(root(arb(most)) * chosen.defect)
    return Matrix(chosen.starts, chosen.columns, chosen.values, chosen.width, defect)


def parts_of(network: Network, ids: np.ndarray) -> Parts:
    """Return numbers as a sum over several bases; empty where they are functions of one, or too many."""
    layers = network.layers_of(ids[ids != ZERO])
    several = len({layer.base for layer in layers}) > 1 or any(one.parts for one in layers)
    return terms_of(network, ids) if several else ()


def terms_of(network: Network, ids: np.ndarray) -> Parts:
    """Return numbers as a sum over their bases, one or several; empty where they are too many."""
    layers = network.layers_of(ids[ids != ZERO])
    if len(ids) > LARGEST_SUM:
        return ()
    owners: dict[Base, list[tuple[Layer, Matrix]]] = {}
    for layer in layers:
        for base, matrix in layer.parts or ((layer.base, layer.matrix),):
            owners.setdefault(base, []).append((layer, matrix))
    return tuple((base, _rows(ids, one)) for base, one in owners.items()) if len(owners) <= MOST_PARTS else ()


def mapped(operator: LinearMap, parts: Parts) -> Parts:
    """Return the terms behind a linear map; none where that takes too much memory."""
    try:
        return tuple((base, operator.times(matrix)) for base, matrix in parts)
    except NotAuditableError:
        return ()


def _added(network: Network, left: np.ndarray, right: np.ndarray, sign: int) -> Parts:
    """Return `x + sign y` on several bases as a sum over them: of terms on one base, the matrices add."""
    n = len(left)
    places = np.arange(2 * n).reshape(2, n).T
    return mapped(
        Shared(exact_weights(np.array([[1.0, sign]])), places, 2 * n), parts_of(network, np.concatenate([left, right]))
    )


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
    parts = parts_of(network, signed[order])
    made = _rounded_once(network, base, matrix, values, facts, facts, parts)[np.argsort(order)]
    network.origins.add_shifted(made, signed, constants, 4 * network.format.tiny)
    return made


def add(network: Network, left: np.ndarray, right: np.ndarray, sign: int, sharper: Base | None = None) -> np.ndarray:
    """Append `x + sign y`, elementwise; return the identities.

    One matrix where both have one base, else the bounds add (triangle inequality).

    Args:
        network: the layers so far.
        left: x, flat.
        right: y, flat.
        sign: 1 or -1.
        sharper: other bounds of the exact sum and of the errors of its operands.
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
        made = _rounded_once(network, layer.base, layer.matrix, values, both, network.facts(exact), layer.parts)
    else:
        base = Base(both.lipschitz, both.swing, both.error, both.error_max)
        base = base if sharper is None else base.smaller(sharper)
        both = replace(both, swing=base.swing, error=base.error, error_max=base.error_max)
        zero = Facts(*([arb(0)] * 8))
        made = _rounded_once(network, base, identity(len(left)), values, zero, both, _added(network, left, right, sign))
    if sign == 1:
        network.origins.add_sums(made, left, right, 4 * network.format.tiny)
    return made


def _rounded_once(
    network: Network, base: Base, matrix: Matrix, values: Values, before: Facts, bounds: Facts, parts: Parts
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
        parts,
    )
