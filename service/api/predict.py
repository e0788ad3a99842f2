"""From a request of `/predict` or `/predict/batch` to its response.

The event loop reads the body and decodes a small image; the workers of `service.inference` do the rest.
"""

from __future__ import annotations

import functools
import io
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.api.answers import Reply, in_records, in_words
from service.api.body import BATCH_TYPES, FORM, JSON, NPY, PREDICT_TYPES, Head, read_body, read_head, sniffed
from service.api.decoding import Decoders, Kind, Order, decode, decode_plain
from service.api.decoding import Request as DecodedBody
from service.api.examples import Examples
from service.api.metrics import STAGES, Traces
from service.api.parsing import Query, read_query
from service.api.schema import NO_OPTIONS, Options
from service.inference.admission import Place
from service.inference.batching import Batcher
from service.inference.catalogue import Catalogue
from service.inference.catalogue import Order as ModelOrder
from service.inference.health import LEAST_STUCK_S, Health
from service.inference.jobs import Answer_co, Question
from service.inference.outcome import Decoded, Outcome
from service.inference.served import Models
from service.metrics import Metrics
from service.pixels.images import decode_plain as plain_pixels
from service.pixels.images import is_plain
from service.settings import Settings
from service.tracing import Stage

Result = TypeVar("Result")

AT_ONCE_BYTES = 8 * 1024
"""Largest body that is parsed and decoded on the event loop, in some 30 microseconds."""
ABANDON = "lipcert.abandon"
"""Key of a function in the scope of a request, for the server to call when the client is gone."""


class Repository:
    """Changes of the served models; the server of the application says how."""

    ask: Callable[[ModelOrder], Coroutine[Any, Any, str | None]] | None = None
    """Return why an order was refused, null once it is done; no order is possible without."""


@dataclass
class _Stages:
    """The stages of a request, read when its answer has been sent."""

    place: Place
    entered_s: float

    def __iter__(self) -> Iterator[Stage]:
        place, now_s = self.place, time.monotonic()
        marks = (self.entered_s, place.queued_s, place.taken_s, place.computed_s, now_s)
        for name, start_s, end_s in zip(("decode", "wait", "compute", "answer"), marks, marks[1:], strict=False):
            # A request that was refused on its way has no later marks.
            if start_s and end_s:
                yield Stage(name, start_s, end_s)


@dataclass(frozen=True)
class Service:
    """The state that the routes share."""

    settings: Settings
    catalogue: Catalogue
    examples: Examples | None
    metrics: Metrics
    batcher: Batcher
    decoders: Decoders = field(default_factory=Decoders)
    traces: Traces = field(default_factory=Traces)
    repository: Repository = field(default_factory=lambda: Repository())

    def note_models(self) -> None:
        """Show the served models in the metrics."""
        models = self.models
        served = {(name, model.provider, model.digest) for name, model in models.items()}
        self.metrics.note_models(served, models.rejected, len(models.broken))

    @property
    def models(self) -> Models:
        """The models that are served now; a request reads it once."""
        return self.catalogue.models

    @functools.cached_property
    def health(self) -> Health:
        """Faults of this process."""
        settings = self.settings
        stuck_s = settings.stuck_s or max(LEAST_STUCK_S, settings.deadline_s / 3.0)
        return Health(self.catalogue, settings.default_model, self.batcher, stuck_s)

    async def ask(
        self, request: Request, accepted: Sequence[str], question_of: Callable[[Head, bytes], BodyQuestion[Result]]
    ) -> Result:
        """Read a request and return the answer of a worker, both before the deadline.

        Args:
            request: its body is still unread.
            accepted: media types of the body.
            question_of: from headers and body to the question.

        Raises:
            MediaTypeError: see `read_head`.
            BodyTooLargeError, EmptyBodyError: see `read_body`.
            OverloadedError, DeadlineError, TooSlowError: see `Batcher`.
            ClientDisconnect: the client is gone.
        """
        head = read_head(request, accepted)
        limit = self.settings.max_body_bytes
        with self.place(request, head) as place:
            if self.traces.tracer is not None:
                request.scope[STAGES] = _Stages(place, time.monotonic())
            request.scope[ABANDON] = functools.partial(place.stop, ClientDisconnect)
            content = await read_body(request, head, limit, place)
            question = question_of(head, content)
            order = question.order()
            if order is None:
                return await self.batcher.ask(question, len(content), place)
            place.begin(len(content))
            started_s = time.monotonic()
            async with self.decoders.decoded(order, content) as body:
                self.metrics.stage_s["decode"].append(time.monotonic() - started_s)
                question.take(body)
                return await self.batcher.ask(question, len(content), place)

    def place(self, request: Request, head: Head) -> Place:
        """Return a place to enter for a request, with its deadline."""
        client = request.scope.get("client") or ("", 0)
        return self.batcher.place(min(self.settings.deadline_s, head.wait_s), client[0])

    def order(self, models: Models, kind: Kind, head: Head, query: Query, model: str) -> Order:
        """Return how to decode a body.

        Args:
            models: that the request can name.
            kind: route of the request.
            head: its headers.
            query: names and values, in order.
            model: name of the model, unless the options name another.
        """
        settings = self.settings
        return Order(kind, head, query, model, models.shapes, models.reasons, settings.max_pixels, settings.max_batch)

    def count(self, outcome: Outcome[Any]) -> None:
        """Count the images of an answer, and the abstentions among them."""
        predictions, abstentions, radii = self.metrics.predictions_of(outcome.classifier.name)
        radii.extend([prediction.radius for prediction in outcome.predictions])
        certified = [prediction.certified for prediction in outcome.predictions]
        predictions.inc(len(certified))
        if False in certified:
            abstentions.inc(certified.count(False))


class BodyQuestion(Question[Answer_co, Any], Protocol[Answer_co]):
    """A question whose body a child process may decode."""

    def order(self) -> Order | None:
        """Return how a child process has to decode the body; null if this process decodes it."""
        ...

    def take(self, body: DecodedBody) -> None:
        """Receive the decoded body."""
        ...


@dataclass
class ImageQuestion:
    """A request for one image, or (`is_batch`) several of one size."""

    service: Service
    query: Query
    is_batch: bool
    head: Head
    content: bytes
    decoded: Decoded[Options] | None = None
    models: Models = field(init=False)

    def __post_init__(self) -> None:
        """Take the models of this request."""
        self.models = self.service.models

    def order(self) -> Order | None:
        """Return how a child process has to decode the body; null if this process decodes it."""
        if self.decode_at_once() or self.head.media_type == NPY or is_plain(self.content):
            return None
        return self._order()

    def decode_at_once(self) -> Decoded[Options] | None:
        """Return the decoded request if it has one small image that is an array or a plain PNG file."""
        if self.decoded is not None or self.is_batch or len(self.content) > AT_ONCE_BYTES:
            return self.decoded
        settings = self.service.settings
        classifier = self.models.find(settings.default_model)
        if classifier is None or self.query or self.head.media_type in (JSON, FORM, NPY):
            body = decode_plain(self._order(), self.content)
            if body is not None:
                self.take(body)
        elif classifier.input_shape[0] in (1, 3):
            # The same without options, in two thirds of the time: the most frequent request.
            pixels_CHW = plain_pixels(self.content, settings.max_pixels)
            if pixels_CHW is not None:
                self.decoded = Decoded(classifier, pixels_CHW[np.newaxis], NO_OPTIONS)
        return self.decoded

    def decode(self) -> Decoded[Options]:
        """Return the decoded request; raise `InputError`, see `service.api.decoding`."""
        self.take(decode(self._order(), self.content))
        assert self.decoded is not None
        return self.decoded

    def take(self, body: DecodedBody) -> None:
        """Receive the decoded body."""
        assert isinstance(body.options, Options)
        self.decoded = Decoded(self.models[body.model], body.pixels_NCHW, body.options)

    def _order(self) -> Order:
        kind = "batch" if self.is_batch else "predict"
        return self.service.order(self.models, kind, self.head, self.query, self.service.settings.default_model)

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
        query = read_query(query_string) if query_string else ()

        def question(head: Head, content: bytes) -> ImageQuestion:
            return ImageQuestion(service, query, is_batch, sniffed(head, content), content)

        reply = await service.ask(request, accepted, question)
        return Response(reply.content, media_type=reply.media_type)

    return respond
