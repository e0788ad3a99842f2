"""From outcomes to answers: JSON, npy records, and the description of a model."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from service.api.body import NPY
from service.api.schema import ClassLabel, ImageOptions, InputAnswer, ModelAnswer, ModelSummary
from service.artefact.folders import version_in
from service.inference.classifier import Classifier, Prediction
from service.inference.novelty import NOVEL
from service.inference.outcome import Outcome
from service.inference.references import Reference
from service.inference.sets import Decision, decisions_of, sets_of
from service.pixels.images import encode_png, image_digest, to_unit
from service.pixels.overlay import draw_over
from service.pixels.preprocessing import conversion_between

Json = dict[str, Any]

RECORDS = """A structured numpy array with one record per image and the fields `class_id`, `radius`, `certified`,
`runner_up`, `lipschitz_bound`, `logit_error`, `logits`, `proof`, and with a counterfactual also `counterfactual`
(uint8, C x H x W), `counterfactual_class_id`, `counterfactual_distance`, `counterfactual_reached`; with `coverage` also
`set` (bool, one per class), with `max_error` also `decision`; with a strength above 1 `counterfactual_nearest_distance`
(NaN where nothing was reached), with a path of P images `path` (uint8, P x C x H x W), `path_class_id`, `path_margin`,
`path_radius` and `path_distance` (P each), with saliency `saliency` (float32, C x H x W) and `saliency_class_id`;
with `novelty` also `novel`, `novelty_score`, `novelty_radius` and `novelty_certified`. Reference images are in JSON
answers alone."""


class Reply(NamedTuple):
    """An answer as bytes."""

    content: bytes
    media_type: str
    headers: Mapping[str, str] | None = None


def in_words(outcome: Outcome[ImageOptions]) -> list[Json]:
    """Return an answer with the fields of `PredictAnswer` for each image.

    An answer is written far more often than read, so it is not validated. Serialisation turns values that are not
    finite, which only an abstention can have, into null.
    """
    classifier, epsilon = outcome.classifier, outcome.options.epsilon
    labels = classifier.labels
    shape = outcome.image_NCHW.shape[1:]
    to_shape = classifier.input_shape
    background = {} if (colour := outcome.options.background) is None else {"background": colour}
    sets, decisions = _sets_in_words(outcome), _decisions(outcome)
    conversion = None if shape[0] == to_shape[0] else conversion_between(shape[0], to_shape[0])
    return [
        {
            "model": classifier.name,
            "digest": classifier.digest,
            "card_digest": classifier.card_digest,
            "class_id": prediction.class_id,
            "label": labels[prediction.class_id],
            "logits": prediction.logits_K.tolist(),
            "image": {
                "digest": image_digest(image_CHW),
                "shape": shape,
                "conversion": conversion,
                "resized": shape[1:] != to_shape[1:],
                **background,
            },
            "certificate": {
                "norm": "l2",
                "radius": prediction.radius,
                "radius_255": radius_in_grey_levels(prediction.radius),
                "certified": prediction.certified,
                "epsilon": epsilon,
                "robust_at_epsilon": None if epsilon is None else prediction.certified and epsilon <= prediction.radius,
                "runner_up": {"class_id": prediction.runner_up, "label": labels[prediction.runner_up]},
                "lipschitz_bound": prediction.lipschitz_bound,
                "logit_error": prediction.logit_error,
                "proof": prediction.proof,
                "references": references_in_words(prediction),
            },
            "counterfactual": _counterfactual_in_words(prediction, labels),
            **_saliency_in_words(prediction, image_CHW, labels),
            "coverage": outcome.options.coverage,
            "set": label_set,
            "max_error": outcome.options.max_error,
            "decision": decision,
            **_novelty_in_words(prediction.novelty),
        }
        for image_CHW, prediction, label_set, decision in zip(
            outcome.image_NCHW, outcome.predictions, sets, decisions, strict=True
        )
    ]


def _counterfactual_in_words(prediction: Prediction, labels: Sequence[str]) -> Json | None:
    found = prediction.counterfactual
    if found is None:
        return None
    answer: Json = {
        **_image_in_words(found.pixels_CHW),
        "class_id": found.class_id,
        "label": labels[found.class_id],
        "distance": found.distance,
        "reached": found.reached,
    }
    if found.nearest_distance is not None:
        answer["nearest_distance"] = found.nearest_distance
    if prediction.path:
        answer["path"] = [
            {
                **_image_in_words(step.pixels_CHW),
                "class_id": step.class_id,
                "label": labels[step.class_id],
                "margin": step.margin,
                "radius": step.radius,
                "distance": step.distance,
            }
            for step in prediction.path
        ]
    return answer


def _saliency_in_words(prediction: Prediction, image_CHW: np.ndarray, labels: Sequence[str]) -> Json:
    found = prediction.saliency
    if found is None:
        return {}
    answer = {
        "class_id": found.class_id,
        "label": labels[found.class_id],
        "array": base64.b64encode(_npy(found.gradient_CHW)).decode("ascii"),
        "media_type": NPY,
        "overlay": _png(draw_over(image_CHW, found.gradient_CHW)),
    }
    return {"saliency": answer}


def _image_in_words(pixels_CHW: np.ndarray) -> Json:
    content, media_type = image_bytes(pixels_CHW)
    return {"image": base64.b64encode(content).decode("ascii"), "media_type": media_type}


def image_bytes(pixels_CHW: np.ndarray) -> tuple[bytes, str]:
    """Return a PNG file of an 8-bit grey or RGB image, an npy file of any other, and its media type."""
    if pixels_CHW.dtype == np.uint8 and len(pixels_CHW) in (1, 3):
        return encode_png(pixels_CHW), "image/png"
    return _npy(pixels_CHW), NPY


def _png(pixels_CHW: np.ndarray) -> str:
    return base64.b64encode(encode_png(pixels_CHW)).decode("ascii")


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _novelty_in_words(novelty: tuple[Classifier, Prediction] | None) -> Json:
    if novelty is None:
        return {}
    guard, found = novelty
    answer = {
        "model": guard.name,
        "digest": guard.digest,
        "novel": found.class_id == NOVEL,
        "score": float(found.logits_K[0]),
        "radius": found.radius,
        "certified": found.certified,
    }
    return {"novelty": answer}


def _sets_in_words(outcome: Outcome[ImageOptions]) -> list[list[Json] | None]:
    member_NK = _members(outcome)
    if member_NK is None:
        return [None] * len(outcome.predictions)
    labels = outcome.classifier.labels
    return [[{"class_id": k, "label": labels[k]} for k in np.flatnonzero(row_K).tolist()] for row_K in member_NK]


def _members(outcome: Outcome[Any]) -> np.ndarray | None:
    """Return which classes are in each certified set, N x K; null without `coverage`."""
    if outcome.options.coverage is None:
        return None
    logits_NK = np.stack([prediction.logits_K for prediction in outcome.predictions])
    return sets_of(outcome.classifier, outcome.options, logits_NK, outcome.image_NCHW.shape[1:])


def _decisions(outcome: Outcome[Any]) -> Sequence[Decision | None]:
    if outcome.options.max_error is None:
        return [None] * len(outcome.predictions)
    logits_NK = np.stack([prediction.logits_K for prediction in outcome.predictions])
    return decisions_of(outcome.classifier, outcome.options, logits_NK) or []


def references_in_words(prediction: Prediction) -> list[Json]:
    """Return the reference images of an answer with the fields of `ReferenceAnswer`."""
    return [_reference_in_words(reference) for reference in prediction.references]


def _reference_in_words(reference: Reference) -> Json:
    pixels_CHW = reference.pixels_CHW
    return {
        "class_id": reference.class_id,
        **_image_in_words(pixels_CHW),
        "digest": image_digest(to_unit(pixels_CHW) if pixels_CHW.dtype == np.uint8 else pixels_CHW),
    }


_FIELDS = {
    "class_id": "<i8",
    "radius": "<f8",
    "certified": "?",
    "runner_up": "<i8",
    "lipschitz_bound": "<f8",
    "logit_error": "<f8",
}


def in_columns(outcome: Outcome[Any]) -> dict[str, np.ndarray]:
    """Return the numbers of the answers as arrays with one row per image, by the names in `RECORDS`."""
    predictions = outcome.predictions
    # Once through all of them in C: a million answers are written by this function.
    fields = dict(zip(Prediction._fields, zip(*predictions, strict=True), strict=True))
    columns: dict[str, np.ndarray] = {
        **{name: np.array(fields[name], kind) for name, kind in _FIELDS.items()},
        "logits": np.concatenate(fields["logits_K"]).reshape(len(predictions), -1).astype("<f8", copy=False),
        "proof": np.array(fields["proof"], "<U4"),
    }
    found = [counterfactual for counterfactual in fields["counterfactual"] if counterfactual is not None]
    if found:
        columns |= {
            "counterfactual": np.stack([counterfactual.pixels_CHW for counterfactual in found]),
            "counterfactual_class_id": np.array([counterfactual.class_id for counterfactual in found], "<i8"),
            "counterfactual_distance": np.array([counterfactual.distance for counterfactual in found], "<f8"),
            "counterfactual_reached": np.array([counterfactual.reached for counterfactual in found], "?"),
        }
    if found and outcome.options.strength > 1.0:
        nearest = [math.nan if one.nearest_distance is None else one.nearest_distance for one in found]
        columns["counterfactual_nearest_distance"] = np.array(nearest, "<f8")
    if outcome.options.path is not None:
        columns |= _path_columns(predictions)
    saliencies = [saliency for saliency in fields["saliency"] if saliency is not None]
    if saliencies:
        columns["saliency"] = np.stack([one.gradient_CHW for one in saliencies]).astype("<f4", copy=False)
        columns["saliency_class_id"] = np.array([one.class_id for one in saliencies], "<i8")
    member_NK = _members(outcome)
    if member_NK is not None:
        columns["set"] = member_NK
    guarded = [novelty[1] for novelty in fields["novelty"] if novelty is not None]
    if guarded:
        columns |= {
            "novel": np.array([novelty.class_id == NOVEL for novelty in guarded], "?"),
            "novelty_score": np.array([novelty.logits_K[0] for novelty in guarded], "<f8"),
            "novelty_radius": np.array([novelty.radius for novelty in guarded], "<f8"),
            "novelty_certified": np.array([novelty.certified for novelty in guarded], "?"),
        }
    if outcome.options.max_error is not None:
        columns["decision"] = np.array(_decisions(outcome), "<U7")
    return columns


def _path_columns(predictions: Sequence[Prediction]) -> dict[str, np.ndarray]:
    paths = [prediction.path for prediction in predictions]
    return {
        "path": np.array([[step.pixels_CHW for step in path] for path in paths]),
        "path_class_id": np.array([[step.class_id for step in path] for path in paths], "<i8"),
        "path_margin": np.array([[step.margin for step in path] for path in paths], "<f8"),
        "path_radius": np.array([[step.radius for step in path] for path in paths], "<f8"),
        "path_distance": np.array([[step.distance for step in path] for path in paths], "<f8"),
    }


def in_records(outcome: Outcome[Any]) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return the numbers of the answers as a structured array, see `RECORDS`."""
    columns = in_columns(outcome)
    fields = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    records_N = np.zeros(len(outcome.predictions), np.dtype(fields))
    for name, column in columns.items():
        records_N[name] = column
    return records_N


def radius_in_grey_levels(radius: float) -> float:
    """Return `radius * 255`, rounded down: comparing the exact rationals detects a product that was rounded up.

    Args:
        radius: L2, pixels in [0, 1]; finite, at least 0.
    """
    product = radius * 255.0
    if math.isinf(product):
        return math.nextafter(product, 0.0)
    # Both floats as ratios of integers, over a common denominator.
    above, below = product.as_integer_ratio()
    top, bottom = radius.as_integer_ratio()
    return math.nextafter(product, 0.0) if above * bottom > 255 * top * below else product


def describe(classifier: Classifier, is_default: bool, aliases: list[str]) -> ModelSummary:
    """Return the description of one model in `GET /models`.

    Args:
        classifier: the model.
        is_default: whether it is the default model.
        aliases: its further names.
    """
    channels, height, width = classifier.input_shape
    return ModelSummary(
        name=classifier.name,
        version=version_in(classifier.name),
        aliases=aliases,
        default=is_default,
        digest=classifier.digest,
        card_digest=classifier.card_digest,
        labels=list(classifier.labels),
        input=InputAnswer(channels=channels, height=height, width=width),
        lipschitz_bound=classifier.certificate.lipschitz_bound,
        logit_error=classifier.certificate.logit_error,
        provider=classifier.provider,
    )


def describe_in_full(
    classifier: Classifier, is_default: bool, aliases: list[str], rejected: str | None = None
) -> ModelAnswer:
    """Return the description of one model in `GET /models/{name}`: with the pairwise bounds and the card.

    Args:
        classifier: the model.
        is_default: whether it is the default model.
        aliases: its further names.
        rejected: why a newer version is not served.
    """
    return ModelAnswer(
        **dict(describe(classifier, is_default, aliases)),
        precision=classifier.certificate.precision,
        margin_bounds=classifier.certificate.margin_table(),
        card=classifier.card.model_dump(mode="json"),
        samples=[
            ClassLabel(class_id=sample.class_id, label=classifier.labels[sample.class_id])
            for sample in classifier.samples
        ],
        rejected=rejected,
    )
