"""Bounds of the margins between many classes, by the rows that an answer asks for: never below the exact ones."""

from __future__ import annotations

import pickle
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from builders import linear

from service.certificate import analysis, certified_radius, certify, margins
from service.certificate.margins import Head, MarginRows, are_bounds, margins_behind
from service.certificate.norms import pairwise_distance_bounds


def rows_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 7))
    match kind:
        case "nearly alike":
            rows[1:] = rows[0] * (1.0 + 1e-9 * rng.normal(size=(11, 7)))
        case "large":
            rows *= 2.0**600
        case "tiny":
            rows *= 2.0**-600
        case "of all sizes":
            rows *= 10.0 ** rng.integers(-9, 9, size=(12, 1))
        case _:
            pass
    return rows


KINDS = ["ordinary", "nearly alike", "large", "tiny", "of all sizes"]


def exact_square(one: np.ndarray, other: np.ndarray) -> Fraction:
    return sum(
        ((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(one.tolist(), other.tolist(), strict=True)), Fraction()
    )


def excess(rows_KM: np.ndarray) -> float:
    """Return the smallest `bound^2 / exact^2 - 1` of all pairs, the Lipschitz bound being 3."""
    head = Head(rows_KM, 3.0).scaled()
    bounds_KK = MarginRows(len(rows_KM), np.inf, ((head,),))[np.arange(len(rows_KM))]
    pairs = [(i, j) for i in range(len(rows_KM)) for j in range(len(rows_KM)) if i != j]
    return min(float(Fraction(bounds_KK[i, j]) ** 2 / (9 * exact_square(rows_KM[i], rows_KM[j])) - 1) for i, j in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_never_below_the_exact_distances(kind: str) -> None:
    assert excess(rows_of(kind)) >= 0.0


@pytest.mark.parametrize("kind", ["ordinary", "large", "tiny"])
def test_a_row_is_as_good_as_the_table(kind: str) -> None:
    rows = rows_of(kind)
    found = Head(rows, 1.0).scaled().margins(np.arange(12))
    table = pairwise_distance_bounds(rows)
    np.testing.assert_allclose(found + np.diag(np.full(12, np.inf)), table + np.diag(np.full(12, np.inf)), rtol=1e-12)


def test_without_the_rounding_of_products_a_row_would_be_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(margins, "gamma_up", lambda n: 0.0)
    monkeypatch.setattr(margins, "row_norms_up", lambda rows: np.linalg.norm(rows, axis=1))
    assert excess(rows_of("nearly alike")) < 0.0


def test_a_deviation_of_the_forms_counts_twice() -> None:
    rows = rows_of("ordinary")
    plain, off = (Head(rows, 2.0, deviation).margins(np.arange(12)) for deviation in (0.0, 0.5))
    assert (off >= plain + 2.0 * 0.5 * 2.0).all()


def test_sums_of_forms_add_and_the_smallest_way_counts() -> None:
    one, other = Head(rows_of("ordinary"), 1.0), Head(rows_of("ordinary")[::-1].copy(), 2.0)
    both = MarginRows(12, np.inf, ((one, other),))[np.array([3])]
    alone = one.margins(np.array([3])) + other.margins(np.array([3]))
    np.testing.assert_allclose(np.delete(both[0], 3), np.delete(alone[0], 3), rtol=1e-14)
    assert (MarginRows(12, np.inf, ((one, other), (one,)))[np.array([3])] <= both).all()
    assert MarginRows(12, 0.25, ((one, other),)).max() == 0.25


def test_bounds_behind_a_map_grow_by_its_norm() -> None:
    bounds = MarginRows(12, np.inf, ((Head(rows_of("ordinary"), 1.0),),))
    behind = margins_behind(margins_behind(bounds, 3.0), 0.5)
    assert (np.asarray(behind) >= np.asarray(bounds) * 1.5).all()
    np.testing.assert_allclose(np.asarray(behind), np.asarray(bounds) * 1.5, rtol=1e-14)


@pytest.mark.parametrize(
    ("largest", "fine"), [(1.0, True), (0.0, True), (np.inf, False), (np.nan, False), (-1.0, False)]
)
def test_bounds_that_are_none_are_refused(largest: float, fine: bool) -> None:
    bounds = MarginRows(3, largest, ())
    assert are_bounds(bounds) is fine
    if not fine:
        with pytest.raises(ValueError, match="finite and non-negative"):
            certified_radius(np.zeros((1, 3)), bounds, 0.0)


def test_many_classes_are_certified_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    model = linear(rng.normal(size=(40, 16)), rng.normal(size=40), (1, 4, 4)).model
    table = certify(model)
    monkeypatch.setattr(analysis, "MOST_TABLED_CLASSES", 39)
    rows = certify(model)
    assert isinstance(rows.margin_bounds_KK, MarginRows)
    assert (rows.margin_bounds_KK.shape, len(rows.margin_bounds_KK), rows.margin_table()) == ((40, 40), 40, None)
    np.testing.assert_allclose(np.asarray(rows.margin_bounds_KK), table.margin_bounds_KK, rtol=1e-12)
    logits_NK = rng.normal(size=(20, 40))
    one, other = (certified_radius(logits_NK, made.margin_bounds_KK, made.logit_error) for made in (table, rows))
    np.testing.assert_array_equal(one.class_id_N, other.class_id_N)
    np.testing.assert_array_equal(one.runner_up_N, other.runner_up_N)
    np.testing.assert_allclose(one.radius_N, other.radius_N, rtol=1e-11)
    sent = pickle.loads(pickle.dumps(rows)).after_preprocessing(2.0, 0.0)
    np.testing.assert_allclose(np.asarray(sent.margin_bounds_KK), 2.0 * np.asarray(table.margin_bounds_KK), rtol=1e-12)


@pytest.mark.parametrize(("classes", "tabled"), [(256, True), (257, False)])
def test_up_to_256_classes_have_a_table(classes: int, tabled: bool) -> None:
    certificate = certify(linear(np.ones((classes, 4)), np.zeros(classes), (1, 2, 2)).model)
    assert isinstance(certificate.margin_bounds_KK, np.ndarray) is tabled


def test_no_table_of_all_pairs_is_made() -> None:
    classes = 4000
    rng = np.random.default_rng(2)
    model = linear(rng.normal(size=(classes, 64)), np.zeros(classes), (1, 8, 8)).model
    tracemalloc.start()
    try:
        certificate = certify(model)
        certified_radius(rng.normal(size=(2, classes)), certificate.margin_bounds_KK, certificate.logit_error)
        assert tracemalloc.get_traced_memory()[1] < classes * classes * 8 / 4
    finally:
        tracemalloc.stop()
