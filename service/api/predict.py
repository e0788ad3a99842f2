"""From a request of `/predict` or `/predict/batch` to its response.

The event loop reads the body and decodes a small image; the workers of `service.inference` do the rest.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import numpy as np
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from service.api.answers import in_records, in_words
from service.api.body import BATCH_TYPES, FORM, JSON, NPY, PREDICT_TYPES, Head, read_body, read_head
from service.api.encoded import ArrayBatch, EncodedBatch
from service.api.examples import Examples
from service.api.parsing import Query, parse_batch, parse_predict
from service.api.schema import Options
from service.errors import ImageTooLargeError
from service.inference.batching import Batcher
from service.inference.health import LEAST_STUCK_S, Health
from service.inference.jobs import Question
from service.inference.loading import Models
from service.inference.outcome import Decoded, Outcome
from service.metrics import Metrics
from service.settings import Settings

Result = TypeVar("Result")

# Decoded in some 30 microseconds, or refused from the header.
_AT_ONCE_BYTES = 8 * 1024
_AT_ONCE_PIXELS = 4096
ABANDON = "lipcert.abandon"
"""Key of a function in the scope of a request, for the server to call when the client is gone."""


@dataclass(frozen=True)
class Service:
    """The state that the routes share."""

    settings: Settings
    models: Models
    examples: Examples | None
    metrics: Metrics
    batcher: Batcher

    @functools.cached_property
    def health(self) -> Health:
        """Faults of this process."""
        settings = self.settings
        stuck_s = settings.stuck_s or max(LEAST_STUCK_S, settings.deadline_s / 3.0)
        return Health(self.models, settings.default_model, self.batcher, stuck_s)

    async def ask(
        self, request: Request, accepted: Sequence[str], question_of: Callable[[Head, bytes], Question[Result, Any]]
    ) -> Result:
        """Read a request and return the answer of a worker, both before the deadline.

        Args:
            request: its body is still unread.
            accepted: media types of the body.
            question_of: from headers and body to the question.

        Raises:
            MediaTypeError: see `read_head`.
            BodyTooLargeError, EmptyBodyError: see `read_body`.
            OverloadedError, DeadlineError, TooSlowError, ClientGoneError: see `Batcher`.
        """
        head = read_head(request, accepted)
        limit = self.settings.max_body_bytes
        client = request.scope.get("client") or ("", 0)
        with self.batcher.place(min(self.settings.deadline_s, head.wait_s), client[0]) as place:
            request.scope[ABANDON] = place.abandon
            content = await read_body(request, head, limit, place)
            return await self.batcher.ask(question_of(head, content), len(content), place)

    def count(self, outcome: Outcome[Any]) -> None:
        """Count the images of an answer, and the abstentions among them."""
        predictions, abstentions = self.metrics.predictions_of(outcome.classifier.name)
        certified = [prediction.certified for prediction in outcome.predictions]
        predictions.inc(len(certified))
        if False in certified:
            abstentions.inc(certified.count(False))


class Reply(NamedTuple):
    """An answer as bytes."""

    content: bytes
    media_type: str


@dataclass
class ImageQuestion:
    """A request for one image, or (`is_batch`) several of one size."""

    service: Service
    query: Query
    is_batch: bool
    head: Head
    content: bytes

    def decode_at_once(self) -> Decoded[Options] | None:
        """Return the decoded request if it has one small image."""
        if self.is_batch or len(self.content) > _AT_ONCE_BYTES or self.head.media_type == FORM:
            return None
        try:
            return self._decode(min(_AT_ONCE_PIXELS, self.service.settings.max_pixels))
        except ImageTooLargeError:
            return None

    def decode(self) -> Decoded[Options]:
        """Return the decoded request; raise `InputError`, see `service.api.parsing` and `service.api.encoded`."""
        return self._decode(self.service.settings.max_pixels)

    def _decode(self, max_pixels: int) -> Decoded[Options]:
        service, settings = self.service, self.service.settings
        parse = parse_batch if self.is_batch else parse_predict
        options, images = parse(self.head, self.query, self.content)
        classifier = service.models[settings.default_model if options.model is None else options.model]
        if isinstance(images, (EncodedBatch, ArrayBatch)):
            pixels_NCHW = images.decode(classifier.input_shape, max_pixels, settings.max_batch, options.resize)
        else:
            pixels_NCHW = images.decode(classifier.input_shape, max_pixels)[np.newaxis]
        return Decoded(classifier, pixels_NCHW, options)

    def answer(self, outcome: Outcome[Options]) -> Reply:
        """Return the answer as JSON, or as an npy array of records; see `service.api.answers`."""
        self.service.count(outcome)
        if self.head.prefers_npy:
            file = io.BytesIO()
            np.save(file, in_records(outcome), allow_pickle=False)
            return Reply(file.getvalue(), NPY)
        answers = in_words(outcome)
        content = {"predictions": answers} if self.is_batch else answers[0]
        # As pydantic writes its models: floats with the fewest digits that read back the same, null if not finite.
        return Reply(to_json(content, inf_nan_mode="null"), JSON)


def image_endpoint(service: Service, *, is_batch: bool) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Return the function that answers a request of `/predict` or `/predict/batch`."""
    accepted = BATCH_TYPES if is_batch else PREDICT_TYPES

    async def respond(request: Request) -> Response:
        query_string: bytes = request.scope["query_string"]
        query = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True) if query_string else ()
        reply = await service.ask(request, accepted, functools.partial(ImageQuestion, service, query, is_batch))
        return Response(reply.content, media_type=reply.media_type)

    return respond
