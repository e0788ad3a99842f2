"""Pixels and options to answers: what the classifier says, in the words of the wire."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from service.api.schema import (
    InputAnswer,
    ModelAnswer,
    ModelSummary,
    Options,
    PredictAnswer,
    finite,
    radius_in_grey_levels,
)
from service.inference.classifier import Classifier
from service.inference.outcome import Outcome, compute
from service.pixels.images import encode_png, image_digest
from service.pixels.preprocessing import conversion_between
from service.shapes import Float64

Json = dict[str, Any]


def predict(
    classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"], options: Options
) -> list[PredictAnswer]:
    """Classify and certify images, find the counterfactuals that `options` asks for, and put it all into words.

    Args:
        classifier: the model.
        image_NCHW: pixels in [0, 1].
        options: what a request asks for.

    Raises:
        UnknownLabelError: the target is no label of the model; nothing is computed then.
        InputError: the image has a shape that the model does not take, or the target's class already.
    """
    return [PredictAnswer.model_validate(one) for one in in_words(compute(classifier, image_NCHW, options))]


def in_words(outcome: Outcome[Options]) -> list[Json]:
    """What was computed about images, with the members of `PredictAnswer`: an answer is written far more often than
    read, and needs no validation."""
    classifier, epsilon = outcome.classifier, outcome.options.epsilon
    labels = classifier.labels
    return [
        {
            "model": classifier.name,
            "digest": classifier.digest,
            "class_id": prediction.class_id,
            "label": labels[prediction.class_id],
            "logits": [finite(logit) for logit in prediction.logits_K.tolist()],
            "image": {
                "digest": image_digest(image_CHW),
                "shape": image_CHW.shape,
                "conversion": conversion_between(image_CHW.shape[0], classifier.input_shape[0]),
                "resized": image_CHW.shape[1:] != classifier.input_shape[1:],
            },
            "certificate": {
                "norm": "l2",
                "radius": prediction.radius,
                "radius_255": radius_in_grey_levels(prediction.radius),
                "certified": prediction.certified,
                "epsilon": epsilon,
                "robust_at_epsilon": None if epsilon is None else prediction.certified and epsilon <= prediction.radius,
                "runner_up": {"class_id": prediction.runner_up, "label": labels[prediction.runner_up]},
                "lipschitz_bound": finite(prediction.lipschitz_bound),
                "logit_error": finite(prediction.logit_error),
            },
            "counterfactual": None
            if prediction.counterfactual is None
            else {
                "image": base64.b64encode(encode_png(prediction.counterfactual.pixels_CHW)).decode("ascii"),
                "media_type": "image/png",
                "class_id": prediction.counterfactual.class_id,
                "label": labels[prediction.counterfactual.class_id],
                "distance": prediction.counterfactual.distance,
                "reached": prediction.counterfactual.reached,
            },
        }
        for image_CHW, prediction in zip(outcome.image_NCHW, outcome.predictions, strict=True)
    ]


def in_records(outcome: Outcome[Any]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The same as a structured array, one record for each image: the numbers of the answer without their words.

    Fields: `class_id`, `radius`, `certified`, `runner_up`, `lipschitz_bound`, `logit_error` as in `CertificateAnswer`,
    and `logits` (K); where counterfactuals were found also `counterfactual` (C x H x W, uint8),
    `counterfactual_class_id`, `counterfactual_distance` and `counterfactual_reached`.
    """
    predictions = outcome.predictions
    columns: dict[str, np.ndarray] = {
        "class_id": np.array([prediction.class_id for prediction in predictions], "<i8"),
        "radius": np.array([prediction.radius for prediction in predictions], "<f8"),
        "certified": np.array([prediction.certified for prediction in predictions], "?"),
        "runner_up": np.array([prediction.runner_up for prediction in predictions], "<i8"),
        "lipschitz_bound": np.array([prediction.lipschitz_bound for prediction in predictions], "<f8"),
        "logit_error": np.array([prediction.logit_error for prediction in predictions], "<f8"),
        "logits": np.stack([prediction.logits_K for prediction in predictions]).astype("<f8", copy=False),
    }
    found = [prediction.counterfactual for prediction in predictions if prediction.counterfactual is not None]
    if found:
        columns |= {
            "counterfactual": np.stack([counterfactual.pixels_CHW for counterfactual in found]),
            "counterfactual_class_id": np.array([counterfactual.class_id for counterfactual in found], "<i8"),
            "counterfactual_distance": np.array([counterfactual.distance for counterfactual in found], "<f8"),
            "counterfactual_reached": np.array([counterfactual.reached for counterfactual in found], "?"),
        }
    fields = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    records_N = np.zeros(len(predictions), np.dtype(fields))
    for name, column in columns.items():
        records_N[name] = column
    return records_N


def describe(classifier: Classifier, default_model: str) -> ModelSummary:
    """What `GET /models` says about one model."""
    channels, height, width = classifier.input_shape
    return ModelSummary(
        name=classifier.name,
        default=classifier.name == default_model,
        digest=classifier.digest,
        labels=list(classifier.labels),
        input=InputAnswer(channels=channels, height=height, width=width),
        lipschitz_bound=finite(classifier.certificate.lipschitz_bound),
        logit_error=finite(classifier.certificate.logit_error),
        provider=classifier.provider,
    )


def describe_in_full(classifier: Classifier, default_model: str) -> ModelAnswer:
    """What `GET /models/{name}` says: `describe`, the pairwise bounds, and the card."""
    return ModelAnswer(
        **dict(describe(classifier, default_model)),
        precision=classifier.certificate.precision,
        margin_bounds=[
            [finite(bound) for bound in bounds_K] for bounds_K in classifier.certificate.margin_bounds_KK.tolist()
        ],
        card=classifier.card.model_dump(mode="json"),
    )
