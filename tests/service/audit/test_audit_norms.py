"""Norms of exact matrices: never below the exact ones, whatever the guesses are."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from audit_cases import DIGITS, rational

from service.audit.balls import float_numbers
from service.audit.matrices import Matrix, gathered


def exact_matrix(values: np.ndarray) -> Matrix:
    rows, columns = values.shape
    numbers = float_numbers(values.ravel().tolist(), DIGITS)
    return gathered(
        np.tile(np.arange(columns), (rows, 1)), np.arange(values.size).reshape(rows, columns), numbers, columns
    )


def is_bound(bound: Fraction, values: np.ndarray) -> bool:
    """Whether `bound^2 I - W W^T` is positive semidefinite, by exact elimination of a symmetric matrix."""
    weight = np.vectorize(Fraction, otypes=[object])(values)
    rest = -(weight @ weight.T)
    for i in range(len(rest)):
        rest[i, i] += bound**2
    while len(rest):
        pivot = rest[0, 0]
        if pivot < 0 or (pivot == 0 and rest[0].any()):
            return False
        if pivot > 0:
            rest = rest - np.outer(rest[:, 0], rest[0]) / pivot
        rest = rest[1:, 1:]
    return True


@pytest.mark.parametrize("seed", range(40))
def test_norms_are_never_below_the_exact_ones(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=random.integers(1, 7, 2)) * 10.0 ** random.integers(-12, 12)
    values[random.random(values.shape) < 0.4 * (seed % 2)] = 0.0
    if seed % 5 == 0:
        values = np.linalg.qr(values)[0]
    matrix, peak = exact_matrix(values), Fraction(float(np.linalg.norm(values, 2)))
    assert is_bound(rational(matrix.norm), values)
    assert rational(matrix.norm) <= peak * (1 + Fraction(1, 10**13))
    assert is_bound(rational(matrix.absolute_norm), np.abs(values))
    assert not is_bound(peak * (1 - Fraction(1, 10**6)), values) or not values.any()


def test_a_bad_guess_never_gives_a_bad_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(6, 9))
    eigvalsh, cholesky = np.linalg.eigvalsh, np.linalg.cholesky
    for scale in (0.0, 0.5, 0.999, 3.0, np.nan):
        monkeypatch.setattr(np.linalg, "eigvalsh", lambda a, scale=scale: eigvalsh(a) * scale)
        monkeypatch.setattr(np.linalg, "cholesky", cholesky)
        assert is_bound(rational(exact_matrix(values).norm), values)
        # A factor of nothing at all, accepted as it is.
        monkeypatch.setattr(np.linalg, "cholesky", lambda a: np.tril(np.random.default_rng(1).random(a.shape)))
        assert is_bound(rational(exact_matrix(values).norm), values)
