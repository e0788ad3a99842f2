"""Certified sets and decisions of a classifier, from the calibration in its card."""

from __future__ import annotations

from dataclasses import dataclass

import builders
import numpy as np
import pytest

from service.artefact.card import AcceptanceThreshold, Calibration, ConformalQuantile
from service.certificate.sets import certified_set
from service.errors import CalibrationError
from service.inference.classifier import Classifier
from service.inference.sets import check_calibration, decisions_of, sets_of

THRESHOLDS = [(1.5, 200, 0, 0.02), (0.5, 500, 10, 0.05), (0.0, 1000, 150, 0.2)]


@dataclass(frozen=True)
class Asked:
    """Options of sets and decisions."""

    coverage: float | None = None
    max_error: float | None = None
    epsilon: float | None = None


def calibrated(model: Classifier, quantiles: dict[float, float]) -> Classifier:
    block = Calibration(
        model=model.digest,
        n=1000,
        source="drawn",
        confidence=0.95,
        quantiles=[ConformalQuantile(coverage=coverage, quantile=q) for coverage, q in quantiles.items()],
        thresholds=[
            AcceptanceThreshold(radius=radius, accepted=accepted, errors=errors, error_bound=bound)
            for radius, accepted, errors, bound in THRESHOLDS
        ],
    )
    model.card = model.card.model_copy(update={"calibration": block})
    return model


@pytest.fixture(scope="module")
def model() -> Classifier:
    return calibrated(builders.load(builders.random_groupsort(3)), {0.8: 0.1, 0.9: 0.0, 0.95: -0.2})


def images(count: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 1, side, side)) / 255.0


@pytest.mark.parametrize(("coverage", "quantile"), [(0.8, 0.1), (0.85, 0.0), (0.9, 0.0), (0.91, -0.2), (0.01, 0.1)])
@pytest.mark.parametrize("epsilon", [None, 0.0, 0.3])
def test_a_set_is_that_of_the_next_listed_coverage(
    model: Classifier, coverage: float, quantile: float, epsilon: float | None
) -> None:
    logits_NK, _ = model.classify(images(20))
    asked = Asked(coverage=coverage, epsilon=epsilon)
    check_calibration(model, asked)
    member_NK = sets_of(model, asked, logits_NK, (1, 4, 4))
    expected = certified_set(logits_NK, quantile, epsilon or 0.0, model.certificate.margin_bounds_KK)
    assert member_NK is not None
    assert (member_NK == expected).all()


def test_without_the_options_there_is_neither_set_nor_decision(model: Classifier) -> None:
    uncalibrated = builders.load(builders.random_groupsort(3))
    logits_NK, _ = model.classify(images(2))
    for one in (model, uncalibrated):
        check_calibration(one, Asked())
        assert sets_of(one, Asked(epsilon=0.5), logits_NK, (1, 4, 4)) is None
        assert decisions_of(one, Asked(coverage=0.9), logits_NK) is None


def test_a_change_of_a_larger_image_reaches_the_model_as_far_as_the_norm_of_the_resize_says(model: Classifier) -> None:
    """The set with epsilon at 8 x 8 is that of `epsilon * norm` at 4 x 4, up to the error of the resize."""
    view = model.view((1, 8, 8), resize=True)
    assert view.preprocessing is not None
    norm = view.preprocessing.norm
    assert norm < 0.75
    logits_NK, _ = view.classify(images(200, side=8))
    found = sets_of(model, Asked(coverage=0.9, epsilon=0.2), logits_NK, (1, 8, 8))
    bounds_KK = model.certificate.margin_bounds_KK
    assert found is not None
    assert (found == certified_set(logits_NK, 0.0, 0.2 * norm, bounds_KK)).all()
    assert (found != certified_set(logits_NK, 0.0, 0.2, bounds_KK)).any()


def test_the_error_of_a_resize_is_added_to_the_margins(model: Classifier) -> None:
    view = model.view((1, 8, 8), resize=True)
    more = view.certificate.logit_error - model.certificate.logit_error
    assert more > 0.0
    bounds_KK = model.certificate.margin_bounds_KK
    # Class 1 is below the quantile by as much as the error of the resize allows.
    logits_NK = np.array([[0.0, -1.9 * more, -9.0]])
    one = calibrated(builders.load(builders.random_groupsort(3)), {0.9: 0.0})
    resized, plain = (sets_of(one, Asked(coverage=0.9), logits_NK, (1, side, side)) for side in (8, 4))
    assert resized is not None
    assert plain is not None
    assert resized.tolist() == [[True, True, False]]
    assert plain.tolist() == [[True, False, False]]
    assert bounds_KK.shape == (3, 3)


@pytest.mark.parametrize(("max_error", "threshold"), [(0.02, 1.5), (0.049, 1.5), (0.05, 0.5), (0.2, 0.0), (0.9, 0.0)])
def test_a_decision_accepts_from_the_smallest_threshold_that_is_allowed(
    model: Classifier, max_error: float, threshold: float
) -> None:
    logits_NK, radii = model.classify(images(50))
    decisions = decisions_of(model, Asked(max_error=max_error), logits_NK)
    assert decisions == ["accept" if radius >= threshold else "abstain" for radius in radii.radius_N]


def test_a_decision_is_the_same_for_any_epsilon_and_abstains_without_finite_logits(model: Classifier) -> None:
    logits_NK, _ = model.classify(images(5))
    plain = decisions_of(model, Asked(max_error=0.05), logits_NK)
    assert plain == decisions_of(model, Asked(max_error=0.05, epsilon=2.0), logits_NK)
    assert decisions_of(model, Asked(max_error=0.9), np.array([[np.nan, 0.0, 0.0]])) == ["abstain"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(coverage=0.96), r"coverage 0\.96 is above 0\.95, the largest"),
        (Asked(max_error=0.01), r"max_error 0\.01 is below 0\.02, the smallest"),
    ],
)
def test_what_the_calibration_does_not_reach_is_refused_with_what_it_reaches(
    model: Classifier, asked: Asked, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        check_calibration(model, asked)


@pytest.mark.parametrize("asked", [Asked(coverage=0.5), Asked(max_error=0.5)])
def test_a_model_without_calibration_says_how_to_get_one(asked: Asked) -> None:
    with pytest.raises(
        CalibrationError, match=r"test is not calibrated, which (coverage|max_error) needs.*lipcert cali"
    ):
        check_calibration(builders.load(builders.random_groupsort(3)), asked)
