"""Sums of matrix products of parts of one tensor: bounds against the matrix, errors against adversaries.

An adversary rounds every operation upwards by the unit roundoff, in rational numbers: the largest error that the
assumptions of the proof allow. Bounds are certificates of the graphs, which are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from exact_matrices import exceeds_norm
from graph_builder import GraphBuilder

from service.certificate import UnsupportedModelError, certify
from service.certificate.rules import arithmetic, blocks, products

U = Fraction(1, 2**24)
Sum = Callable[[GraphBuilder, Sequence[str]], str]


def tree(b: GraphBuilder, terms: Sequence[str]) -> str:
    while len(terms) > 1:
        pairs = [terms[k : k + 2] for k in range(0, len(terms), 2)]
        terms = [pair[0] if len(pair) == 1 else b.one("Add", *pair) for pair in pairs]
    return terms[0]


def chain(b: GraphBuilder, terms: Sequence[str]) -> str:
    total = terms[0]
    for term in terms[1:]:
        total = b.one("Add", total, term)
    return total


def parts_of(b: GraphBuilder, x: str, starts: Sequence[int], size: int) -> list[str]:
    bounds = [[b.constant(np.array([number], dtype=np.int64)) for number in (k, k + size, 1)] for k in starts]
    return [b.one("Slice", x, *bound) for bound in bounds]


def blocked(
    weight_MN: np.ndarray, size: int, of: Sum = tree, dtype: type = np.float32, starts: Sequence[int] | None = None
) -> bytes:
    """`W x` in blocks that begin at `starts`, one after the other as a rule; each reads the columns of W in turn."""
    b = GraphBuilder(dtype=dtype)
    m, n = weight_MN.shape
    starts = range(0, n, size) if starts is None else starts
    weights = [weight_MN[:, k * size : (k + 1) * size] for k in range(len(starts))]
    parts = parts_of(b, "image", starts, size)
    terms = [b.one("MatMul", part, b.constant(weight.T)) for part, weight in zip(parts, weights, strict=True)]
    return b.model((max(starts) + size,), of(b, terms), m)


@pytest.mark.parametrize("of", [tree, chain])
def test_blocks_have_the_norm_of_the_matrix_that_they_make(of: Sum) -> None:
    weight = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0].astype(np.float32).astype(np.float64)
    bound = certify(blocked(weight, 4, of)).lipschitz_bound
    assert exceeds_norm(bound, weight)
    assert bound <= 1.0 + 1e-6


@pytest.mark.parametrize("of", [tree, chain])
def test_margins_of_blocks_are_those_of_the_matrix(of: Sum) -> None:
    weight = np.random.default_rng(1).standard_normal((5, 24)).astype(np.float32).astype(np.float64)
    whole = certify(blocked(weight, 24)).margin_bounds_KK
    bounds = certify(blocked(weight, 4, of)).margin_bounds_KK
    assert (bounds >= whole * (1.0 - 1e-12)).all()
    assert (bounds <= whole * (1.0 + 1e-9)).all()


def test_a_part_that_is_read_twice_counts_twice() -> None:
    # The same columns in two blocks: the map is 2 W, the blocks of which have the norm sqrt(2) ||W||.
    weight = np.tile(np.eye(3), (1, 2))
    assert 2.0 <= certify(blocked(weight, 3, starts=(0, 0))).lipschitz_bound <= 2.0 + 1e-9
    # Overlapping by one element, which counts twice: the norm is that of 1, 1, 2, 1, 1.
    overlapping = certify(blocked(np.ones((1, 6)), 3, starts=(0, 2))).lipschitz_bound
    assert np.sqrt(8.0) <= overlapping <= np.sqrt(6.0) * np.sqrt(2.0) + 1e-9


def test_the_error_of_blocks_is_a_fraction_of_that_of_one_long_sum() -> None:
    weight = np.linalg.qr(np.random.default_rng(2).standard_normal((256, 256)))[0]
    whole, split = (certify(blocked(weight, size)).logit_error for size in (256, 16))
    assert split < whole * 24 / 256


# --- adversaries of the rounding --------------------------------------------------------------------------------------


def adversary(terms: int, of: str, bias: bool) -> Fraction:
    """Error of `sum x_k + bias` over all-one images, in blocks of one column, every rounding upwards by u.

    A pixel is rounded twice, to float64 and to float32; both are exact here.
    """
    values = [Fraction(1) * (1 + U) for _ in range(terms)]
    exact = Fraction(terms)
    if bias:
        values[0] = (values[0] + 1) * (1 + U)
        exact += 1
    if of == "chain":
        total = values[0]
        for value in values[1:]:
            total = (total + value) * (1 + U)
        return total - exact
    while len(values) > 1:
        pairs = [values[k : k + 2] for k in range(0, len(values), 2)]
        values = [pair[0] if len(pair) == 1 else sum(pair) * (1 + U) for pair in pairs]
    return values[0] - exact


def of_ones(terms: int, of: Sum, bias: bool) -> bytes:
    b = GraphBuilder(dtype=np.float32)
    products = []
    for k, part in enumerate(parts_of(b, "image", range(terms), 1)):
        ones = [b.constant(np.ones((1, 1)))]
        if bias and k == 0:
            ones.append(b.constant(np.ones(1)))
        products.append(b.one("Gemm", part, *ones))
    return b.model((terms,), of(b, products), 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of", [tree, chain])
def test_no_adversary_of_the_rounding_exceeds_the_error(of: Sum, bias: bool) -> None:
    model = of_ones(8, of, bias)
    # Without the rounding of the pixels, at most sqrt(8) 2^-24 (1 + 2^-28) in norm times that of the row.
    own = certify(model).logit_error - 8.0 * 2.0**-24 * (1.0 + 2.0**-20)
    assert Fraction(own) >= adversary(8, of.__name__, bias)


@pytest.mark.parametrize("of", [tree, chain])
def test_additions_that_are_not_counted_would_be_caught(of: Sum, monkeypatch: pytest.MonkeyPatch) -> None:
    summed = blocks.sum_of_products

    def forgetful(*arguments: object) -> object:
        made = summed(*arguments)
        return made and replace(made, roundings=2)

    monkeypatch.setattr(arithmetic, "sum_of_products", forgetful)
    own = certify(of_ones(8, of, False)).logit_error - 8.0 * 2.0**-24 * (1.0 - 2.0**-20)
    assert Fraction(own) < adversary(8, of.__name__, False)


def test_a_sum_of_three_is_added_in_any_order() -> None:
    # (third + first) + second: the third goes through two additions, though the graph names it last.
    b = GraphBuilder(dtype=np.float32)
    parts = parts_of(b, "image", range(0, 30, 10), 10)
    terms = [b.one("MatMul", part, b.constant(np.ones((10, 1)))) for part in parts]
    # Without the rounding of the pixels, as above.
    error = certify(b.model((30,), b.one("Sum", *terms), 1)).logit_error - 30.0 * 2.0**-24 * (1.0 + 2.0**-20)
    # Every block 10 roundings of each of its products, and two additions: all of them upwards.
    assert error >= float(30 * ((1 + U) ** 12 - 1)) * 0.99


def test_huge_constants_that_cancel_between_blocks_are_paid_for() -> None:
    b = GraphBuilder(dtype=np.float32)
    parts = parts_of(b, "image", range(2), 1)
    terms = [
        b.one("Gemm", part, b.constant(np.ones((1, 1))), b.constant(np.array([size])))
        for part, size in zip(parts, (2.0**20, -(2.0**20)), strict=True)
    ]
    assert certify(b.model((2,), b.one("Add", *terms), 1)).logit_error >= 2.0**20 * 2.0**-24


def test_blocks_whose_products_overflow_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="overflow"):
        certify(blocked(np.array([[2.0**127, 2.0**127]]), 1))


def test_underflow_counts_in_every_block() -> None:
    # Products and partial sums below the smallest normal number may all be taken for 0.
    tiny = float(np.finfo(np.float32).tiny)
    bound = certify(blocked(np.full((1, 64), tiny / 2.0), 8)).logit_error
    assert bound >= 64 * tiny / 2.0


def test_a_sum_that_is_added_to_itself_over_and_over_costs_no_memory() -> None:
    b = GraphBuilder(dtype=np.float32)
    x = b.one("MatMul", "image", b.constant(np.eye(4)))
    for _ in range(60):
        x = b.one("Add", x, x)
    certificate = certify(b.model((4,), x, 4))
    assert 2.0**60 <= certificate.lipschitz_bound <= 2.0**60 * (1.0 + 1e-6)


def test_blocks_of_a_matrix_on_the_left_are_one_map() -> None:
    b = GraphBuilder(dtype=np.float32)
    weight = np.linalg.qr(np.random.default_rng(3).standard_normal((16, 16)))[0].astype(np.float32)
    parts = parts_of(b, "image", range(0, 16, 4), 4)
    terms = [b.one("MatMul", b.constant(weight[:, 4 * k : 4 * k + 4]), part) for k, part in enumerate(parts)]
    y = b.one("Add", tree(b, terms), b.constant(np.ones((16, 1))))
    certificate = certify(b.model((16, 3), b.one("Flatten", y, axis=1), 48))
    assert 1.0 - 1e-6 <= certificate.lipschitz_bound <= 1.0 + 1e-6


def test_the_error_of_a_function_of_blocks_begins_at_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its error is less than those of its operands, so that what is left of it says nothing about its own rounding.
    noted: list[float] = []
    rest = products._rest
    monkeypatch.setattr(products, "_rest", lambda *a: noted.append(rest(*a)) or noted[-1])
    b = GraphBuilder(dtype=np.float32)
    x = b.one("MatMul", "image", b.constant(np.eye(4)))
    certify(b.model((4,), b.one("Add", x, x), 4))
    assert noted == []
