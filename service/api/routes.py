"""The routes. The event loop reads bodies and decodes small images; the workers of `service.inference.batching` do the
rest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from service.api.answers import describe, describe_in_full
from service.api.body import BATCH_TYPES, NPY, PREDICT_TYPES, declared_length, headers_of, media_type_of, read_body
from service.api.openapi import SAMPLES, STATIC, Examples, problem_responses
from service.api.predict import Body, ImageQuestion, Reply
from service.api.schema import (
    BatchAnswer,
    HealthAnswer,
    ModelAnswer,
    ModelsAnswer,
    PredictAnswer,
)
from service.errors import UnknownModelError
from service.inference.batching import Batcher
from service.inference.classifier import Classifier
from service.inference.jobs import Question
from service.metrics import Metrics
from service.settings import Settings

Result = TypeVar("Result")

_BODY_PROBLEMS = problem_responses(400, 404, 413, 415, 422, 503)
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})", re.IGNORECASE)
_PAGE_HEADERS = {
    # The pages load from this server only; the browser enforces it.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Service:
    """The state that the routes share."""

    settings: Settings
    classifiers: Mapping[str, Classifier]
    examples: Examples | None
    metrics: Metrics
    batcher: Batcher

    def classifier(self, name: str | None) -> Classifier:
        """Return the model of this name, or the default model; raise `UnknownModelError` if it is not served."""
        wanted = self.settings.default_model if name is None else name
        if wanted not in self.classifiers:
            raise UnknownModelError(wanted, self.classifiers)
        return self.classifiers[wanted]

    async def ask(
        self, request: Request, headers: Mapping[str, str], question_of: Callable[[bytes], Question[Result, Any]]
    ) -> Result:
        """Read the body of a request and return the answer of a worker, both before the deadline.

        The header `Prefer: wait=SECONDS` (RFC 7240 section 4.3) requests an earlier deadline than the server's.

        Args:
            request: its body is still unread.
            headers: see `headers_of`.
            question_of: from the body to the question.

        Raises:
            BodyTooLargeError, EmptyBodyError: see `read_body`.
            OverloadedError, DeadlineError: see `Batcher`.
        """
        limit = self.settings.max_body_bytes
        n_bytes = min(limit, declared_length(headers, default=limit))
        self.batcher.admit(n_bytes)
        try:
            deadline_s = self._deadline_s(headers)
            arrived_s = time.monotonic()
            content = await self.batcher.in_time(read_body(request, headers, limit), deadline_s)
            waited_s = time.monotonic() - arrived_s
            return await self.batcher.ask(question_of(content), len(content), deadline_s, waited_s)
        finally:
            self.batcher.release(n_bytes)

    def _deadline_s(self, headers: Mapping[str, str]) -> float:
        longest_s = self.settings.deadline_s
        preferences = headers.get("prefer")
        wanted = None if preferences is None else _WAIT.search(preferences)
        return longest_s if wanted is None else min(longest_s, float(wanted[1]))


def build_router(service: Service) -> APIRouter:
    """Return all routes but those of the Open Inference Protocol, over one `Service`."""
    router = APIRouter()
    _add_predictions(router, service)
    _add_models(router, service)
    _add_operations(router, service)
    _add_pages(router, service)
    return router


def _add_predictions(router: APIRouter, service: Service) -> None:
    @router.post(
        "/predict",
        tags=["predict"],
        summary="Classify one image",
        response_model=PredictAnswer,
        responses=_BODY_PROBLEMS,
    )
    async def predict_one(request: Request) -> Response:
        """Classify one image, with a certified radius.

        The same image in four forms:

            curl -O SERVER/samples/image.png && curl -O SERVER/samples/image.npy
            curl SERVER/predict -H 'Content-Type: application/json' -d "{\\"image\\": \\"$(base64 -w0 image.png)\\"}"
            curl SERVER/predict -F image=@image.png -F counterfactual=true
            curl 'SERVER/predict?epsilon=0.5' -H 'Content-Type: image/png' --data-binary @image.png
            curl 'SERVER/predict?epsilon=0.5' -H 'Content-Type: application/x-npy' --data-binary @image.npy

        Options belong in the JSON object, in form fields, or, for an image or npy body, in the query. An image that
        cannot be read losslessly is refused; `detail` states the remedy.

        An RGB file is converted to grey where the model takes grey (0.299 R + 0.587 G + 0.114 B), and a grey file to
        RGB where it takes RGB (three copies), as `image.conversion` states. The conversion is part of the certificate:
        radius, counterfactual and distance refer to the image that was sent, in its own channels. An array must have
        the model's channels.
        """
        return await _ask_about_images(service, request, PREDICT_TYPES, is_batch=False)

    @router.post(
        "/predict/batch",
        tags=["predict"],
        summary="Classify several images of one size",
        response_model=BatchAnswer,
        responses=_BODY_PROBLEMS,
    )
    async def predict_batch(request: Request) -> Response:
        """Classify several images of one size, all grey or all RGB; answers are in the order of the images. One invalid
        image refuses the whole batch.

        The certificate of an image holds in any batch.
        """
        return await _ask_about_images(service, request, BATCH_TYPES, is_batch=True)


async def _ask_about_images(service: Service, request: Request, accepted: Sequence[str], is_batch: bool) -> Response:
    headers = headers_of(request)
    media_type = media_type_of(headers, accepted)
    content_type = headers["content-type"]
    query_string: bytes = request.scope["query_string"]
    query = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True) if query_string else []
    as_npy = prefers_npy(headers.get("accept", ""))

    def question_of(content: bytes) -> ImageQuestion:
        body = Body(media_type, content_type, query, content)
        return ImageQuestion(body, is_batch, as_npy, service.settings, service.classifier, service.metrics)

    reply: Reply = await service.ask(request, headers, question_of)
    return Response(reply.content, media_type=reply.media_type)


def prefers_npy(accept: str) -> bool:
    """Return whether a header `Accept` (RFC 9110 section 12.5.1) names `application/x-npy` and ranks JSON no higher."""
    if NPY not in accept.lower():
        return False
    weights: dict[str, float] = {}
    for choice in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in choice.split(";"))
        weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            weights[media_range] = float(weight)
        except ValueError:
            weights[media_range] = 0.0
    wanted = weights.get(NPY, 0.0)
    # The most specific range that matches JSON gives its weight.
    ranges = ("application/json", "application/*", "*/*")
    return wanted > 0.0 and wanted >= next((weights[name] for name in ranges if name in weights), 0.0)


def _add_models(router: APIRouter, service: Service) -> None:
    default_model = service.settings.default_model

    @router.get("/models", tags=["models"], summary="All models", response_model=ModelsAnswer)
    async def list_models() -> Response:
        """The served models: labels, input, proved bound, digest, execution provider."""
        models = [describe(classifier, default_model) for classifier in service.classifiers.values()]
        return _json(ModelsAnswer(models=models))

    @router.get(
        "/models/{name}",
        tags=["models"],
        summary="One model, with its card",
        response_model=ModelAnswer,
        responses=problem_responses(404),
    )
    async def show_model(name: str) -> Response:
        """One model: its proved bounds, its execution provider and its card."""
        return _json(describe_in_full(service.classifier(name), default_model))


def _add_operations(router: APIRouter, service: Service) -> None:
    @router.get("/health/live", tags=["operations"], summary="Liveness", response_model=HealthAnswer)
    async def live() -> Response:
        """Whether the process responds."""
        return _json(HealthAnswer(status="live"))

    @router.get(
        "/health/ready",
        tags=["operations"],
        summary="Readiness",
        response_model=HealthAnswer,
        responses={503: {"model": HealthAnswer, "description": "No default model is loaded."}},
    )
    async def ready() -> Response:
        """Whether the default model is proved, loaded and has run once."""
        is_ready = service.settings.default_model in service.classifiers
        return _json(HealthAnswer(status="ready" if is_ready else "not ready"), status=200 if is_ready else 503)

    @router.get("/metrics", tags=["operations"], summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Requests, latency, batches, predictions and abstentions, in the text format of Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_pages(router: APIRouter, service: Service) -> None:
    @router.get("/", include_in_schema=False)
    async def playground() -> Response:
        return FileResponse(STATIC / "playground.html", headers=_PAGE_HEADERS)

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(STATIC / "docs.html", headers=_PAGE_HEADERS)

    samples = service.examples
    if samples is None:
        return
    files = {
        "image.png": (samples.png, "image/png"),
        "image.npy": (samples.npy, "application/x-npy"),
        "batch.npy": (samples.npy_batch, "application/x-npy"),
    }
    for name, (content, media_type) in files.items():
        answer = Response(content, media_type=media_type)
        router.add_api_route(f"{SAMPLES}/{name}", _constant(answer), include_in_schema=False)


def _constant(answer: Response) -> Callable[[], Response]:
    def give() -> Response:
        return answer

    return give


def _json(answer: BaseModel, status: int = 200) -> Response:
    """Return a response written by pydantic: shortest floats that read back the same, null if not finite."""
    return Response(answer.model_dump_json(), status_code=status, media_type="application/json")
