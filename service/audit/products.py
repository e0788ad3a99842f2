"""Sums of matrix products `x_1 W_1 + ... + x_k W_k + c` whose parts are numbers of one tensor: one map of all of them.

A graph may split a long sum in blocks. A rounded addition multiplies each term that it adds by one factor `1 + d`,
`|d| <= u`, so that a term which passes r operations is off by at most `gamma_r` of itself (Higham 2002, lemma 3.1).
With x all x_b together and W all W_b one above the other, the sum is `x W + c` and its rounding at most
`gamma_r (|| |W| || ||x^|| + || |c| ||)` and underflow, whatever the order of the additions.
"""

from __future__ import annotations

import numpy as np
from flint import arb

from service.audit.affine import forms_of
from service.audit.balls import hypotenuse, largest_magnitude, root, smaller, upper
from service.audit.maps import Shared, exact_weights
from service.audit.moves import ZERO
from service.audit.network import Network, Products

_LARGEST = 1 << 22
"""Entries of the weights of a sum: a graph may add a sum to itself any number of times."""


def note(network: Network, made: np.ndarray, x_LN: np.ndarray, weight_NM: np.ndarray, bias: list[arb] | None) -> None:
    """Record a layer as a sum of one matrix product.

    Args:
        network: the layers so far.
        made: identities of the layer, all of them in order.
        x_LN: x.
        weight_NM: W.
        bias: c, one for each number of the layer.
    """
    sizes = [arb(0)] * made.size if bias is None else [abs(value) for value in bias]
    network.products[int(made[0])] = Products(x_LN, weight_NM, sizes, len(weight_NM) + 1)


def added_blocks(network: Network, left: np.ndarray, right: np.ndarray, sign: int) -> np.ndarray | None:
    """Append `y + sign z` of two sums of matrix products; return the identities, or null where it is no such sum.

    Args:
        network: the layers so far.
        left: y, flat.
        right: z, flat.
        sign: 1 or -1.

    Raises:
        NotAuditableError: overflow cannot be excluded, or the matrix is too large.
    """
    if ZERO in left or ZERO in right:
        return None
    one, other = (network.layer_of(int(ids[0])) for ids in (left, right))
    first, second = network.products.get(one.start), network.products.get(other.start)
    places = left - one.start
    if first is None or second is None or not np.array_equal(places, right - other.start):
        return None
    if not np.array_equal(np.sort(places), np.arange(one.matrix.height)) or one.matrix.height != other.matrix.height:
        return None
    ids_LN = np.concatenate([first.ids_LN, second.ids_LN], axis=1)
    weight_NM = np.concatenate([first.weight_NM, sign * second.weight_NM])
    if weight_NM.size > _LARGEST or not network.shares_base(ids_LN):
        return None
    together = Products(
        ids_LN,
        weight_NM,
        [a + b for a, b in zip(first.sizes, second.sizes, strict=True)],
        max(first.roundings, second.roundings) + 1,
    )
    made = _appended(network, together, one.start, other.start, sign)
    network.products[int(made[0])] = together
    return made[places]


def _appended(network: Network, together: Products, left: int, right: int, sign: int) -> np.ndarray:
    """Append the sum of the layers that begin at `left` and `right`, in their order."""
    lead, n = together.ids_LN.shape
    ids, base, forms = forms_of(network, together.ids_LN.ravel())
    facts = network.facts(ids)
    operator = Shared(exact_weights(together.weight_NM.T), np.arange(lead * n).reshape(lead, n), lead * n)
    matrix = operator.times(forms)
    places = slice(left, left + matrix.height), slice(right, right + matrix.height)
    values = [
        [a + b * sign for a, b in zip(*(known[place] for place in places), strict=True)] for known in network.values
    ]
    row, total = operator.row_bounds()
    peak = largest_magnitude(together.sizes)
    reach = smaller(upper(row * facts.computed), upper(total * facts.largest))
    network.require_no_overflow(upper(reach + peak))
    gamma = network.format.gamma(together.roundings)
    # Products, their sums with constants, and the additions of blocks: 4 operations for each column at most.
    underflow = upper(arb(16 * (n + 2)) * network.format.tiny * (arb(1) + facts.largest + row))
    own = gamma * (operator.absolute_norm * facts.computed + hypotenuse(together.sizes))
    own_max = gamma * (reach + peak) + underflow
    if facts.injected > 0:
        own = own + operator.norm * facts.injected
        own_max = own_max + smaller(upper(row * facts.injected), upper(total * facts.injected_max))
    return network.add(base, matrix, values, upper(own + underflow * root(arb(matrix.height))), upper(own_max))
