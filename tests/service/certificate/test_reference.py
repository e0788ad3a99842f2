"""The radius at a reference image: the theorem in exact rational numbers, and the directions of its roundings."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thorough import often

from service.certificate import pair_radii, reference, reference_cost, reference_radii

SEEDS = st.integers(0, 2**32 - 1)
N = often(2_000, 20_000)
"""Boxes, images and references of the theorem."""
SIZE = 5


def fractions(values: np.ndarray) -> list[Fraction]:
    return [Fraction(value) for value in values.ravel().tolist()]


def exact_cost(x: list[Fraction], z: list[Fraction]) -> Fraction:
    """The cost as the theorem states it, term by term."""
    s = [b - a for a, b in zip(x, z, strict=True)]
    way = sum((v * v for v in s), Fraction(0))
    blocked = sum((max(v, 0) * a + max(-v, 0) * (1 - a) for v, a in zip(s, x, strict=True)), Fraction(0))
    return way + 2 * blocked


def squared_distance(x: list[Fraction], z: list[Fraction]) -> Fraction:
    return sum(((a - b) ** 2 for a, b in zip(x, z, strict=True)), Fraction(0))


def boxed(random: np.random.Generator, count: int) -> np.ndarray:
    """Images N x 1 x 1 x SIZE: grid values, the ends of the box, tiny and odd ones."""
    odd = random.random((count, 1, 1, SIZE)) ** random.choice([1.0, 8.0, 60.0], (count, 1, 1, SIZE))
    return np.select(
        [random.random(odd.shape) < share for share in (0.3, 0.3, 0.3)],
        [np.round(odd), random.integers(0, 256, odd.shape) / 255.0, 1.0 - odd],
        odd,
    )


def violations_of_the_theorem(cost: Callable[[list[Fraction], list[Fraction]], Fraction], count: int) -> int:
    """Images x' of the box with `||x' - z||^2 > ||x' - x||^2 + c`; half of them where the theorem is an equality."""
    random = np.random.default_rng(0)
    sent, held, other = (boxed(random, count) for _ in range(3))
    other = np.where(random.random((count, 1, 1, 1)) < 0.5, np.where(held > sent, 0.0, 1.0), other)
    found = 0
    for x, z, y in zip(*(map(fractions, images) for images in (sent, held, other)), strict=True):
        found += squared_distance(y, z) > squared_distance(y, x) + cost(x, z)
    return found


def test_no_image_of_the_box_is_farther_from_the_reference_than_the_theorem_says() -> None:
    assert violations_of_the_theorem(exact_cost, N) == 0


def test_the_theorem_needs_each_of_its_terms() -> None:
    def without_the_way(x: list[Fraction], z: list[Fraction]) -> Fraction:
        return exact_cost(x, z) - squared_distance(x, z)

    def without_the_upper_end(x: list[Fraction], z: list[Fraction]) -> Fraction:
        return exact_cost(x, z) - 2 * sum(max(a - b, 0) * (1 - a) for a, b in zip(x, z, strict=True))

    def without_the_lower_end(x: list[Fraction], z: list[Fraction]) -> Fraction:
        return exact_cost(x, z) - 2 * sum(max(b - a, 0) * a for a, b in zip(x, z, strict=True))

    for broken in (without_the_way, without_the_upper_end, without_the_lower_end):
        assert violations_of_the_theorem(broken, 500) > 0


def cost_findings(module: SimpleNamespace) -> list[str]:
    """Ways in which `reference_cost` fails: below the exact cost, or far above it."""
    random = np.random.default_rng(1)
    sent, held = boxed(random, 2000), boxed(random, 2000)
    # Ways of one unit in the last place of a pixel, too.
    held[::3] = np.clip(np.nextafter(sent[::3], random.choice([0.0, 1.0], sent[::3].shape)), 0.0, 1.0)
    found = []
    for x, z, cost in zip(sent, held, module.reference_cost(sent, held).tolist(), strict=True):
        exact = exact_cost(fractions(x), fractions(z))
        if Fraction(cost) < exact:
            found.append("below")
        if Fraction(cost) > exact * (1 + Fraction(1, 10**13)) + Fraction(1, 10**300):
            found.append("far above")
    return found


def radius_findings(module: SimpleNamespace) -> list[str]:
    """Ways in which `reference_radii` fails: beyond the theorem, or far below it."""
    random = np.random.default_rng(2)
    found = []
    for n in range(500):
        logits_NK = random.normal(size=(1, 3)) * 10.0 ** random.integers(-3, 3)
        bounds_KK = random.uniform(0.5, 2.0, (3, 3))
        error = float(random.choice([0.0, 1e-12, 1e-3]))
        i = int(random.integers(3))
        largest = (float(logits_NK[0, i]) - float(logits_NK[0].min())) / 0.5
        # Costs that leave nearly everything, and nearly nothing.
        share = random.choice([0.0, 1e-9, random.random(), 1.0 - 1e-9])
        cost_N = np.array([share * largest * largest / random.choice([1.0, 4.0, 9.0])])
        radius_NK = module.reference_radii(logits_NK, np.array([i]), cost_N, bounds_KK[[i]], error)
        for j in range(3):
            radius = float(radius_NK[0, j])
            if j == i:
                continue
            surplus = Fraction(float(logits_NK[0, i])) - Fraction(float(logits_NK[0, j])) - 4 * Fraction(error)
            left = (surplus / Fraction(float(bounds_KK[i, j]))) ** 2 - Fraction(float(cost_N[0]))
            if radius == -math.inf:
                if surplus > 0 and left > Fraction(1, 10**10) * Fraction(float(cost_N[0])) + Fraction(1, 10**20):
                    found.append(f"{n}: nothing proved")
            elif surplus <= 0 or Fraction(radius) ** 2 > left:
                found.append(f"{n}: beyond")
            elif radius < 0 or Fraction(radius) ** 2 < left * (1 - Fraction(1, 10**4)) - Fraction(1, 10**12):
                found.append(f"{n}: far below")
    return found


REAL = SimpleNamespace(reference_cost=reference_cost, reference_radii=reference_radii)


def test_the_cost_is_rounded_up_by_little() -> None:
    assert cost_findings(REAL) == []


def test_the_radius_is_rounded_down_by_little() -> None:
    assert radius_findings(REAL) == []


def test_the_cost_of_no_way_is_nothing() -> None:
    image = boxed(np.random.default_rng(3), 50)
    assert (reference_cost(image, image) == 0.0).all()


def rounded_to_nearest(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Without directed rounding: numpy's own results."""
    patch.setattr(reference.np, "nextafter", lambda value, _: value)
    patch.setattr(reference, "gamma_up", lambda _: 0.0)
    patch.setattr(reference, "SMALLEST_NORMAL", 0.0)
    return REAL


def rounded_the_wrong_way(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    nextafter = np.nextafter
    patch.setattr(reference.np, "nextafter", lambda value, end: nextafter(value, -end))
    return REAL


def with_the_class_of_the_reference(_: pytest.MonkeyPatch) -> SimpleNamespace:
    def radii(logits_NK: np.ndarray, _: np.ndarray, *others: object) -> np.ndarray:
        return reference_radii(logits_NK, np.argmax(logits_NK, axis=1), *others)  # type: ignore[arg-type]

    return SimpleNamespace(reference_cost=reference_cost, reference_radii=radii)


def without_the_cost(_: pytest.MonkeyPatch) -> SimpleNamespace:
    def radii(logits_NK: np.ndarray, class_id_N: np.ndarray, cost_N: np.ndarray, *others: object) -> np.ndarray:
        return reference_radii(logits_NK, class_id_N, 0.0 * cost_N, *others)  # type: ignore[arg-type]

    return SimpleNamespace(reference_cost=reference_cost, reference_radii=radii)


def without_the_box(_: pytest.MonkeyPatch) -> SimpleNamespace:
    """The squared way alone."""

    def cost(image: np.ndarray, held: np.ndarray) -> np.ndarray:
        return np.square(held - image).sum(axis=(1, 2, 3))

    return SimpleNamespace(reference_cost=cost, reference_radii=reference_radii)


@pytest.mark.parametrize(
    "mutate",
    [
        rounded_to_nearest,
        rounded_the_wrong_way,
        with_the_class_of_the_reference,
        without_the_cost,
        without_the_box,
    ],
)
def test_a_mutant_is_noticed(
    mutate: Callable[[pytest.MonkeyPatch], SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mutant = mutate(patch)
        assert [*cost_findings(mutant), *radius_findings(mutant)] != []


@given(SEEDS)
def test_the_image_that_was_sent_is_a_reference_of_its_own_radius(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits_NK, bounds_KK = random.normal(size=(4, 3)), random.uniform(0.1, 3.0, (3, 3))
    class_id_N = np.argmax(logits_NK, axis=1)
    at_reference = reference_radii(logits_NK, class_id_N, np.zeros(4), bounds_KK[class_id_N], 1e-9)
    sent = pair_radii(logits_NK, class_id_N, bounds_KK[class_id_N], 1e-9)
    proved = sent > 0
    assert (at_reference[proved] <= sent[proved]).all()
    np.testing.assert_allclose(at_reference[proved], sent[proved], rtol=1e-14)
    assert (at_reference[~proved] == -np.inf).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_prove_nothing(broken: float) -> None:
    radius_NK = reference_radii(np.array([[broken, 5.0, 0.0]]), np.array([1]), np.zeros(1), np.ones((1, 3)), 0.0)
    assert (radius_NK[0, [0, 2]] == -np.inf).all()


def test_a_margin_that_never_changes_is_proved_at_any_distance() -> None:
    radius_NK = reference_radii(np.array([[2.0, 1.0]]), np.array([0]), np.array([9.0]), np.zeros((1, 2)), 0.0)
    assert 1e150 < radius_NK[0, 1] < np.inf
