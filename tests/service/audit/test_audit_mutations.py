"""Mutants of the audit: each replaces one step of a proof by a plausible mistake, and exact arithmetic contradicts it.

The seed of each is fixed; without the mutation the same graph shows no contradiction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from audit_checks import contradictions
from flint import arb

from service.audit import affine, functions, network, nonexpansive, origins, roots, steps
from service.audit.expressions import Expression
from service.audit.matrices import Matrix
from service.audit.operators import activations, piecewise

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the steps and the seed of a graph that shows it."""

    mistake: Callable[[Patch], None]
    steps: tuple[str, ...]
    seed: int
    most: int = 2


def putting(owner: Any, name: str, value: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def at_the_centre(f: Expression, low: arb, high: arb, which: int) -> arb:
    return abs(f.jet(((low + high) / 2).mid(), {})[which]).upper()


def with_sorted_operands(self: Any, ids: np.ndarray, start_of: Any) -> Any:
    found = FUNCTION_OF(self, ids, start_of)
    return replace(found, operands=np.sort(found.operands))


def opposites_of_others(self: Any, numbers: np.ndarray, others: np.ndarray) -> None:
    ADD_OPPOSITES(self, numbers, others[::-1])


def mean_of_columns(sums: Any) -> dict[int, arb]:
    columns = COLUMNS_OF(sums)
    return dict.fromkeys(columns, sum(columns.values(), arb(0)) / len(columns))


def row_of_columns(sums: Any) -> dict[int, arb]:
    return {number: weight for one in sums for number, weight in one.weights.items()}


def always_rising(patch: Patch) -> None:
    for name in ("each", "varied"):
        known = getattr(nonexpansive, name)
        patch.setattr(piecewise, name, lambda *given, known=known, **named: known(*given, **(named | {"rises": True})))


def flatter(known: Any, **named: Any) -> Any:
    return known(**(named | {"slope": named["slope"] * arb("0.9")}))


def no_shift(rows: int, n: int) -> Matrix:
    return Matrix(np.zeros(rows * n + 1, dtype=np.int64), np.zeros(0, np.int32), np.zeros(0), rows, arb(0))


FUNCTION_OF, ADD_OPPOSITES = origins.Origins.function_of, origins.Origins.add_opposites
COLUMNS_OF, POWER, MAPPED = origins.columns_of, activations.power, affine.mapped

MUTANTS: dict[str, Mutant] = {
    "factors of a product taken for constants": Mutant(
        putting(functions, "_reach", lambda *_: arb(0)), ("gated", "dense"), 0
    ),
    "slopes of a function at the centre of its range": Mutant(
        putting(functions, "largest_slope", partial(at_the_centre, which=1)), ("gated", "dense"), 0
    ),
    "values of a function at the centre of its range": Mutant(
        putting(functions, "largest_value", partial(at_the_centre, which=0)), ("gated", "dense"), 10, 3
    ),
    "functions of different elements taken for functions of one": Mutant(
        putting(origins.Origins, "function_of", with_sorted_operands), ("number", "gated"), 45, 3
    ),
    "factors of a function forgotten": Mutant(
        putting(functions, "scaled", lambda factor, inner: inner), ("gated", "dense"), 40
    ),
    "parts of other numbers": Mutant(
        putting(origins.Origins, "add_opposites", opposites_of_others), ("parts", "dense"), 3
    ),
    "mean of the column sums of squares": Mutant(putting(roots, "columns_of", mean_of_columns), ("roots", "dense"), 15),
    "a square that is used twice counted once": Mutant(
        putting(roots, "columns_of", row_of_columns), ("roots", "dense"), 6
    ),
    "any step taken for one of gradient descent": Mutant(
        putting(steps, "_slope", lambda forward, *_: forward.norm), ("gradient_step",), 4
    ),
    "remainder of a step of gradient descent dropped": Mutant(
        putting(steps, "length", lambda _: arb(0)), ("gradient_step",), 4
    ),
    "step of gradient descent of falling activations": Mutant(always_rising, ("gradient_step",), 125),
    "a slope too small": Mutant(
        lambda patch: patch.setattr(activations, "Activation", partial(flatter, activations.Activation)),
        ("activation",),
        5,
    ),
    "inaccuracy of functions dropped": Mutant(
        putting(activations, "FUNCTION_ERROR", arb(0)), ("activation", "dense"), 6
    ),
    "a softmax half as steep": Mutant(
        putting(activations, "power", lambda exponent: POWER(exponent - 1)), ("along_axis", "dense"), 0
    ),
    "the shift of a LogSoftmax forgotten": Mutant(
        putting(activations, "_less_one_for_each", no_shift), ("along_axis", "dense"), 1
    ),
    "the largest term of a sum alone": Mutant(
        putting(network, "_least", lambda whole, terms: min([whole, *terms], key=float)), ("residual", "dense"), 3, 3
    ),
    "terms on other bases forgotten": Mutant(
        putting(affine, "mapped", lambda operator, parts: MAPPED(operator, parts[:1])), ("residual", "dense"), 3, 3
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_audit_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    assert contradictions(mutant.seed, mutant.steps, mutant.most) == []
    mutant.mistake(monkeypatch)
    assert contradictions(mutant.seed, mutant.steps, mutant.most)
