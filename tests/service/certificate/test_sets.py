"""Certified sets: quantiles by definition, coverage by counting, scores in exact rationals with planted errors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flint import arb
from hypothesis import given
from hypothesis import strategies as st
from thorough import often

from service.certificate import sets
from service.certificate.sets import (
    acceptance_thresholds,
    certified_set,
    conformal_quantile,
    lower_scores,
    order_statistic,
    scaled_up,
    share_bound,
    upper_scores,
)

COVERAGES = st.sampled_from([0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.97])
SCORES = st.lists(st.integers(-8, 8), min_size=1, max_size=60)
ERROR = Fraction(1, 2**10)
"""E of the cases; the logits are multiples of it, so that planted errors are exact."""


@given(SCORES, COVERAGES)
def test_the_quantile_is_the_largest_score_that_enough_scores_reach(scores: list[int], coverage: float) -> None:
    enough = -((-(len(scores) + 1) * Fraction(str(coverage))) // 1)
    reached = [q for q in scores if sum(score >= q for score in scores) >= enough]
    if reached:
        assert conformal_quantile(np.array(scores, float), coverage) == max(reached)
    else:
        with pytest.raises(ValueError, match="calibration images"):
            conformal_quantile(np.array(scores, float), coverage)


def coverage_findings(module: Any) -> Iterator[str]:
    """Of n + 1 scores, each left out in turn: the theorem counts how many reach the quantile of the others."""
    random = np.random.default_rng(0)
    for n, coverage in ((9, 0.5), (19, 0.9), (39, 0.95), (30, 0.8), (30, 0.75), (20, 0.95)):
        score_N = random.permutation(n + 1).astype(float)
        reached = sum(score_N[i] >= module.conformal_quantile(np.delete(score_N, i), coverage) for i in range(n + 1))
        expected = n + 1 - module.order_statistic(n, coverage)
        if Fraction(reached, n + 1) < Fraction(str(coverage)):
            yield f"{reached} of {n + 1} reach it, coverage {coverage}"
        if reached != expected or Fraction(reached - 1, n + 1) >= Fraction(str(coverage)):
            yield f"{reached} of {n + 1} reach it, which is more than the coverage {coverage} needs"


def test_of_exchangeable_scores_the_stated_share_reaches_the_quantile_and_no_more() -> None:
    assert list(coverage_findings(sets)) == []


def test_too_few_scores_are_refused() -> None:
    assert order_statistic(18, 0.95) == 0
    with pytest.raises(ValueError, match=r"0\.95 is not available from 18"):
        conformal_quantile(np.zeros(18), 0.95)
    assert conformal_quantile(np.arange(19.0), 0.95) == 0.0


def exact_bounds(slope_K: np.ndarray) -> np.ndarray:
    """`K_kj` of the logits `slope_k x + offset_k` of one pixel: exact."""
    return np.abs(slope_K[:, None] - slope_K).astype(float)


def rounding_findings(module: Any) -> Iterator[str]:
    """Yield the scores of random floats that are on the wrong side of their exact quotients."""
    random = np.random.default_rng(1)
    logits_NK, bounds_KK = random.normal(size=(400, 3)), random.uniform(0.5, 2.0, (3, 3))
    low_NK = module.lower_scores(logits_NK, bounds_KK, 0.0)
    high_NK, higher_NK = (module.upper_scores(logits_NK, bounds_KK, excess) for excess in (0.0, 2.0**-9))
    for n, logits_K in enumerate(logits_NK):
        for k in range(3):
            margins = {j: Fraction(logits_K[k]) - Fraction(logits_K[j]) for j in range(3) if j != k}
            exact, exact_higher = (
                min((margin + excess) / Fraction(bounds_KK[k, j]) for j, margin in margins.items())
                for excess in (0, Fraction(1, 2**9))
            )
            if Fraction(low_NK[n, k]) > exact:
                yield "a calibration score was rounded up"
            if not (np.isfinite(high_NK).all() and Fraction(high_NK[n, k]) >= exact):
                yield "a score was rounded down"
            if not (np.isfinite(higher_NK).all() and Fraction(higher_NK[n, k]) >= exact_higher):
                yield "a score with an excess was rounded down"


def score_findings(module: Any, seed: int, cases: int = 40) -> Iterator[str]:
    """Yield the cases in which a set could lose a class although `||x' - x||` allows it not to.

    Logits of one pixel with integer slopes, so that bounds and distances are exact. Errors of E are planted in every
    direction: at x so that class k looks best, at x' so that it looks worst. Distances reach the exact scores.
    """
    random = np.random.default_rng(seed)
    for _ in range(cases):
        slope_K = random.choice(np.arange(-9, 10), 3, replace=False)
        offset_K = [Fraction(int(number), 2**6) for number in random.integers(-200, 200, 3)]
        bounds_KK = exact_bounds(slope_K)
        x, other = (Fraction(int(number), 2**8) for number in random.integers(0, 257, 2))
        k = int(random.integers(3))
        exact_at = [
            [int(slope) * at + offset for slope, offset in zip(slope_K, offset_K, strict=True)] for at in (x, other)
        ]
        sign_K = [1 if j == k else -1 for j in range(3)]
        planted = [
            np.array([[float(logit + sign * direction * ERROR) for logit, sign in zip(exact, sign_K, strict=True)]])
            for exact, direction in zip(exact_at, (1, -1), strict=True)
        ]
        low = Fraction(float(module.lower_scores(planted[0], bounds_KK, float(ERROR))[0, k]))
        found = float(module.upper_scores(planted[1], bounds_KK)[0, k])
        if not np.isfinite(found):
            yield f"a score of {found!r}"
            continue
        high = Fraction(found)
        t, t_other = (
            min((exact[k] - exact[j] - 2 * ERROR) / Fraction(float(bounds_KK[k, j])) for j in range(3) if j != k)
            for exact in exact_at
        )
        if not low <= t:
            yield f"a calibration score of {float(low)!r} is above {float(t)!r}"
        if not high >= t_other:
            yield f"a score of {float(high)!r} is below {float(t_other)!r}"
        if not high + abs(other - x) >= low:
            yield "a score fell by more than the distance"
        if low < t - Fraction(1, 2**40) or high > t_other + Fraction(1, 2**40):
            yield "a score is looser than rounding needs"
        # The threshold that the calibration image itself gives, and the distance that is allowed.
        distance = float(abs(other - x))
        if not module.certified_set(planted[1], float(low), distance, bounds_KK)[0, k]:
            yield "the set lost the class"


@given(st.integers(0, 2**32))
def test_no_planted_error_pushes_a_score_below_its_calibration_score_by_more_than_the_distance(seed: int) -> None:
    assert list(score_findings(sets, seed, 5)) == []


MUTANTS = {
    "calibration scores without the error": ("logit_error).min", "0.0).min"),
    "calibration scores with half of the error": ("logit_error).min", "0.5 * logit_error).min"),
    "margins rounded down": (
        "np.nextafter(safe_NK[:, k : k + 1] - safe_NK, np.inf)",
        "np.nextafter(safe_NK[:, k : k + 1] - safe_NK, -np.inf)",
    ),
    "quotients rounded down": (
        "np.nextafter(margin_NK / bound_K, np.inf)",
        "np.nextafter(margin_NK / bound_K, -np.inf)",
    ),
    "quotients not rounded": ("np.nextafter(margin_NK / bound_K, np.inf)", "margin_NK / bound_K"),
    "the error of the answer taken off": ("- safe_NK, np.inf)", "- safe_NK - 2**-8, np.inf)"),
    "the largest quotient": ("quotient_NK.min(axis=1)", "np.where(np.isinf(quotient_NK), -9, quotient_NK).max(axis=1)"),
    "a column of bounds for a row": ("margin_bounds_KK[np.array([k])]", "margin_bounds_KK[np.array([(k + 1) % 3])]"),
    "epsilon taken off": ("excess) + reach", "excess) - reach"),
    "the order statistic above": ("scores_N, m - 1)[m - 1]", "scores_N, m)[m]"),
    "the order statistic below": ("scores_N, m - 1)[m - 1]", "scores_N, max(m - 2, 0))[max(m - 2, 0)]"),
    "n in place of n + 1": ("(n + 1) * (1 - Fraction", "n * (1 - Fraction"),
    "rounded to the next rank": ("math.floor((n + 1)", "math.ceil((n + 1)"),
}
"""Text of the module, and what stands there in the mutant."""


def mutated(old: str, new: str) -> ModuleType:
    source = inspect.getsource(sets)
    assert source.count(old) == 1, old
    mutant = ModuleType("mutant")
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    return mutant


@pytest.mark.parametrize("kind", MUTANTS)
def test_a_mutant_is_noticed(kind: str) -> None:
    mutant = mutated(*MUTANTS[kind])
    findings = itertools.chain(coverage_findings(mutant), score_findings(mutant, 0, 200), rounding_findings(mutant))
    assert next(findings, None) is not None


def test_the_module_itself_passes_the_checks_of_its_mutants() -> None:
    assert [*score_findings(sets, 0, 200), *rounding_findings(sets)] == []


def test_logits_with_a_larger_error_are_compared_with_the_excess() -> None:
    logits_NK, bounds_KK = np.array([[0.0, 1.0]]), np.ones((2, 2))
    assert certified_set(logits_NK, -0.5, 0.25, bounds_KK).tolist() == [[False, True]]
    assert certified_set(logits_NK, -0.5, 0.25, bounds_KK, excess=0.25).tolist() == [[True, True]]
    assert upper_scores(logits_NK, bounds_KK, excess=0.25)[0, 0] >= -0.75


def test_the_largest_logit_stays_whatever_the_quantile_is() -> None:
    member_NK = certified_set(np.array([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]]), 1e9, 0.0, np.ones((3, 3)))
    assert member_NK.tolist() == [[False, True, False], [True, False, False]]


def test_sets_grow_with_epsilon() -> None:
    random = np.random.default_rng(3)
    logits_NK, bounds_KK = random.normal(size=(50, 5)), random.uniform(0.5, 2.0, (5, 5))
    smaller = certified_set(logits_NK, 0.1, 0.0, bounds_KK)
    for epsilon in (0.1, 0.5, 1.0, 10.0):
        larger = certified_set(logits_NK, 0.1, epsilon, bounds_KK)
        assert (larger | ~smaller).all()
        smaller = larger
    assert smaller.all()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_exclude_no_class(broken: float) -> None:
    logits_NK = np.array([[broken, 0.0, 1.0], [3.0, 0.0, 1.0]])
    assert certified_set(logits_NK, 5.0, 0.0, np.ones((3, 3))).tolist() == [[True] * 3, [True, False, False]]
    low_NK = lower_scores(logits_NK, np.ones((3, 3)), 0.0)
    assert (low_NK[0] == -np.finfo(np.float64).max).all()


def test_margins_that_never_change_decide_at_any_distance_or_at_none() -> None:
    logits_NK, bounds_KK = np.array([[1.0, 2.0]]), np.zeros((2, 2))
    assert certified_set(logits_NK, 0.0, 1e9, bounds_KK).tolist() == [[False, True]]
    low_NK = lower_scores(logits_NK, bounds_KK, 0.0)
    assert np.isfinite(low_NK).all()
    assert low_NK[0, 0] < -1e300
    assert low_NK[0, 1] > 1e300


@given(st.integers(0, 400), st.integers(1, 400), st.sampled_from([0.05, 0.0025, 0.5]))
def test_the_bound_of_a_share_is_that_of_clopper_and_pearson(errors: int, n: int, significance: float) -> None:
    errors = min(errors, n)
    bound = share_bound(errors, n, significance)
    if errors == n:
        assert bound == 1.0
        return
    # P(X <= errors) is the regularised incomplete beta function of 1 - p.
    tail = (1 - arb(bound)).beta_lower(n - errors, errors + 1, regularized=True)
    assert tail <= significance
    below = (1 - arb(bound * (1 - 1e-6))).beta_lower(n - errors, errors + 1, regularized=True)
    assert below > significance


def test_a_share_of_more_errors_than_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="3 errors in 2 draws"):
        share_bound(3, 2, 0.05)


@given(st.lists(st.integers(0, 5), min_size=20, max_size=60), st.integers(1, 20))
def test_thresholds_accept_the_stated_share_at_most(radii: list[int], twentieths: int) -> None:
    radius_N = np.array(radii, float)
    share = Fraction(twentieths, 20)
    (threshold,) = acceptance_thresholds(radius_N, [share])
    accepted = int((radius_N >= threshold).sum())
    assert accepted <= share * len(radii)
    if len(set(radii)) == len(radii):
        assert accepted == share * len(radii) // 1
    assert accepted == len(radii) or twentieths < 20


def test_a_bound_over_all_thresholds_holds_as_often_as_stated() -> None:
    """Errors at random with a known share above each threshold: the bounds are too small in 5 % of draws at most."""
    random = np.random.default_rng(5)
    shares = [Fraction(step, 4) for step in range(1, 5)]
    broken = 0
    draws = often(80, 400)
    for _ in range(draws):
        radius_N = random.uniform(0.0, 1.0, 200)
        wrong_N = random.uniform(0.0, 1.0, 200) < 0.3 * (1.0 - radius_N)
        for threshold in acceptance_thresholds(radius_N, shares):
            accepted_N = radius_N >= threshold
            # The mean of 0.3 (1 - r) over r above the threshold.
            true = 0.3 * (1.0 - 0.5 * (1.0 + threshold))
            if share_bound(int(wrong_N[accepted_N].sum()), int(accepted_N.sum()), 0.05 / len(shares)) < true:
                broken += 1
                break
    assert broken <= 0.05 * draws


@given(st.floats(0.0, 1e3), st.floats(0.1, 10.0))
def test_epsilon_at_the_input_of_the_model_is_rounded_up(epsilon: float, norm: float) -> None:
    assert Fraction(scaled_up(epsilon, norm)) >= Fraction(epsilon) * Fraction(norm)
    assert scaled_up(epsilon, norm) == pytest.approx(epsilon * norm, rel=1e-14, abs=1e-300)
    assert scaled_up(epsilon, 1.0) == epsilon
