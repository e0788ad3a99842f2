"""Numbers inside a network: their values at some images, and bounds for every image of the box.

Every number that a graph computes gets an identity, and a tensor is an array of identities: so moving numbers costs
nothing, and a number that is used twice is known to be the same one. Numbers come in layers, one for each operator
that computes. A layer is `M h + c` for a *base* h, the last tensor with a nonlinearity, and an explicit exact matrix
M: the product of all linear operators between two nonlinearities is bounded as one map.

Of a base is known, for all images of the box: the Lipschitz bound `L` of h, as a function of the image that was sent;
its `swing`, a bound of `||h - h(centre)||`; a bound `e` of `||h^ - h||` where h^ is the tensor that a runtime computes.
The layer's own rounding is in `injected`: `||y^ - y|| <= ||M|| e + injected`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np
from flint import arb

from service.audit.balls import (
    NotAuditableError,
    hypotenuse,
    larger,
    largest_magnitude,
    power,
    root,
    smaller,
    upper,
)
from service.audit.formats import Format
from service.audit.matrices import Matrix, identity, stacked
from service.audit.moves import ZERO
from service.audit.origins import Origins


class Tensor:
    """Identities of the numbers of one image's tensor, without its batch axis."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    @property
    def shape(self) -> tuple[int, ...]:
        """Without the batch axis."""
        return self.ids.shape

    @property
    def flat(self) -> np.ndarray:
        """Identities in row-major order."""
        return self.ids.ravel()


@dataclass(frozen=True, eq=False)
class Base:
    """Bounds of a tensor that has no matrix in front of it; all are exact numbers."""

    lipschitz: arb
    swing: arb
    error: arb
    error_max: arb
    """Bound of one component of the error."""

    def smaller(self, other: Base) -> Base:
        """Return the smaller bounds of the same tensor."""
        return Base(*(smaller(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


Parts = tuple[tuple[Base, Matrix], ...]
"""Terms `M h` of a sum, each on a base of its own."""

_LARGEST_PART = 1024
"""Side of the largest matrix of a term whose norm is computed beside that of the whole."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The numbers of one operator; their identities are `start`, `start + 1`..."""

    start: int
    base: Base
    matrix: Matrix
    injected: arb
    injected_max: arb
    parts: Parts = ()
    """The same numbers, up to constants, as a sum over several bases; empty where that is not known."""


@dataclass(frozen=True)
class Facts:
    """Upper bounds for several numbers taken together as one vector, over all images of the box."""

    lipschitz: arb
    swing: arb
    error: arb
    """Of `||computed - exact||`."""
    error_max: arb
    injected: arb
    injected_max: arb
    norm: arb
    """Of `||exact||`."""
    largest: arb
    """Of every component, exact and computed."""

    @property
    def computed(self) -> arb:
        """Bound of `||computed||`."""
        return upper(self.norm + self.error)

    def __add__(self, other: Facts) -> Facts:
        """Return bounds of the sum of two vectors (triangle inequality)."""
        return Facts(*(upper(getattr(self, f.name) + getattr(other, f.name)) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class Products:
    """A layer that a graph computes as a sum of matrix products and constants, see `products`."""

    ids_LN: np.ndarray
    """Identities of x, in L rows; number `l M + j` of the layer is the sum of `x[l, i] W[i, j]`, and a constant."""
    weight_NM: np.ndarray
    sizes: list[arb]
    """Bound of the sum of the absolute constants in each number."""
    roundings: int
    """The most that one product or constant goes through."""


Values = list[list[arb]]
"""One list of balls for each point at which the graph is evaluated; the first is the centre of the box."""


@dataclass
class Network:
    """The layers of one graph so far."""

    format: Format
    values: Values
    """By point and identity."""
    layers: list[Layer] = field(default_factory=list[Layer])
    pairs: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict[tuple[int, int], tuple[int, int]])
    """Identities of the larger and the smaller number of each pair that was sorted."""
    origins: Origins = field(default_factory=Origins)
    products: dict[int, Products] = field(default_factory=dict[int, Products])
    """Layers that are sums of matrix products, by their `start`."""
    _starts: list[int] = field(default_factory=list[int])
    _facts: dict[bytes, Facts] = field(default_factory=dict[bytes, Facts])

    def add(
        self, base: Base, matrix: Matrix, values: Values, injected: arb, injected_max: arb, parts: Parts = ()
    ) -> np.ndarray:
        """Append a layer.

        Args:
            base: h.
            matrix: M, one row for each number.
            values: `M h + c` at each point.
            injected: bound of the L2 norm of the layer's own rounding.
            injected_max: bound of one component of it.
            parts: see `Layer`.

        Returns:
            The identities of its numbers.

        Raises:
            NotAuditableError: matrix and values do not have the same number of rows.
        """
        start = len(self.values[0])
        for known, new in zip(self.values, values, strict=True):
            if len(new) != matrix.height:
                raise NotAuditableError("its operands do not fit")
            known.extend(new)
        self.layers.append(Layer(start, base, matrix, injected, smaller(injected_max, injected), parts))
        self._starts.append(start)
        return np.arange(start, start + matrix.height)

    def add_base(self, base: Base, values: Values) -> np.ndarray:
        """Append a layer that is a base itself; return the identities of its numbers."""
        return self.add(base, identity(len(values[0])), values, arb(0), arb(0))

    def at(self, point: int, ids: Iterable[int]) -> list[arb]:
        """Return enclosures of the exact numbers at one point."""
        known, zero = self.values[point], arb(0)
        return [known[i] if i != ZERO else zero for i in ids]

    def layer_of(self, number: int) -> Layer:
        """Return the layer that a number belongs to."""
        return self.layers[int(np.searchsorted(self._starts, number, side="right")) - 1]

    def starts_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the first number of the layer of each number."""
        starts = np.array(self._starts)
        return starts[np.searchsorted(starts, ids, side="right") - 1]

    def layers_of(self, ids: np.ndarray) -> list[Layer]:
        """Return the layers that some numbers belong to, in their order; `ZERO` belongs to no layer."""
        owners = np.unique(np.searchsorted(self._starts, ids.ravel(), side="right") - 1)
        return [self.layers[owner] for owner in owners.tolist()]

    def facts(self, ids: np.ndarray) -> Facts:
        """Return bounds of the vector of these numbers; one that occurs twice counts twice."""
        used = np.sort(ids[ids != ZERO].ravel())
        key = used.tobytes()
        if key not in self._facts:
            self._facts[key] = self._bounds(used)
        return self._facts[key]

    def _bounds(self, used: np.ndarray) -> Facts:
        unique, counts = np.unique(used, return_counts=True)
        owners = np.searchsorted(self._starts, unique, side="right") - 1
        parts: dict[Base, list[tuple[Layer, np.ndarray, np.ndarray]]] = {}
        for owner in np.unique(owners).tolist():
            layer, here = self.layers[owner], owners == owner
            parts.setdefault(layer.base, []).append((layer, unique[here] - layer.start, counts[here]))
        zero = arb(0)
        injected_max, error_max, swing_max = zero, zero, zero
        lipschitz: list[arb] = []
        swing: list[arb] = []
        drift: list[arb] = []
        injected: list[arb] = []
        for base, group in parts.items():
            norm = stacked([(layer.matrix, positions, repeats) for layer, positions, repeats in group]).norm
            terms = _norms_of_parts(group)
            lipschitz.append(_least(norm * base.lipschitz, [size * one.lipschitz for one, size in terms]))
            swing.append(_least(norm * base.swing, [size * one.swing for one, size in terms]))
            drift.append(upper(norm * base.error))
            for layer, positions, repeats in group:
                injected.append(upper(root(arb(int(repeats.max()))) * layer.injected))
                injected_max = larger(injected_max, layer.injected_max)
                row, total = layer.matrix.row_bounds(positions)
                moved = smaller(upper(row * base.error), upper(total * base.error_max))
                error_max = larger(error_max, upper(moved + layer.injected_max))
                swing_max = larger(swing_max, upper(row * base.swing))
        centre = self.at(0, used.tolist())
        peak = largest_magnitude(centre)
        together = hypotenuse(injected)
        error = smaller(upper(hypotenuse(drift) + together), upper(root(arb(len(centre))) * error_max))
        all_swing = hypotenuse(swing)
        return Facts(
            lipschitz=hypotenuse(lipschitz),
            swing=all_swing,
            error=error,
            error_max=smaller(error_max, error),
            injected=together,
            injected_max=injected_max,
            norm=upper(hypotenuse(centre) + all_swing),
            largest=upper(peak + smaller(swing_max, all_swing) + error_max),
        )

    def require_no_overflow(self, bound: arb) -> None:
        """Refuse intermediate results of this size unless they stay far below overflow.

        Raises:
            NotAuditableError: overflow cannot be excluded.
        """
        if not bound < power(self.format.highest - 2):
            raise NotAuditableError("overflow cannot be excluded")

    def shares_base(self, ids: np.ndarray) -> bool:
        """Return whether all of these numbers are functions of one base."""
        return len({id(layer.base) for layer in self.layers_of(ids[ids != ZERO])}) == 1

    def on_one_base(self, ids: np.ndarray) -> np.ndarray:
        """Return the same numbers as functions of one base: a new one where they are not."""
        if self.shares_base(ids):
            return ids
        unique, inverse = np.unique(ids, return_inverse=True)
        values = [self.at(point, unique.tolist()) for point in range(len(self.values))]
        return self.nonlinear(unique, values)[inverse.reshape(ids.shape)]

    def nonlinear(
        self,
        used: np.ndarray,
        values: Values,
        factor: arb | None = None,
        rounding: arb | None = None,
        rounding_max: arb | None = None,
    ) -> np.ndarray:
        """Append a base that is a function of known numbers; return the identities of its numbers.

        Args:
            used: the numbers that it is a function of.
            values: its value at each point.
            factor: Lipschitz bound of the function; default: 1.
            rounding: bound of the L2 norm of its own rounding; default: 0.
            rounding_max: bound of one component of it; default: `rounding`.
        """
        facts = self.facts(used)
        factor = arb(1) if factor is None else factor
        extra = arb(0) if rounding is None else rounding
        extra_max = extra if rounding_max is None else smaller(rounding_max, extra)
        return self.add_base(
            Base(
                lipschitz=upper(facts.lipschitz * factor),
                swing=upper(facts.swing * factor),
                error=upper(facts.error * factor + extra),
                error_max=upper(facts.error_max * factor + extra_max),
            ),
            values,
        )


def _least(whole: arb, terms: list[arb]) -> arb:
    """Return the smaller of a bound and the sum of those of the terms, where there are terms."""
    return smaller(upper(whole), upper(sum(terms, arb(0)))) if terms else upper(whole)


def _norms_of_parts(group: list[tuple[Layer, np.ndarray, np.ndarray]]) -> list[tuple[Base, arb]]:
    """Return the norm of each term of some numbers, by its base; empty where that gains nothing, or is too large.

    Args:
        group: layers on one base, positions of their rows, and how often each is used.
    """
    if all(not layer.parts or layer.matrix.is_identity for layer, _, _ in group):
        return []
    terms: dict[Base, list[tuple[Matrix, np.ndarray, np.ndarray]]] = {}
    for layer, positions, repeats in group:
        for base, matrix in layer.parts or ((layer.base, layer.matrix),):
            terms.setdefault(base, []).append((matrix, positions, repeats))
    if any(sum(len(rows) for _, rows, _ in one) > _LARGEST_PART for one in terms.values()):
        return []
    return [(base, stacked(one).norm) for base, one in terms.items()]
