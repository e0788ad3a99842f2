"""Square roots of sums of squares.

Theorem. `r_p = sqrt(c_p + sum_k w_pk x_k^2)` with non-negative c and w is the length of the vector of all
`sqrt(w_pk) x_k` and `sqrt(c_p)`, so that `|r_p(x) - r_p(x')|^2 <= sum_k w_pk (x_k - x'_k)^2` (reverse triangle
inequality), and `||r(x) - r(x')|| <= ||D (x - x')||` with the diagonal `D_k = sqrt(sum_p w_pk)`.

Rounding. The computed sum is `(1 + t) s + u` with `|t| <= gamma_n` for the exact sum s of the computed `x^_k`, so that
its root is within `gamma_n sqrt(s) + sqrt(|u|)` of `sqrt(s)`, which is within `||D (x^ - x)||` of the exact root.
"""

from __future__ import annotations

import numpy as np
from flint import arb

from service.audit.affine import linear
from service.audit.balls import NotAuditableError, hypotenuse, largest_magnitude, root, smaller, upper
from service.audit.maps import Diagonal, ball_weights
from service.audit.moves import ZERO
from service.audit.network import Base, Facts, Network
from service.audit.origins import columns_of, largest_row


def roots(network: Network, ids: np.ndarray, roundings: int) -> np.ndarray:
    """Append the square root of each sum of squares; return the identities, in the shape of `ids`.

    Args:
        network: the layers so far.
        ids: the sums.
        roundings: of each root.

    Raises:
        NotAuditableError: a number is no sum of squares.
    """
    unique, inverse = np.unique(ids, return_inverse=True)
    if not network.origins.are_squares(unique):
        raise NotAuditableError("the root of a number that is no sum of squares has no Lipschitz constant")
    sums = [network.origins.squares[i] for i in unique.tolist()]
    columns = columns_of(sums)
    numbers = np.array(sorted(number for number in columns if number != ZERO), dtype=np.int64)
    if not numbers.size:
        raise NotAuditableError("it does not depend on the image")
    scaled = _scaled(network, numbers, [columns[number].sqrt() for number in numbers.tolist()])
    lipschitz, swing, moved = (hypotenuse(getattr(one, name) for one in scaled) for name in _NAMES)
    plain = network.facts(numbers)
    moved_max = smaller(moved, upper(root(largest_row(sums)) * plain.error_max))
    values = [[_root_of(value) for value in network.at(p, unique.tolist())] for p in range(len(network.values))]
    gamma = network.format.gamma(max(one.roundings for one in sums) + roundings)
    norm = upper(hypotenuse(values[0]) + swing + moved)
    largest = upper(largest_magnitude(values[0]) + swing + moved_max)
    network.require_no_overflow(upper(2 * largest * largest))
    lost = root(upper(largest_magnitude(one.underflow for one in sums) + 4 * network.format.tiny))
    rounding, rounding_max = upper(gamma * norm + 2 * lost * root(arb(unique.size))), upper(gamma * largest + 2 * lost)
    base = Base(lipschitz, swing, upper(moved + rounding), upper(moved_max + rounding_max))
    made = network.add_base(base, values)
    return made[inverse.reshape(ids.shape)]


_NAMES = ("lipschitz", "swing", "error")


def _scaled(network: Network, numbers: np.ndarray, factors: list[arb]) -> list[Facts]:
    """Return bounds of the numbers times the factors, for the numbers of each base."""
    layers = network.layers_of(numbers)
    bases = {id(layer.base): layer.base for layer in layers}
    owners = np.array([id(network.layer_of(number).base) for number in numbers.tolist()])
    found: list[Facts] = []
    for base in bases:
        here = np.flatnonzero(owners == base)
        diagonal = Diagonal(ball_weights([factors[place] for place in here.tolist()], 1))
        found.append(network.facts(linear(network, numbers[here], diagonal, 0)))
    return found


def _root_of(value: arb) -> arb:
    """Return the root of a number that is not negative, whatever its enclosure says."""
    low, high = value.lower(), value.upper()
    return (low.sqrt() if low > 0 else arb(0)).union(high.sqrt() if high > 0 else arb(0))
