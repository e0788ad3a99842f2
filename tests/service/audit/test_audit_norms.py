"""Matrices: norms never below the exact ones, whatever the guesses are; products whose defect covers their rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from audit_cases import DIGITS, rational
from flint import arb, ctx, fmpq

from service.audit.balls import NotAuditableError
from service.audit.blocks import distinct_blocks
from service.audit.maps import Diagonal, Shared, Weights, ball_weights, exact_weights
from service.audit.matrices import Matrix, from_dense, stacked
from service.audit.norms import LARGEST_BLOCK, spectral_norm
from service.audit.slices import rounded_product


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
    matrix, peak = from_dense(values, arb(0)), Fraction(float(np.linalg.norm(values, 2)))
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
        assert is_bound(rational(spectral_norm(values)), values)
        # A factor of nothing at all, accepted as it is.
        monkeypatch.setattr(np.linalg, "cholesky", lambda a: np.tril(np.random.default_rng(1).random(a.shape)))
        assert is_bound(rational(spectral_norm(values)), values)


def exact(values: np.ndarray) -> np.ndarray:
    return np.vectorize(Fraction, otypes=[object])(values)


def is_within(difference: np.ndarray, bound: arb) -> bool:
    """Whether the Frobenius norm of exact numbers is at most `bound`."""
    return (difference**2).sum() <= rational(bound) ** 2


def dense(matrix: Matrix) -> np.ndarray:
    return np.array([matrix.dense_row(row) for row in range(matrix.height)])


@pytest.mark.parametrize("seed", range(20))
def test_the_error_of_a_product_of_matrices_is_bounded(seed: int) -> None:
    random = np.random.default_rng(seed)
    m, n, k = random.integers(1, 9, 3)
    left = random.normal(size=(m, n)) * 10.0 ** random.integers(-9, 9, (m, n))
    right = random.normal(size=(n, k)) * 10.0 ** random.integers(-200, 200)
    product, error = rounded_product(left, right)
    assert is_within(exact(left) @ exact(right) - exact(product), error)
    assert error <= arb(float(np.linalg.norm(left))) * arb(float(np.abs(right).max())) * arb(2.0**-44)


def test_a_product_that_numpy_gets_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values, matmul = np.random.default_rng(0).normal(size=(6, 9)), np.matmul
    for wrong in (1.0, -1.0, 2.0**40, np.inf, np.nan):

        def almost(left: np.ndarray, right: np.ndarray, wrong: float = wrong) -> np.ndarray:
            product = matmul(left, right)
            product[-1, 2] += wrong
            return product

        monkeypatch.setattr(np, "matmul", almost)
        with pytest.raises(NotAuditableError, match="numpy's product of two matrices is wrong"):
            spectral_norm(values)
        with pytest.raises(NotAuditableError, match="numpy's product of two matrices is wrong"):
            rounded_product(values, values.T)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-520, 2.0**400, 2.0**1010])
def test_matrices_of_any_size_of_numbers_have_bounds(scale: float) -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)) * scale
    values[0, 0] = scale * 2.0**-60
    matrix, exact_values = from_dense(values, arb(0)), exact(values)
    assert is_bound(rational(matrix.norm), values)
    assert is_bound(rational(matrix.absolute_norm), np.abs(values))
    assert is_within(exact_values, matrix.frobenius)
    length, total = matrix.row_bounds()
    assert all((row**2).sum() <= rational(length) ** 2 and abs(row).sum() <= rational(total) for row in exact_values)
    assert total <= arb(float(np.abs(values / scale).sum(axis=1).max())) * arb(scale) * arb(1 + 2.0**-46)


def test_blocks_are_found_and_equal_ones_are_bounded_once() -> None:
    random = np.random.default_rng(0)
    block, other = random.normal(size=(3, 2)), random.normal(size=(2, 4))
    whole = np.zeros((10, 12))
    whole[0:3, [2, 7]], whole[[4, 6, 8], 4:6] = block, block
    whole[[3, 9], 8:12] = other
    # A chain of rows that share one column each is one block.
    chain = np.eye(40, 41) + np.eye(40, 41, 1)
    sparse = from_dense(whole[:, random.permutation(12)], arb(0))
    blocks = list(distinct_blocks(sparse.starts, sparse.columns, sparse.values, sparse.width))
    assert sorted(found.shape for found in blocks) in ([(2, 4), (3, 2)], [(2, 4), (3, 2), (3, 2)])
    assert is_bound(rational(sparse.norm), whole)
    sparse = from_dense(chain, arb(0))
    (found,) = distinct_blocks(sparse.starts, sparse.columns, sparse.values, sparse.width)
    assert np.array_equal(found, chain)
    # Columns in another order make the labels travel.
    sparse = from_dense(chain[:, random.permutation(41)], arb(0))
    assert len(list(distinct_blocks(sparse.starts, sparse.columns, sparse.values, sparse.width))) == 1


def test_a_block_that_is_too_large_is_refused() -> None:
    size = LARGEST_BLOCK + 1
    cycle = np.eye(size) + np.eye(size, k=1)
    with pytest.raises(NotAuditableError, match=f"the norm of a matrix of {size} x {size} is needed"):
        _ = from_dense(cycle, arb(0)).norm


def right_factors(random: np.random.Generator) -> list[Matrix]:
    """Matrices of 6 rows: the identity, scaled picks of columns with zeros and repeats, any."""
    picks = np.zeros((6, 8))
    picks[np.arange(6), random.permutation(8)[:6]] = random.normal(size=6)
    picks[2] = 0.0
    repeats = np.zeros((6, 4))
    repeats[np.arange(6), random.integers(0, 4, 6)] = random.normal(size=6)
    anything = random.normal(size=(6, 5)) * (random.random((6, 5)) < 0.6)
    return [from_dense(values, arb(0)) for values in (np.eye(6), 4.0 * np.eye(6), picks, repeats, anything)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["floats", "balls"])
def test_products_of_maps_are_exact_up_to_their_defect(seed: int, kind: str) -> None:
    ctx.prec = DIGITS
    random = np.random.default_rng(seed)
    fractions = exact(random.normal(size=(2, 3)))
    fractions[0, 1] = Fraction(0)
    if kind == "balls":
        fractions = fractions / 3

    def weights(values: np.ndarray, rows: int) -> Weights:
        if kind == "floats":
            return exact_weights(np.array(values.tolist(), dtype=float).reshape(rows, -1))
        return ball_weights([arb(v.numerator) / v.denominator for v in values.ravel()], rows)

    places = random.permuted(np.tile(np.arange(-1, 6), (4, 1)), axis=1)[:, :3]
    if seed % 2:
        places = random.permutation(6).reshape(2, 3)
    shared, rows = Shared(weights(fractions, 2), places, 6), np.full((len(places) * 2, 6), Fraction(0))
    for row, columns in enumerate(places):
        for i in range(2):
            for j, column in enumerate(columns.tolist()):
                if column >= 0:
                    rows[row * 2 + i, column] += fractions[i, j]
    diagonal, factors = Diagonal(weights(fractions.ravel(), 1)), np.diag(fractions.ravel())
    vector = random.normal(size=6)
    for operator, expected in ((shared, rows), (diagonal, factors)):
        for value, ball in zip(expected @ exact(vector), operator.apply([arb(v) for v in vector]), strict=True):
            assert ball.overlaps(arb(fmpq(value.numerator, value.denominator)))
        nearest = np.array(expected.tolist(), dtype=float)
        slack = Fraction(1, 2**40)
        assert is_bound(rational(operator.norm) + slack, nearest)
        assert is_bound(rational(operator.absolute_norm) + slack, np.abs(nearest))
        length, total = operator.row_bounds()
        for right in right_factors(random):
            found = operator.times(right)
            assert (found.height, found.width) == (len(expected), right.width)
            assert is_within(expected @ exact(dense(right)) - exact(dense(found)), found.defect)
            assert found.defect < arb(2.0**-44)
        if kind == "floats":
            assert not operator.times(from_dense(2.0 * np.eye(6), arb(0))).defect > 0
        assert all((row**2).sum() <= (rational(length) + slack) ** 2 for row in expected)
        assert all(abs(row).sum() <= rational(total) + slack for row in expected)


def test_rows_that_are_stacked_repeat_their_defect() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4))
    one = from_dense(values, arb(0.25))
    twice = np.full(3, 2)
    assert stacked([(one, np.arange(3), np.ones(3, dtype=np.int64))]) is one
    both = stacked([(one, np.arange(3), twice), (from_dense(values[:1], arb(0)), np.array([0]), np.array([1]))])
    assert np.array_equal(dense(both), np.concatenate([np.repeat(values, 2, axis=0), values[:1]]))
    assert arb(0.3535) < both.defect < arb(0.3536)
