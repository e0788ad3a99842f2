"""What is known of the numbers inside a network, for every image of the box and at some points.

Every number that a graph computes gets an identity, and a tensor is an array of identities: so moving numbers costs
nothing, and a number that is used twice is known to be the same one. Numbers come in layers, one for each operator
that computes. A layer is `M h + c` for a *base* h, the last tensor with a nonlinearity, and an explicit exact matrix
M: however many linear operators lie between two nonlinearities, their product is bounded as one map.

Of a base is known, for all images of the box: the Lipschitz bound `L` of h, as a function of the image that was sent;
its `swing`, a bound of `||h - h(centre)||`; a bound `e` of `||h^ - h||` where h^ is what a runtime computes. The
layer's own rounding is in `injected`: `||y^ - y|| <= ||M|| e + injected`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from flint import arb

from service.audit.exact import (
    Matrix,
    NotAuditableError,
    hypotenuse,
    identity,
    larger,
    power,
    product,
    root,
    smaller,
    stacked,
    upper,
)
from service.audit.graph import NOTHING


@dataclass(frozen=True)
class Format:
    """A floating-point format, as the runtime uses it."""

    name: str
    digits: int
    """Of the significand: the unit roundoff is `2**-digits`."""
    lowest: int
    """The smallest normal number is `2**lowest`."""
    highest: int
    """Overflow begins at `2**highest`."""

    def gamma(self, n: int) -> arb:
        """`n u / (1 - n u)`: bound of the relative error of n roundings in any order."""
        nu = arb(n) * power(-self.digits)
        if not nu < power(-1):
            raise NotAuditableError(f"a sum of {n} roundings is too long for {self.name}")
        return upper(nu / (arb(1) - nu))

    @property
    def unit(self) -> arb:
        """The unit roundoff."""
        return power(-self.digits)

    @property
    def tiny(self) -> arb:
        """The largest error of one operation that underflows."""
        return power(self.lowest)


ABSENT = -2
"""A place of a row of `Network.groups` that holds no number at all."""

FORMATS = {np.float64: Format("float64", 53, -1022, 1024), np.float32: Format("float32", 24, -126, 128)}


@dataclass(frozen=True, eq=False)
class Base:
    """Bounds of a tensor that has no matrix in front of it; all are exact numbers."""

    lipschitz: arb
    swing: arb
    error: arb
    error_max: arb
    """Bound of one component of the error."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The numbers of one operator; their identities are `start`, `start + 1`..."""

    start: int
    base: Base
    matrix: Matrix
    injected: arb
    injected_max: arb


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


Values = list[list[arb]]
"""One list of balls for each point at which the graph is evaluated; the first is the centre of the box."""


@dataclass
class Network:
    """The layers of one graph so far."""

    format: Format
    bits: int
    """Digits that are kept of numbers without an end."""
    values: Values
    """By point and identity."""
    layers: list[Layer] = field(default_factory=list[Layer])
    _starts: list[int] = field(default_factory=list[int])
    _facts: dict[bytes, Facts] = field(default_factory=dict[bytes, Facts])
    _pairs: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict[tuple[int, int], tuple[int, int]])

    def add(self, base: Base, matrix: Matrix, values: Values, injected: arb, injected_max: arb) -> np.ndarray:
        """A new layer; returns the identities of its numbers."""
        start = len(self.values[0])
        for known, new in zip(self.values, values, strict=True):
            if len(new) != len(matrix.rows):
                raise NotAuditableError("its operands do not fit")
            known.extend(new)
        self.layers.append(Layer(start, base, matrix, injected, smaller(injected_max, injected)))
        self._starts.append(start)
        return np.arange(start, start + len(matrix.rows))

    def add_base(self, base: Base, values: Values) -> np.ndarray:
        """A new layer that is a base itself."""
        return self.add(base, identity(len(values[0])), values, arb(0), arb(0))

    def at(self, point: int, ids: Iterable[int]) -> list[arb]:
        """Enclosures of the exact numbers at one point."""
        known, zero = self.values[point], arb(0)
        return [known[i] if i != NOTHING else zero for i in ids]

    def layer_of(self, number: int) -> Layer:
        """The layer that a number belongs to."""
        return self.layers[int(np.searchsorted(self._starts, number, side="right")) - 1]

    def facts(self, ids: np.ndarray) -> Facts:
        """Bounds of the vector of these numbers; one that stands in it twice counts twice."""
        used = np.sort(ids[ids != NOTHING].ravel())
        key = used.tobytes()
        if key not in self._facts:
            self._facts[key] = self._bounds(used)
        return self._facts[key]

    def _bounds(self, used: np.ndarray) -> Facts:
        unique, counts = np.unique(used, return_counts=True)
        owners = np.searchsorted(self._starts, unique, side="right") - 1
        parts: dict[Base, list[tuple[Layer, list[int], list[int]]]] = {}
        for owner in np.unique(owners).tolist():
            layer, here = self.layers[owner], owners == owner
            parts.setdefault(layer.base, []).append(
                (layer, (unique[here] - layer.start).tolist(), counts[here].tolist())
            )
        zero = arb(0)
        injected_max, error_max, swing_max = zero, zero, zero
        lipschitz: list[arb] = []
        swing: list[arb] = []
        drift: list[arb] = []
        injected: list[arb] = []
        for base, group in parts.items():
            norm = stacked([(layer.matrix, positions, repeats) for layer, positions, repeats in group]).norm
            lipschitz.append(upper(norm * base.lipschitz))
            swing.append(upper(norm * base.swing))
            drift.append(upper(norm * base.error))
            for layer, positions, repeats in group:
                injected.append(upper(root(arb(max(repeats))) * layer.injected))
                injected_max = larger(injected_max, layer.injected_max)
                row, total = layer.matrix.row_bounds(positions)
                moved = smaller(upper(row * base.error), upper(total * base.error_max))
                error_max = larger(error_max, upper(moved + layer.injected_max))
                swing_max = larger(swing_max, upper(row * base.swing))
        centre = self.at(0, used.tolist())
        peak = zero
        for value in centre:
            peak = larger(peak, upper(abs(value)))
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

    def no_overflow(self, bound: arb) -> None:
        """Raises unless every intermediate result of this size stays far below overflow."""
        if not bound < power(self.format.highest - 2):
            raise NotAuditableError("overflow cannot be excluded")

    def on_one_base(self, ids: np.ndarray) -> np.ndarray:
        """The same numbers as functions of one base: a new one where they are not."""
        if len(self._bases(ids)) == 1:
            return ids
        unique, inverse = np.unique(ids, return_inverse=True)
        values = [self.at(point, unique.tolist()) for point in range(len(self.values))]
        return self._new_base(unique, values)[inverse.reshape(ids.shape)]

    def _new_base(
        self, used: np.ndarray, values: Values, factor: arb | None = None, rounding: arb | None = None
    ) -> np.ndarray:
        """A base with these values: a map of Lipschitz bound `factor` of the numbers `used`, and its own rounding."""
        facts = self.facts(used)
        factor = arb(1) if factor is None else factor
        extra = arb(0) if rounding is None else rounding
        return self.add_base(
            Base(
                lipschitz=upper(facts.lipschitz * factor),
                swing=upper(facts.swing * factor),
                error=upper(facts.error * factor + extra),
                error_max=upper(facts.error_max * factor + extra),
            ),
            values,
        )

    # --- linear operators ---------------------------------------------------------------------------------------------

    def linear(
        self,
        ids: np.ndarray,
        operator: Matrix,
        roundings: int,
        bias: Sequence[arb] | None = None,
        constants: Sequence[arb] | None = None,
    ) -> np.ndarray:
        """`A x + b`, each result a sum of products computed in any order.

        Error: `||y^ - y|| <= ||M_y|| e + ||A|| injected_x + gamma_n (|| |A| || ||x^|| + ||b||)` and underflow (Higham
        2002, section 3.1); one component: with the norm of its own row.

        Args:
            ids: x, flat.
            operator: A.
            roundings: n, how many roundings at most a single product or the bias goes through; 0: A only moves
                numbers and changes their sign.
            bias: b.
            constants: bound of all that is added besides the products, where it is more than b.
        """
        ids = self.on_one_base(ids)
        facts = self.facts(ids)
        base = next((self.layer_of(i).base for i in ids.tolist() if i != NOTHING), None)
        if base is None:
            raise NotAuditableError("it does not depend on the image")
        owners: dict[int, tuple[Layer, list[int]]] = {}
        for position, number in enumerate(ids.tolist()):
            if number != NOTHING:
                layer = self.layer_of(number)
                owners.setdefault(layer.start, (layer, []))[1].append(position)
        matrix = product(operator, self._forms(ids, list(owners.values())), self.bits)
        added = list(bias) if bias is not None else [arb(0)] * len(matrix.rows)
        values = [
            [y + b for y, b in zip(operator.apply(self.at(point, ids.tolist())), added, strict=True)]
            for point in range(len(self.values))
        ]
        sizes = [abs(b) for b in (added if constants is None else constants)]
        peak = arb(0)
        for size in sizes:
            peak = larger(peak, upper(size))
        row, total = operator.largest_row, operator.largest_sum
        reach = smaller(upper(row * facts.computed), upper(total * facts.largest))
        self.no_overflow(upper(reach + peak))
        injected = upper(operator.norm * facts.injected) if facts.injected > 0 else arb(0)
        injected_max = smaller(upper(row * facts.injected), upper(total * facts.injected_max))
        if roundings:
            gamma = self.format.gamma(roundings)
            underflow = upper(arb(4 * (roundings + 2)) * self.format.tiny * (arb(1) + facts.largest + row))
            lost = gamma * (operator.absolute_norm * facts.computed + hypotenuse(sizes))
            injected = upper(injected + lost + underflow * root(arb(len(matrix.rows))))
            injected_max = upper(injected_max + gamma * (reach + peak) + underflow)
        return self.add(base, matrix, values, injected, injected_max)

    def _forms(self, ids: np.ndarray, owners: list[tuple[Layer, list[int]]]) -> Matrix:
        """The matrix of numbers on one base, as rows in their order; nothing is a row of zeros."""
        joined = stacked(
            [
                (layer.matrix, (ids[positions] - layer.start).tolist(), [1] * len(positions))
                for layer, positions in owners
            ]
        )
        # A number that is used m times repeats the defect of its row.
        most = int(np.unique(ids[ids != NOTHING], return_counts=True)[1].max())
        rows = [{} for _ in range(len(ids))]
        order = [position for _, positions in owners for position in positions]
        for position, row in zip(order, joined.rows, strict=True):
            rows[position] = row
        return Matrix(rows, joined.width, joined.shift, upper(root(arb(most)) * joined.defect))

    def shifted(self, ids: np.ndarray, constants: Sequence[arb], sign: int) -> np.ndarray:
        """`sign x + c`: no distance changes; one rounding of each result."""
        negated = self.linear(ids, signs(len(ids), sign), 0)
        facts = self.facts(negated)
        layer = self.layer_of(int(negated[0]))
        values = [
            [y + c for y, c in zip(self.at(point, negated.tolist()), constants, strict=True)]
            for point in range(len(self.values))
        ]
        return self._rounded_once(layer.base, layer.matrix, values, facts, facts)

    def _rounded_once(self, base: Base, matrix: Matrix, values: Values, before: Facts, bounds: Facts) -> np.ndarray:
        """Sums with one rounding each: `before` are the errors injected so far, `bounds` those of the exact sums."""
        norm = upper(hypotenuse(values[0]) + bounds.swing)
        peak = arb(0)
        for value in values[0]:
            peak = larger(peak, upper(abs(value)))
        largest = upper(peak + bounds.swing + bounds.error_max)
        self.no_overflow(upper(largest + bounds.largest))
        # Each operand and the sum may be taken for zero where it is subnormal.
        unit, tiny = self.format.unit, 4 * self.format.tiny
        return self.add(
            base,
            matrix,
            values,
            upper(before.injected + unit * (norm + bounds.error) + tiny * root(arb(len(values[0])))),
            upper(before.injected_max + unit * largest + tiny),
        )

    def sum(self, left: np.ndarray, right: np.ndarray, sign: int) -> np.ndarray:
        """`x + sign y`, elementwise: one matrix where both have one base, else the bounds add (triangle inequality)."""
        one, other = self.facts(left), self.facts(right)
        values = [
            [a + b * sign for a, b in zip(self.at(point, left.tolist()), self.at(point, right.tolist()), strict=True)]
            for point in range(len(self.values))
        ]
        both = Facts(
            *(
                upper(getattr(one, name) + getattr(other, name))
                for name in ("lipschitz", "swing", "error", "error_max", "injected", "injected_max", "norm", "largest")
            )
        )
        together = np.concatenate([left, right])
        if len(self._bases(together)) == 1:
            n = len(left)
            rows = [{i: 1, n + i: sign} for i in range(n)]
            exact = self.linear(together, Matrix(rows, 2 * n, 0, arb(0)), 0)
            layer = self.layer_of(int(exact[0]))
            return self._rounded_once(layer.base, layer.matrix, values, both, self.facts(exact))
        base = Base(both.lipschitz, both.swing, both.error, both.error_max)
        none = Facts(*([arb(0)] * 8))
        return self._rounded_once(base, identity(len(left)), values, none, both)

    def _bases(self, ids: np.ndarray) -> set[int]:
        present = ids[ids != NOTHING]
        owners = np.unique(np.searchsorted(self._starts, present, side="right") - 1).tolist()
        return {id(self.layers[owner].base) for owner in owners}

    # --- nonlinear operators ------------------------------------------------------------------------------------------

    def each(
        self, ids: np.ndarray, function: Callable[[arb], arb], factor: arb | None = None, roundings: int = 0
    ) -> np.ndarray:
        """A function of each number whose slope is at most `factor` (1)."""
        unique, inverse = np.unique(ids, return_inverse=True)
        values = [[function(value) for value in self.at(point, unique.tolist())] for point in range(len(self.values))]
        rounding = None
        if roundings:
            facts = self.facts(unique)
            scale = arb(1) if factor is None else factor
            self.no_overflow(upper(facts.largest * scale))
            lost = self.format.gamma(roundings) * scale * facts.computed
            rounding = upper(lost + self.format.tiny * root(arb(len(unique))) * (arb(1) + scale))
        return self._new_base(unique, values, factor, rounding)[inverse.reshape(ids.shape)]

    def groups(
        self,
        ids: np.ndarray,
        function: Callable[[list[arb]], list[arb]],
        rounding: Callable[[Facts], arb] | None = None,
    ) -> np.ndarray:
        """A function of each row of `ids` that never expands (nor do all rows together), results row by row.

        Each result is one of the row's numbers, without a rounding; or, with `rounding`, anything, and that is a bound
        of the L2 norm of its own rounding errors.
        """
        values = [
            [y for row in ids.tolist() for y in function(self.at(point, [i for i in row if i != ABSENT]))]
            for point in range(len(self.values))
        ]
        used = np.where(ids == ABSENT, NOTHING, ids)
        if rounding is None:
            return self._new_base(used, values)
        facts = self.facts(used)
        error = upper(facts.error + rounding(facts))
        return self.add_base(Base(facts.lipschitz, facts.swing, error, error), values)

    def sorted_pairs(self, left: np.ndarray, right: np.ndarray, largest: bool) -> np.ndarray:
        """The larger (smaller) of each pair. Sorting pairs never expands, as one map with both halves as its result.

        A pair that was sorted before is known: so both halves are numbers of one base, whichever nodes compute them.
        """
        pairs = [(min(a, b), max(a, b)) for a, b in zip(left.tolist(), right.tolist(), strict=True)]
        new = sorted({pair for pair in pairs if pair[0] != pair[1] and pair not in self._pairs})
        if new:
            used = np.array(new, dtype=np.int64)
            values: Values = []
            for point in range(len(self.values)):
                first, second = self.at(point, used[:, 0].tolist()), self.at(point, used[:, 1].tolist())
                both = list(zip(first, second, strict=True))
                values.append([a.max(b) for a, b in both] + [a.min(b) for a, b in both])
            made = self._new_base(used, values).reshape(2, -1)
            for pair, high, low in zip(new, made[0].tolist(), made[1].tolist(), strict=True):
                self._pairs[pair] = (high, low)
        half = 0 if largest else 1
        return np.array([a if a == b else self._pairs[(a, b)][half] for a, b in pairs], dtype=np.int64)


def signs(size: int, sign: int) -> Matrix:
    """The identity, or its negative."""
    return Matrix([{i: sign} for i in range(size)], size, 0, arb(0))
