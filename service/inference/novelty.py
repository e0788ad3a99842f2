"""Novelty: the guard of a model, itself a certified classifier with the labels known and novel.

The guard sees the image as it was sent, converted and resized to its own input, so that its radius is about that image,
whatever the guarded model takes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from service.artefact.card import NOVELTY_LABELS
from service.errors import NoveltyError, SettingsError
from service.inference.classifier import Classifier, Prediction
from service.inference.served import Models
from service.settings import novelty_models_of
from service.shapes import Float64

_log = logging.getLogger(__name__)
NOVEL = 1
"""Class of a novel image."""


def attach_guards(models: Models, setting: str) -> None:
    """Give each model the guard that the setting, or else its card, names.

    A card may name a novelty model that cannot be used here: the model is served without it, as the log says.

    Raises:
        SettingsError: `setting`, `LIPCERT_NOVELTY_MODELS`, names a model that is not served, or one that is no novelty
            model.
    """
    asked = novelty_models_of(setting)
    for name in asked:
        if name not in models.shapes and name not in models.reasons:
            raise SettingsError(f"LIPCERT_NOVELTY_MODELS names {name!r}, which is no model of the folder")
    for name, classifier in models.items():
        # For a version or for all versions of a model.
        asked_for = next((one for one in (name, classifier.card.name) if one in asked), None)
        wanted = classifier.card.novelty_model if asked_for is None else asked[asked_for]
        fault = _fault(models, wanted) if wanted else None
        classifier.guard = models[wanted] if wanted and fault is None else None
        if fault is None:
            continue
        if asked_for is not None:
            raise SettingsError(f"LIPCERT_NOVELTY_MODELS: {asked_for}={wanted}, and {fault}")
        # A copy of one model, as in a wheel, is no fault.
        level = logging.WARNING if wanted in models.shapes or wanted in models.reasons else logging.INFO
        _log.log(level, "model %s is served without its novelty model: %s", name, fault)


def _fault(models: Models, name: str) -> str | None:
    if name in models.reasons:
        return f"{name} is not available: {models.reasons[name]}"
    if name not in models.shapes:
        return f"{name} is not in the folder of models"
    if models[name].labels != NOVELTY_LABELS:
        return f"{name} has the labels {', '.join(models[name].labels[:5])} instead of {', '.join(NOVELTY_LABELS)}"
    return None


def guard_of(classifier: Classifier, sent_shape: tuple[int, int, int]) -> Classifier:
    """Return the guard of a model, which takes images of this shape.

    Args:
        classifier: the guarded model.
        sent_shape: (C, H, W) of the images as sent.

    Raises:
        NoveltyError: the model has no guard here.
        ChannelsError, SideTooLongError: the guard has no conversion of these images; see `Classifier.view`.
        ArtefactChangedError: the files of the guard are not those that were verified.
    """
    guard = classifier.guard
    if guard is None:
        raise NoveltyError(classifier.name, classifier.card.novelty_model)
    if guard.files.have_changed:
        guard.files.refuse_changed()
    guard.view(sent_shape, resize=True)
    return guard


def with_novelty(
    classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"], predictions: Sequence[Prediction]
) -> list[Prediction]:
    """Return the predictions with those of the guard, in one forward pass.

    Args:
        classifier: the guarded model, whose `guard_of` has passed.
        image_NCHW: the images as sent, pixels in [0, 1].
        predictions: one for each image.
    """
    if not predictions:
        return []
    guard = guard_of(classifier, image_NCHW.shape[1:])
    found = guard.predict(image_NCHW, resize=True)
    return [one._replace(novelty=(guard, novelty)) for one, novelty in zip(predictions, found, strict=True)]
