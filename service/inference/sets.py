"""The options `coverage` and `max_error`: certified sets and decisions, from logits and the calibration in the card.

Both use the margins at the input of the model, as calibration did; a change of the image that was sent reaches that
input at most `norm` times as far, see `Preprocessing`.

Axes: N images, K classes.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import numpy as np

from service.artefact.card import Calibration
from service.certificate import certified_radius
from service.certificate.sets import certified_set, scaled_up
from service.errors import CalibrationError
from service.inference.classifier import Classifier
from service.shapes import Bool, Float64

Decision = Literal["accept", "abstain"]


@runtime_checkable
class SetOptions(Protocol):
    """Options of sets and decisions."""

    @property
    def coverage(self) -> float | None:
        """Probability with which the set holds the true class; null without a set."""
        ...

    @property
    def max_error(self) -> float | None:
        """Largest share of wrong predictions among the accepted ones; null without a decision."""
        ...

    @property
    def epsilon(self) -> float | None:
        """Radius below which the image may be changed; null for 0."""
        ...


def check_calibration(classifier: Classifier, options: SetOptions) -> None:
    """Refuse a coverage or an error that the calibration of the model does not reach.

    Raises:
        CalibrationError: the model is not calibrated, or not for this value; the message says which are available.
    """
    if options.coverage is not None:
        _quantile(classifier, options.coverage)
    if options.max_error is not None:
        _threshold(classifier, options.max_error)


def sets_of(
    classifier: Classifier, options: SetOptions, logits_NK: Float64[np.ndarray, "N K"], sent_shape: tuple[int, ...]
) -> Bool[np.ndarray, "N K"] | None:
    """Return which classes are in the certified set of each image; null without `coverage`.

    Args:
        classifier: the model.
        options: `check_calibration` has passed.
        logits_NK: as computed for the images.
        sent_shape: (C, H, W) of the images as sent.
    """
    if options.coverage is None:
        return None
    certificate = classifier.certificate
    channels, height, width = sent_shape
    view = classifier.view((channels, height, width), resize=True)
    norm = 1.0 if view.preprocessing is None else view.preprocessing.norm
    more_error = view.certificate.logit_error - certificate.logit_error
    return certified_set(
        logits_NK,
        _quantile(classifier, options.coverage),
        scaled_up(0.0 if options.epsilon is None else options.epsilon, norm),
        certificate.margin_bounds_KK,
        excess=2.0 * float(np.nextafter(more_error, np.inf)) if more_error > 0.0 else 0.0,
    )


def decisions_of(
    classifier: Classifier, options: SetOptions, logits_NK: Float64[np.ndarray, "N K"]
) -> list[Decision] | None:
    """Return whether each prediction is accepted; null without `max_error`.

    Args:
        classifier: the model.
        options: `check_calibration` has passed.
        logits_NK: as computed for the images.
    """
    if options.max_error is None:
        return None
    threshold = _threshold(classifier, options.max_error)
    radii = certified_radius(logits_NK, classifier.certificate.margin_bounds_KK, classifier.certificate.logit_error)
    accepted_N = (radii.radius_N >= threshold) & np.isfinite(logits_NK).all(axis=1)
    return ["accept" if accepted else "abstain" for accepted in accepted_N.tolist()]


def _quantile(classifier: Classifier, coverage: float) -> float:
    listed = _calibration(classifier, "coverage").quantiles
    for entry in listed:
        if entry.coverage >= coverage:
            return entry.quantile
    raise CalibrationError(
        f"coverage {coverage!r} is above {listed[-1].coverage!r}, the largest that the calibration images of "
        f"{classifier.name} support; ask for that or less"
    )


def _threshold(classifier: Classifier, max_error: float) -> float:
    listed = _calibration(classifier, "max_error").thresholds
    reached = [entry.radius for entry in listed if entry.error_bound <= max_error]
    if reached:
        return min(reached)
    if not listed:
        raise CalibrationError(f"{classifier.name} has no thresholds for max_error; calibrate it with more images")
    raise CalibrationError(
        f"max_error {max_error!r} is below {min(entry.error_bound for entry in listed)!r}, the smallest that the "
        f"calibration images of {classifier.name} support; ask for that or more"
    )


def _calibration(classifier: Classifier, option: str) -> Calibration:
    calibration = classifier.card.calibration
    if calibration is None:
        raise CalibrationError(
            f"{classifier.name} is not calibrated, which {option} needs; choose a model whose card (/models/NAME) has "
            "`calibration`, or leave the option out (the operator can run `lipcert calibrate ARTEFACT --data DIR`)"
        )
    return calibration
