"""The outcome of one request: images, options and results in one object, from the computation to the answer.

A new option of `/predict` is computed here (`needs_gradients`, `explain`); the batcher between schema and answer does
not know it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from service.errors import PathTooLongError
from service.inference.classifier import Classifier, Prediction, View, counterfactuals, with_references
from service.inference.novelty import guard_of, with_novelty
from service.inference.path import find_paths
from service.inference.references import Provable
from service.inference.saliency import find_saliencies
from service.inference.sets import SetOptions, check_calibration
from service.inference.strength import GRADIENTS, strengthen
from service.shapes import Float64, UInt8

# Forward passes that cost as much as one run of the gradient graph, and as a search of two runs and one pass.
_GRADIENT_PASSES = 2
_SEARCH_PASSES = 5


class ImageOptions(SetOptions, Protocol):
    """Options that decide which results are computed."""

    @property
    def proof(self) -> Literal["fast", "best"]:
        """Whether reference images are searched for the largest radius (`best`)."""
        ...

    @property
    def epsilon(self) -> float | None:
        """Radius that the client needs: reference images are searched where it is not proved without."""
        ...

    @property
    def resize(self) -> bool:
        """Whether images of another size than the model's are resized."""
        ...

    @property
    def counterfactual(self) -> bool:
        """Whether a counterfactual is searched for each image."""
        ...

    @property
    def novelty(self) -> bool:
        """Whether the novelty model is asked, too."""
        ...

    @property
    def target(self) -> str | None:
        """Target label of the counterfactuals; default: the nearest other class."""
        ...

    @property
    def strength(self) -> float:
        """Distance of the counterfactuals in units of the nearest one found; 1 is that one itself."""
        ...

    @property
    def path(self) -> int | None:
        """Number of images from each image to its counterfactual; null without a path."""
        ...

    @property
    def saliency(self) -> bool:
        """Whether the gradient of the margin is answered."""
        ...


Options = TypeVar("Options", bound=ImageOptions)
Options_co = TypeVar("Options_co", bound=ImageOptions, covariant=True)


@dataclass(eq=False, slots=True)
class Decoded(Generic[Options_co]):
    """A decoded request: images of one shape for one model."""

    classifier: Classifier
    pixels_NCHW: UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]
    """As sent: 0..255, or in [0, 1]."""
    options: Options_co
    wait_s: float = math.inf
    """Seconds that the caller waits, from the arrival of the whole request."""

    def check_path(self, max_pixels: int) -> None:
        """Refuse paths that have more pixels than a request may have.

        Args:
            max_pixels: of all images of all paths.

        Raises:
            PathTooLongError: the paths have more.
        """
        count = self.options.path or 0
        pixels = count * self.pixels_NCHW[:, 0].size
        if pixels > max_pixels:
            raise PathTooLongError(count, pixels, max_pixels)

    def view(self) -> View:
        """Return the model for images of this shape.

        Raises:
            UnknownLabelError: the target is no label of the model.
            CalibrationError: the model is not calibrated for the wanted coverage or error.
            NoveltyError: the model has no novelty model.
            InputError: the model or its novelty model takes no images of this shape.
            ArtefactChangedError: the files of the model are not those that were verified.
        """
        if self.classifier.files.have_changed:
            self.classifier.files.refuse_changed()
        if self.options.coverage is not None or self.options.max_error is not None:
            check_calibration(self.classifier, self.options)
        if self.options.target is not None:
            self.classifier.class_of(self.options.target)
        if self.options.novelty:
            guard_of(self.classifier, self.pixels_NCHW.shape[1:])
        return self.classifier.view(self.pixels_NCHW.shape[1:], self.options.resize)


@dataclass(eq=False, slots=True)
class Outcome(Generic[Options_co]):
    """Results for the images of one request, or of a part of it."""

    classifier: Classifier
    options: Options_co
    image_NCHW: Float64[np.ndarray, "N C H W"]
    """The images as sent, pixels in [0, 1]."""
    predictions: Sequence[Prediction]
    """One for each image, with every result that the options ask for."""


def check_predictions(classifier: Classifier, options: ImageOptions, predictions: Sequence[Prediction]) -> None:
    """Refuse options that contradict the predictions, before `explain`; in a batch the error names the image.

    Args:
        classifier: the model.
        options: those of the request.
        predictions: one for each image of the request.

    Raises:
        TargetIsPredictedClassError: an image already has the target class.
    """
    classifier.check_targets(predictions, [_target(classifier, options)] * len(predictions))


def needs_gradients(options: ImageOptions, predictions: Iterable[Prediction]) -> bool:
    """Return whether `explain`, which runs the gradient graph or the novelty model, follows the predictions.

    Args:
        options: those of the request.
        predictions: one for each image of the request.
    """
    if options.counterfactual or options.saliency or options.novelty or options.proof == "best":
        return True
    return options.epsilon is not None and any(_needs_references(options, prediction) for prediction in predictions)


def search_cost(options: ImageOptions) -> float:
    """Return the cost of `explain` for each image, in units of a search without further options.

    Args:
        options: those of a request with `needs_gradients`.
    """
    passes = options.path or 0
    if options.strength > 1.0:
        passes += GRADIENTS * _GRADIENT_PASSES + 1
    if options.saliency:
        passes += _GRADIENT_PASSES
    return 1.0 + passes / _SEARCH_PASSES


def explain(model: Provable, outcomes: Sequence[Outcome[Any]]) -> list[Prediction]:
    """Return the predictions of all outcomes, in order, with the results that need gradients, each kind in one batch.

    Args:
        model: the view that made the predictions.
        outcomes: images of one shape; `check_predictions` has passed.
    """
    image_NCHW = np.concatenate([outcome.image_NCHW for outcome in outcomes])
    predictions = [prediction for outcome in outcomes for prediction in outcome.predictions]
    owners = [outcome for outcome in outcomes for _ in outcome.predictions]
    proved = [n for n, owner in enumerate(owners) if _needs_references(owner.options, predictions[n])]
    improved = with_references(
        model,
        image_NCHW[proved],
        [predictions[n] for n in proved],
        [owners[n].options.epsilon for n in proved],
        [owners[n].options.proof == "best" for n in proved],
    )
    for n, prediction in zip(proved, improved, strict=True):
        predictions[n] = prediction
    guarded = [n for n, owner in enumerate(owners) if owner.options.novelty]
    if guarded:
        # All owners have one view, so one model with one guard.
        found = with_novelty(owners[0].classifier, image_NCHW[guarded], [predictions[n] for n in guarded])
        for n, prediction in zip(guarded, found, strict=True):
            predictions[n] = prediction
    explained = [n for n, owner in enumerate(owners) if owner.options.counterfactual]
    targets = [_target(owners[n].classifier, owners[n].options) for n in explained]
    nearest = counterfactuals(model, image_NCHW[explained], [predictions[n] for n in explained], targets)
    found = strengthen(
        model,
        image_NCHW[explained],
        [predictions[n].class_id for n in explained],
        nearest,
        [owners[n].options.strength for n in explained],
        len(owners[0].classifier.labels) if owners else 0,
    )
    for n, one in zip(explained, found, strict=True):
        predictions[n] = predictions[n]._replace(counterfactual=one)
    _add_paths(model, image_NCHW, owners, predictions)
    _add_saliencies(model, image_NCHW, owners, predictions)
    return predictions


def compute(classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"], options: Options) -> Outcome[Options]:
    """Return the outcome of one request, computed alone: the specification of the batcher's answers.

    Args:
        classifier: the model.
        image_NCHW: pixels in [0, 1].
        options: see `ImageOptions`.

    Raises:
        UnknownLabelError: the target is no label of the model; nothing is computed.
        CalibrationError: the model is not calibrated for the wanted coverage or error.
        NoveltyError: the model has no novelty model.
        InputError: the model does not take images of this shape, or an image already has the target class.
    """
    view = Decoded(classifier, image_NCHW, options).view()
    outcome = Outcome(classifier, options, image_NCHW, view.predict(image_NCHW))
    if not needs_gradients(options, outcome.predictions):
        return outcome
    check_predictions(classifier, options, outcome.predictions)
    return replace(outcome, predictions=explain(view, [outcome]))


def _add_paths(
    model: Provable, image_NCHW: np.ndarray, owners: Sequence[Outcome[Any]], predictions: list[Prediction]
) -> None:
    found = {
        n: prediction.counterfactual
        for n, prediction in enumerate(predictions)
        if owners[n].options.path is not None and prediction.counterfactual is not None
    }
    counts = [owners[n].options.path for n in found]
    for n, path in zip(found, find_paths(model, image_NCHW[list(found)], list(found.values()), counts), strict=True):
        predictions[n] = predictions[n]._replace(path=path)


def _add_saliencies(
    model: Provable, image_NCHW: np.ndarray, owners: Sequence[Outcome[Any]], predictions: list[Prediction]
) -> None:
    rows = [n for n, owner in enumerate(owners) if owner.options.saliency]
    if not rows:
        return
    found = find_saliencies(
        model,
        image_NCHW[rows],
        [predictions[n].class_id for n in rows],
        [predictions[n].runner_up for n in rows],
        len(predictions[rows[0]].logits_K),
    )
    for n, saliency in zip(rows, found, strict=True):
        predictions[n] = predictions[n]._replace(saliency=saliency)


def _target(classifier: Classifier, options: ImageOptions) -> int | None:
    return None if options.target is None else classifier.class_of(options.target)


def _needs_references(options: ImageOptions, prediction: Prediction) -> bool:
    if options.proof == "best":
        return True
    return options.epsilon is not None and prediction.certified and prediction.radius < options.epsilon
