"""The outcome of a request computed alone, which the batcher's outcomes are compared with."""

from __future__ import annotations

import builders
import numpy as np
import pytest

from service.api.schema import ImageOptions
from service.errors import TargetIsPredictedClassError, UnknownLabelError
from service.inference.classifier import Classifier
from service.inference.outcome import Outcome, compute, explain


@pytest.fixture(scope="module")
def model() -> Classifier:
    return builders.load(builders.random_groupsort(3))


def images(count: int, side: int = 4) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 1, side, side)) / 255.0


def other_label(model: Classifier, image_NCHW: np.ndarray) -> str:
    """A label that is predicted for no image."""
    predicted = {prediction.class_id for prediction in model.predict(image_NCHW)}
    return model.labels[min(set(range(len(model.labels))) - predicted)]


def test_predictions_without_options_are_those_of_the_classifier(model: Classifier) -> None:
    image_NCHW = images(3)
    outcome = compute(model, image_NCHW, ImageOptions())
    assert outcome.image_NCHW is image_NCHW
    for one, other in zip(outcome.predictions, model.predict(image_NCHW), strict=True):
        assert one.logits_K.tobytes() == other.logits_K.tobytes()
        assert one.radius == other.radius
        assert one.counterfactual is None


@pytest.mark.parametrize("resize", [False, True])
def test_counterfactuals_are_those_of_the_classifier(model: Classifier, resize: bool) -> None:
    image_NCHW = images(3, side=6 if resize else 4)
    outcome = compute(model, image_NCHW, ImageOptions(resize=resize, counterfactual=True))
    predictions = model.predict(image_NCHW, resize)
    found = model.counterfactual(image_NCHW, predictions, [None] * 3, resize)
    for one, other in zip(outcome.predictions, found, strict=True):
        assert one.counterfactual is not None
        assert one.counterfactual.pixels_CHW.tobytes() == other.pixels_CHW.tobytes()
        assert one.counterfactual.distance == other.distance


def test_requests_with_different_options_are_explained_in_one_batch_in_their_order(model: Classifier) -> None:
    parts = [images(2), images(1), images(3)]
    target = other_label(model, parts[1])
    nearest, targeted = ImageOptions(counterfactual=True), ImageOptions(counterfactual=True, target=target)
    wishes = [nearest, targeted, nearest]
    predicted = [
        Outcome(model, wish, image_NCHW, model.predict(image_NCHW))
        for wish, image_NCHW in zip(wishes, parts, strict=True)
    ]
    together = explain(model.view(model.input_shape), predicted)
    alone = [p for wish, part in zip(wishes, parts, strict=True) for p in compute(model, part, wish).predictions]
    for one, other in zip(together, alone, strict=True):
        assert one.class_id == other.class_id
        assert one.counterfactual is not None
        assert other.counterfactual is not None
        assert one.counterfactual.class_id == other.counterfactual.class_id
        assert one.counterfactual.distance == pytest.approx(other.counterfactual.distance, rel=0.02)


def test_an_unknown_target_is_refused_before_anything_is_computed(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classifier, "view", None)
    with pytest.raises(UnknownLabelError, match="nonsense"):
        compute(model, images(1), ImageOptions(counterfactual=True, target="nonsense"))


def test_a_target_that_is_predicted_already_is_refused(model: Classifier) -> None:
    image_NCHW = images(1)
    (prediction,) = model.predict(image_NCHW)
    with pytest.raises(TargetIsPredictedClassError):
        compute(model, image_NCHW, ImageOptions(counterfactual=True, target=model.labels[prediction.class_id]))
