"""How some numbers of a network came about: sums of squares, functions of other numbers, opposites, positive parts.

A bound that needs more than the last operator finds its operands here. All numbers are named by their identities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from flint import arb

from service.audit.balls import larger, root, smaller, upper
from service.audit.expressions import ARGUMENT, Expression
from service.audit.maps import LinearMap
from service.audit.moves import ZERO

NOWHERE = -3
"""In place of the operand of a number that is no function of another one."""


@dataclass(frozen=True, eq=False)
class SumOfSquares:
    """`c + sum of w_k x_k^2`, c and all w_k non-negative, so that no difference amplifies its rounding.

    The computed number is `(c + sum of w_k x^_k^2 (1 + t_k)) + u`, `|t_k| <= gamma_n` and `|u| <= underflow`.
    """

    weights: dict[int, arb]
    """By the identity of `x_k`."""
    constant: arb
    roundings: int
    """n."""
    underflow: arb


@dataclass(frozen=True, eq=False)
class Function:
    """Numbers that are one function of others, element by element.

    The computed number is `f(z^) + d`, z^ the computed z; bounds of d follow.
    """

    operands: np.ndarray
    """Identities of z."""
    expression: Expression
    """f."""
    error: arb
    """Bound of the L2 norm of all d."""
    error_max: arb
    """Bound of each d."""


@dataclass(frozen=True, eq=False)
class Rising:
    """The first numbers of a base: functions of others with slopes between 0 and `slope`, element by element."""

    operands: np.ndarray
    slope: arb
    error: arb
    """Bound of the L2 norm of their own rounding."""


@dataclass
class Origins:
    """Numbers of one network that are sums of squares or functions of others."""

    squares: dict[int, SumOfSquares] = field(default_factory=dict[int, SumOfSquares])
    functions: dict[int, Function] = field(default_factory=dict[int, Function])
    """By the first identity of a layer."""
    opposites: dict[int, int] = field(default_factory=dict[int, int])
    """The number -x of x."""
    parts: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """Positive and negative part of x: `max(x, 0)` and `max(-x, 0)`."""
    rising: dict[int, Rising] = field(default_factory=dict[int, Rising])
    """By the first identity of the layer of a base."""

    def add_opposites(self, numbers: np.ndarray, others: np.ndarray) -> None:
        """Note that each number is the negative of another one."""
        for one, other in zip(numbers.tolist(), others.tolist(), strict=True):
            if ZERO not in (one, other):
                self.opposites[one], self.opposites[other] = other, one

    def are_squares(self, ids: np.ndarray) -> bool:
        """Return whether all of these numbers are sums of squares."""
        return bool(self.squares) and all(i in self.squares for i in ids.ravel().tolist())

    def add_products(
        self,
        results: np.ndarray,
        ids: np.ndarray,
        operator: LinearMap,
        roundings: int,
        bias: Sequence[arb] | None,
        underflow: arb,
    ) -> None:
        """Note which results of `A x + b` are sums of squares.

        Args:
            results: flat.
            ids: x.
            operator: A.
            roundings: of each product, and of b.
            bias: b.
            underflow: bound of the underflow in a result.
        """
        if not self.squares or not any(i in self.squares for i in ids.tolist()):
            return
        numbers = ids.tolist()
        added = [arb(0)] * len(results) if bias is None else bias
        for result, (places, factors), constant in zip(results.tolist(), operator.rows(), added, strict=True):
            used = [(numbers[p], w) for p, w in zip(places, factors, strict=True) if p >= 0 and numbers[p] != ZERO]
            terms = [(self.squares.get(one), w) for one, w in used if w != 0]
            if constant >= 0 and terms:
                self._add_sum(result, terms, constant, roundings, underflow)

    def _add_sum(
        self, result: int, terms: list[tuple[SumOfSquares | None, arb]], constant: arb, roundings: int, underflow: arb
    ) -> None:
        weights: dict[int, arb] = {}
        lost, most = underflow, 0
        for square, factor in terms:
            if square is None or not factor > 0:
                return
            for one, weight in square.weights.items():
                weights[one] = weights.get(one, arb(0)) + weight * factor
            constant = constant + square.constant * factor
            # Later roundings of the underflow: gamma_n is at most 1.
            lost = upper(lost + square.underflow * factor * 2)
            most = max(most, square.roundings)
        self.squares[result] = SumOfSquares(weights, constant, most + roundings, lost)

    def add_shifted(self, results: np.ndarray, ids: np.ndarray, constants: Sequence[arb], underflow: arb) -> None:
        """Note which results of `x + c`, each rounded once, are sums of squares.

        Args:
            results: flat.
            ids: x.
            constants: c.
            underflow: bound of the underflow in a result.
        """
        if self.squares:
            for result, one, constant in zip(results.tolist(), ids.tolist(), constants, strict=True):
                if constant >= 0 and one in self.squares:
                    self._add_sum(result, [(self.squares[one], arb(1))], constant, 1, underflow)

    def add_sums(self, results: np.ndarray, left: np.ndarray, right: np.ndarray, underflow: arb) -> None:
        """Note which results of `x + y`, each rounded once, are sums of squares.

        Args:
            results: flat.
            left: x.
            right: y.
            underflow: bound of the underflow in a result.
        """
        if self.squares:
            for result, one, other in zip(results.tolist(), left.tolist(), right.tolist(), strict=True):
                terms = [(self.squares.get(i), arb(1)) for i in (one, other) if i != ZERO]
                if terms:
                    self._add_sum(result, terms, arb(0), 1, underflow)

    def add_function(
        self, results: np.ndarray, operands: np.ndarray, expression: Expression, error: arb, error_max: arb
    ) -> None:
        """Note that the numbers of a layer are a function of others.

        Args:
            results: numbers of one layer, its first one among them.
            operands: those others, one for each.
            expression: the function.
            error: see `Function`.
            error_max: see `Function`.
        """
        start = int(results.min())
        known = np.full(int(results.max()) + 1 - start, NOWHERE)
        known[results.ravel() - start] = operands.ravel()
        self.functions[start] = Function(known, expression, error, smaller(error, error_max))

    def function_of(self, ids: np.ndarray, start_of: Callable[[np.ndarray], np.ndarray]) -> Function:
        """Return numbers as one function of others; as themselves where none is known.

        Args:
            ids: flat.
            start_of: the first identity of the layer of each number.
        """
        itself = Function(ids, ARGUMENT, arb(0), arb(0))
        starts = start_of(ids) if (ids != ZERO).all() else np.array([ZERO])
        known = self.functions.get(int(starts[0]))
        if known is None or (starts != starts[0]).any():
            return itself
        places = ids - int(starts[0])
        if places.max() >= len(known.operands) or (known.operands[places] == NOWHERE).any():
            return itself
        most = int(np.unique(ids, return_counts=True)[1].max())
        return Function(known.operands[places], known.expression, upper(root(arb(most)) * known.error), known.error_max)


def columns_of(sums: Sequence[SumOfSquares]) -> dict[int, arb]:
    """Return the sum of the weights of each `x_k` in several sums of squares."""
    columns: dict[int, arb] = {}
    for one in sums:
        for number, weight in one.weights.items():
            columns[number] = columns.get(number, arb(0)) + weight
    return columns


def largest_row(sums: Sequence[SumOfSquares]) -> arb:
    """Return an upper bound of the sums of the weights of each sum of squares."""
    found = arb(0)
    for one in sums:
        found = larger(found, upper(sum(one.weights.values(), arb(0))))
    return found
