"""Answers of a model in this process, on the path of the server.

The artefact is verified and loaded by `load_classifiers`, images are decoded by `service.api.encoded`, computed as
`service.inference.outcome.compute` specifies it, and written by `in_words`: the answer is that of `POST /predict`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
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
from service.inference.outcome import Decoded, Outcome, check_predictions, explain, needs_gradients
from service.pixels.images import Pixels, unit_images
from service.runtime.cpus import usable_cpus
from service.settings import Settings, default_of, read_settings, threads_of
from service.sheets.sources import About, RefusedError, SourceError

_NPY_MAGIC = b"\x93NUMPY"
_FORWARD_IMAGES = 256
"""Images of one forward pass on a CPU as well: no request waits for another."""


class InProcess:
    """A model in this process."""

    def __init__(self, model: Path | None, options: Options, threads: int = 0) -> None:
        """Verify and load the artefact; the settings are those of the server.

        Args:
            model: folder of the artefact, or of a model with versions; default: that of the default model.
            options: of every request.
            threads: inside one inference, unless the settings say it; default: as the server.

        Raises:
            SourceError: a setting or the artefact is not valid, or an option does not fit the model.
        """
        try:
            settings = read_settings()
            folder = folder_of(settings, model)
            card = read_card(folder)
            models, folders = root_of(folder, card.name), [folder]
            if options.novelty and card.novelty_model:
                folders.append(newest(models / card.novelty_model))
            name = served_name(folder, card, version_of(folder, models))
            of_model = {"models": models, "default_model": name, "aliases": ""}
            settings = settings.model_copy(update={**of_model, "threads": settings.threads or threads})
            self.classifier = load_classifiers(settings, folders=folders)[name]
        except LipcertError as error:
            raise SourceError(str(error)) from error
        self._settings, self._options = settings, options
        self.about = About(name, self.classifier.labels, self.classifier.card.accuracy)
        self.workers = threads_of(settings, usable_cpus()).workers
        self.most_bytes, self.most_pixels = settings.max_body_bytes, settings.max_pixels
        self.most_images = settings.forward_batch or _FORWARD_IMAGES

    def answer(self, content: bytes) -> PredictAnswer:
        """Return the answer about an image file or an npy file; raises `RefusedError`."""
        outcome = self.compute([self.decode(content)[np.newaxis]])
        return PredictAnswer.model_validate_json(to_json(in_words(outcome)[0], inf_nan_mode="null"))

    def decode(self, content: bytes) -> Pixels:
        """Return the pixels of an image file or an npy file; raises `RefusedError`."""
        shape = self.classifier.input_shape
        with _refusals():
            if not content:
                raise EmptyBodyError("the file is empty")
            if len(content) > self.most_bytes:
                raise BodyTooLargeError(self.most_bytes)
            image = ArrayImage(content) if content.startswith(_NPY_MAGIC) else EncodedImage(content)
            return image.decode(shape, self.most_pixels, self._options.resize, self._options.background)

    def compute(self, images: Sequence[np.ndarray]) -> Outcome[Options]:
        """Return the outcome for arrays of images of one shape, each as in a request alone; raises `RefusedError`.

        They share the forward pass. A search for counterfactuals or reference images is one for each image: steps that
        images take together would depend on the others.
        """
        with _refusals():
            image_NCHW = unit_images(images)
            view = Decoded(self.classifier, image_NCHW, self._options).view()
            predictions = view.predict(image_NCHW)
            explained = enumerate(predictions) if needs_gradients(self._options, predictions) else ()
            for n, prediction in explained:
                if needs_gradients(self._options, [prediction]):
                    check_predictions(self.classifier, self._options, [prediction])
                    alone = Outcome(self.classifier, self._options, image_NCHW[n : n + 1], [prediction])
                    (predictions[n],) = explain(view, [alone])
            return Outcome(self.classifier, self._options, image_NCHW, predictions)


def folder_of(settings: Settings, model: Path | None) -> Path:
    """Return the folder of an artefact: of versions, the newest.

    Args:
        settings: name the default model.
        model: folder of the artefact, or of a model with versions; default: that of the default model.

    Raises:
        ArtefactError: there is no default model.
    """
    if model is None:
        return artefact_folders(settings.models, default_of(settings))[0]
    return newest(model.absolute())


@contextlib.contextmanager
def _refusals() -> Generator[None]:
    try:
        yield
    except LipcertError as error:
        raise RefusedError(str(error)) from error
    except MemoryError as error:
        raise RefusedError("there is not enough memory for it") from error
