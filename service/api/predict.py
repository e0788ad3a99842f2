"""What a request of `/predict` or `/predict/batch` is to a worker: bytes to decode, and an answer to write."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic_core import to_json

from service.api.answers import in_records, in_words
from service.api.body import FORM, JSON, NPY
from service.api.parsing import parse_batch, parse_predict
from service.api.schema import Options
from service.errors import ImageTooLargeError
from service.inference.classifier import Classifier
from service.inference.outcome import Decoded, Outcome
from service.metrics import Metrics
from service.settings import Settings

# Decoded in some 50 microseconds, or refused from the header.
_AT_ONCE_BYTES = 8 * 1024
_AT_ONCE_PIXELS = 4096


class Body(NamedTuple):
    """A request as it came."""

    media_type: str
    """One of those that the path takes, see `service.api.body.media_type_of`."""
    content_type: str
    """The whole header."""
    query: Sequence[tuple[str, str]]
    content: bytes


class Reply(NamedTuple):
    """An answer as bytes."""

    content: bytes
    media_type: str


@dataclass
class ImageQuestion:
    """One image, or (`is_batch`) several of one size."""

    body: Body
    is_batch: bool
    as_npy: bool
    """Whether the client prefers `application/x-npy`."""
    settings: Settings
    classifier_of: Callable[[str | None], Classifier]
    metrics: Metrics

    def decode_at_once(self) -> Decoded[Options] | None:
        """As `decode`, for one small image."""
        if self.is_batch or len(self.body.content) > _AT_ONCE_BYTES or self.body.media_type == FORM:
            return None
        try:
            return self._decode(min(_AT_ONCE_PIXELS, self.settings.max_pixels))
        except ImageTooLargeError:
            return None

    def decode(self) -> Decoded[Options]:
        """Raises `InputError`; see `service.api.body` and `service.pixels.images`."""
        return self._decode(self.settings.max_pixels)

    def _decode(self, max_pixels: int) -> Decoded[Options]:
        body, settings = self.body, self.settings
        if self.is_batch:
            options, images = parse_batch(body.media_type, body.query, body.content)
            classifier = self.classifier_of(options.model)
            pixels_NCHW = images.decode(classifier.input_shape, max_pixels, settings.max_batch, options.resize)
        else:
            options, image = parse_predict(body.media_type, body.content_type, body.query, body.content)
            classifier = self.classifier_of(options.model)
            pixels_NCHW = image.decode(classifier.input_shape, max_pixels)[np.newaxis]
        return Decoded(classifier, pixels_NCHW, options)

    def answer(self, outcome: Outcome[Options]) -> Reply:
        """JSON, or one npy array of records; see `service.api.answers`."""
        certified = [prediction.certified for prediction in outcome.predictions]
        self.metrics.count_predictions(outcome.classifier.name, certified)
        if self.as_npy:
            file = io.BytesIO()
            np.save(file, in_records(outcome), allow_pickle=False)
            return Reply(file.getvalue(), NPY)
        answers = in_words(outcome)
        content = {"predictions": answers} if self.is_batch else answers[0]
        # As pydantic writes its models: floats with the fewest digits that read back the same.
        return Reply(to_json(content, inf_nan_mode="null"), JSON)
