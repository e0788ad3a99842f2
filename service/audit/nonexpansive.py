"""Nonlinear maps of the numbers of a network: elementwise functions, functions of groups, sorted pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from flint import arb

from service.audit.balls import root, upper
from service.audit.moves import ZERO
from service.audit.network import Base, Facts, Network, Values
from service.audit.origins import Rising

ABSENT = -2
"""A place of a row of `each_group` that holds no number at all."""


def each(
    network: Network,
    ids: np.ndarray,
    function: Callable[[arb], arb],
    factor: arb | None = None,
    roundings: int = 0,
    rises: bool = False,
) -> np.ndarray:
    """Append a function of each number; return the identities, in the shape of `ids`.

    Args:
        network: the layers so far.
        ids: the numbers.
        function: enclosure of the function.
        factor: bound of its slope; default: 1.
        roundings: number of roundings of each result.
        rises: whether no slope is negative.
    """
    unique, inverse = np.unique(ids, return_inverse=True)
    made = varied(network, unique, lambda values: [function(value) for value in values], factor, roundings, rises)
    return made[inverse.reshape(ids.shape)]


def varied(
    network: Network,
    ids: np.ndarray,
    function: Callable[[list[arb]], list[arb]],
    factor: arb | None = None,
    roundings: int = 0,
    rises: bool = False,
) -> np.ndarray:
    """Append functions of each number, not the same of all; return the identities.

    Args:
        network: the layers so far.
        ids: the numbers, flat.
        function: enclosures of the functions of all numbers, in their order.
        factor: bound of their slopes; default: 1.
        roundings: number of roundings of each result.
        rises: whether no slope is negative.
    """
    values = [function(network.at(point, ids.tolist())) for point in range(len(network.values))]
    rounding = None
    if roundings:
        facts = network.facts(ids)
        scale = arb(1) if factor is None else factor
        network.require_no_overflow(upper(facts.largest * scale))
        lost = network.format.gamma(roundings) * scale * facts.computed
        rounding = upper(lost + network.format.tiny * root(arb(len(ids))) * (arb(1) + scale))
    made = network.nonlinear(ids, values, factor, rounding)
    if rises:
        steepest, own = arb(1) if factor is None else factor, arb(0) if rounding is None else rounding
        network.origins.rising[int(made[0])] = Rising(ids, steepest, own)
    return made


def each_group(
    network: Network,
    ids: np.ndarray,
    function: Callable[[list[arb]], list[arb]],
    rounding: Callable[[Facts], arb] | None = None,
) -> np.ndarray:
    """Append a function of each row of `ids` that never expands (nor do all rows together); return the identities.

    Args:
        network: the layers so far.
        ids: groups, one a row; `ABSENT` fills shorter ones.
        function: enclosures of the results of one row, in their order.
        rounding: bound of the L2 norm of the rounding errors of all results; default: each result is one of the
            row's numbers, without a rounding.
    """
    values = [
        [y for row in ids.tolist() for y in function(network.at(point, [i for i in row if i != ABSENT]))]
        for point in range(len(network.values))
    ]
    used = np.where(ids == ABSENT, ZERO, ids)
    if rounding is None:
        return network.nonlinear(used, values)
    facts = network.facts(used)
    error = upper(facts.error + rounding(facts))
    return network.add_base(Base(facts.lipschitz, facts.swing, error, error), values)


def sorted_pairs(network: Network, left: np.ndarray, right: np.ndarray, largest: bool) -> np.ndarray:
    """Append the larger or the smaller of each pair; return the identities.

    Sorting pairs never expands, as one map whose result has both halves. A pair that was sorted before is known: so
    both halves are numbers of one base, whichever nodes compute them.

    Args:
        network: the layers so far.
        left: one number of each pair, flat.
        right: the other one.
        largest: whether the larger is wanted.
    """
    pairs = [(min(a, b), max(a, b)) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
    new = sorted({pair for pair in pairs if pair[0] != pair[1] and pair not in network.pairs})
    if new:
        used = np.array(new, dtype=np.int64)
        values: Values = []
        for point in range(len(network.values)):
            first, second = network.at(point, used[:, 0].tolist()), network.at(point, used[:, 1].tolist())
            both = list(zip(first, second, strict=True))
            values.append([a.max(b) for a, b in both] + [a.min(b) for a, b in both])
        made = network.nonlinear(used, values).reshape(2, -1)
        for pair, high, low in zip(new, made[0].tolist(), made[1].tolist(), strict=True):
            network.pairs[pair] = (high, low)
    half = 0 if largest else 1
    return np.array([a if a == b else network.pairs[(a, b)][half] for a, b in pairs], dtype=np.int64)


def rectified(network: Network, ids: np.ndarray) -> np.ndarray:
    """Append the positive part of each number; return the identities, in the shape of `ids`.

    Positive and negative part together never expand: where x and x' have the same sign, one part moves as they do;
    where they have not, the parts move by |x| and |x'|, and `x^2 + x'^2 <= (|x| + |x'|)^2`. Both are numbers of one
    base; the negative part of x is the positive part of -x.
    """
    origins = network.origins
    unique, inverse = np.unique(ids, return_inverse=True)
    new: dict[int, None] = {}
    for number in unique.tolist():
        opposite = origins.opposites.get(number)
        if number not in origins.parts and opposite not in origins.parts and opposite not in new:
            new[number] = None
    if new:
        used = np.array(list(new), dtype=np.int64)
        values: Values = []
        for point in range(len(network.values)):
            known = network.at(point, new)
            values.append([value.max(arb(0)) for value in known] + [(-value).max(arb(0)) for value in known])
        made = network.nonlinear(used, values)
        origins.rising[int(made[0])] = Rising(used, arb(1), arb(0))
        for number, part, other in zip(new, made[: len(new)].tolist(), made[len(new) :].tolist(), strict=True):
            origins.parts[number] = (part, other)
    for number in unique.tolist():
        if number not in origins.parts:
            positive, negative = origins.parts[origins.opposites[number]]
            origins.parts[number] = negative, positive
    parts = np.array([origins.parts[number][0] for number in unique.tolist()], dtype=np.int64)
    return parts[inverse.reshape(ids.shape)]


def largest_of(values: list[arb]) -> list[arb]:
    """Return the largest number of a group, for `each_group`."""
    return [functools.reduce(arb.max, values)]


def smallest_of(values: list[arb]) -> list[arb]:
    """Return the smallest number of a group, for `each_group`."""
    return [functools.reduce(arb.min, values)]
