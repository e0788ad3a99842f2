"""Answers of a model in this process, on the path of the server.

The artefact is verified and loaded by `load_classifiers`, images are decoded by `service.api.encoded`, `compute` is the
specification of the batcher's answers, and `in_words` writes them: the answer is that of `POST /predict`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic_core import to_json

from service.api.answers import in_words
from service.api.encoded import ArrayImage, EncodedImage
from service.api.schema import Options, PredictAnswer
from service.artefact.card import read_card, served_name
from service.artefact.folders import artefact_folders, newest, root_of, version_of
from service.errors import BodyTooLargeError, EmptyBodyError, LipcertError
from service.inference.loading import load_classifiers
from service.inference.outcome import compute
from service.pixels.images import unit
from service.runtime.cpus import usable_cpus
from service.settings import default_of, read_settings, threads_of
from service.sheets.sources import About, RefusedError, SourceError

_NPY_MAGIC = b"\x93NUMPY"


class InProcess:
    """A model in this process."""

    def __init__(self, model: Path | None, options: Options) -> None:
        """Verify and load the artefact; the settings are those of the server.

        Args:
            model: folder of the artefact, or of a model with versions; default: that of the default model.
            options: of every request.

        Raises:
            SourceError: a setting or the artefact is not valid, or an option does not fit the model.
        """
        try:
            settings = read_settings()
            default = default_of(settings)
            folder = artefact_folders(settings.models, default)[0] if model is None else newest(model.absolute())
            card = read_card(folder)
            models, folders = root_of(folder, card.name), [folder]
            if options.novelty and card.novelty_model:
                folders.append(newest(models / card.novelty_model))
            name = served_name(folder, card, version_of(folder, models))
            settings = settings.model_copy(update={"models": models, "default_model": name, "aliases": ""})
            self._classifier = load_classifiers(settings, folders=folders)[name]
        except LipcertError as error:
            raise SourceError(str(error)) from error
        self._settings, self._options = settings, options
        self.about = About(name, self._classifier.labels, self._classifier.card.accuracy)
        self.workers = threads_of(settings, usable_cpus()).workers
        self.most_bytes = settings.max_body_bytes

    def answer(self, content: bytes) -> PredictAnswer:
        """Return the answer about an image file or an npy file; raises `RefusedError`."""
        shape, most = self._classifier.input_shape, self._settings.max_pixels
        try:
            if not content:
                raise EmptyBodyError("the file is empty")
            if len(content) > self.most_bytes:
                raise BodyTooLargeError(self.most_bytes)
            image = ArrayImage(content) if content.startswith(_NPY_MAGIC) else EncodedImage(content)
            pixels_CHW = image.decode(shape, most, self._options.resize, self._options.background)
            outcome = compute(self._classifier, unit(pixels_CHW)[np.newaxis], self._options)
        except LipcertError as error:
            raise RefusedError(str(error)) from error
        except MemoryError as error:
            raise RefusedError("there is not enough memory for it") from error
        return PredictAnswer.model_validate_json(to_json(in_words(outcome)[0], inf_nan_mode="null"))
