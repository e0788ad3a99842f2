"""Pixels and options to answers: what the classifier says, in the words of the wire."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from service.classifier import Classifier, Prediction
from service.counterfactual import Counterfactual
from service.errors import UnknownLabelError
from service.images import encode_png, image_digest
from service.preprocessing import conversion_between
from service.schema import (
    CertificateAnswer,
    ClassLabel,
    CounterfactualAnswer,
    ImageAnswer,
    ImageOptions,
    InputAnswer,
    ModelAnswer,
    ModelSummary,
    Options,
    PredictAnswer,
    finite,
    radius_in_grey_levels,
)


def classify(
    classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"], options: ImageOptions
) -> list[tuple[Prediction, Counterfactual | None]]:
    """Classify and certify images, and find the counterfactuals that `options` asks for.

    Args:
        classifier: the model.
        image_NCHW: pixels in [0, 1].
        options: counterfactual, target, resize.

    Raises:
        UnknownLabelError: the target is no label of the model; nothing is computed then.
        InputError: the image has a shape that the model does not take, or the target's class already.
    """
    target = None if options.target is None else class_of(classifier, options.target)
    predictions = classifier.predict(image_NCHW, resize=options.resize)
    counterfactuals: Sequence[Counterfactual | None] = [None] * len(predictions)
    if options.counterfactual:
        counterfactuals = classifier.counterfactual(
            image_NCHW, predictions, [target] * len(predictions), resize=options.resize
        )
    return list(zip(predictions, counterfactuals, strict=True))


def predict(
    classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"], options: Options
) -> list[PredictAnswer]:
    """`classify`, in the words of the wire."""
    return [
        PredictAnswer(
            model=classifier.name,
            digest=classifier.digest,
            class_id=prediction.class_id,
            label=classifier.labels[prediction.class_id],
            logits=[finite(logit) for logit in prediction.logits_K.tolist()],
            image=_image(classifier, image_CHW),
            certificate=_certificate(classifier, prediction, options.epsilon),
            counterfactual=_counterfactual(classifier, counterfactual),
        )
        for image_CHW, (prediction, counterfactual) in zip(
            image_NCHW, classify(classifier, image_NCHW, options), strict=True
        )
    ]


def class_of(classifier: Classifier, label: str) -> int:
    """Class with this label; raises `UnknownLabelError` with the labels there are."""
    if label not in classifier.labels:
        raise UnknownLabelError(label, classifier.labels)
    return classifier.labels.index(label)


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


def _image(classifier: Classifier, image_CHW: Float64[np.ndarray, "C H W"]) -> ImageAnswer:
    channels, height, width = image_CHW.shape
    return ImageAnswer(
        digest=image_digest(image_CHW),
        shape=(channels, height, width),
        conversion=conversion_between(channels, classifier.input_shape[0]),
        resized=(height, width) != classifier.input_shape[1:],
    )


def _certificate(classifier: Classifier, prediction: Prediction, epsilon: float | None) -> CertificateAnswer:
    return CertificateAnswer(
        radius=prediction.radius,
        radius_255=radius_in_grey_levels(prediction.radius),
        certified=prediction.certified,
        epsilon=epsilon,
        robust_at_epsilon=None if epsilon is None else prediction.certified and epsilon <= prediction.radius,
        runner_up=ClassLabel(class_id=prediction.runner_up, label=classifier.labels[prediction.runner_up]),
        lipschitz_bound=finite(prediction.lipschitz_bound),
        logit_error=finite(prediction.logit_error),
    )


def _counterfactual(classifier: Classifier, counterfactual: Counterfactual | None) -> CounterfactualAnswer | None:
    if counterfactual is None:
        return None
    return CounterfactualAnswer(
        image=base64.b64encode(encode_png(counterfactual.pixels_CHW)).decode("ascii"),
        class_id=counterfactual.class_id,
        label=classifier.labels[counterfactual.class_id],
        distance=counterfactual.distance,
        reached=counterfactual.reached,
    )
