"""What each path does. Decoding and inference run on worker threads; the event loop only moves bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from service.answers import describe, describe_in_full, predict
from service.body import BATCH_TYPES, PREDICT_TYPES, media_type_of, parse_batch, parse_predict, read_body
from service.classifier import Classifier
from service.errors import UnknownModelError
from service.metrics import Metrics
from service.openapi import SAMPLES, STATIC, Examples, problem_responses
from service.schema import (
    BatchAnswer,
    HealthAnswer,
    ModelAnswer,
    ModelsAnswer,
    PredictAnswer,
)
from service.settings import Settings

Result = TypeVar("Result")

_BODY_PROBLEMS = problem_responses(400, 404, 413, 415, 422)
_PAGE_HEADERS = {
    # The pages fetch nothing but this server; the browser holds them to it.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Service:
    """What the routes work with."""

    settings: Settings
    classifiers: Mapping[str, Classifier]
    examples: Examples | None
    metrics: Metrics = field(default_factory=Metrics)
    # One worker a core: more would only add images in memory, not speed.
    workers: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(max(2, os.cpu_count() or 2)))

    def classifier(self, name: str | None) -> Classifier:
        """The model of this name, or the default one; raises `UnknownModelError`."""
        wanted = self.settings.default_model if name is None else name
        if wanted not in self.classifiers:
            raise UnknownModelError(wanted, self.classifiers)
        return self.classifiers[wanted]

    async def on_worker(self, work: Callable[[], Result]) -> Result:
        """Run `work` on a worker thread."""
        return await anyio.to_thread.run_sync(work, limiter=self.workers)


def build_router(service: Service) -> APIRouter:
    """All routes of the application, over one `Service`."""
    router = APIRouter()
    _add_predictions(router, service)
    _add_models(router, service)
    _add_operations(router, service)
    _add_pages(router, service)
    return router


def _add_predictions(router: APIRouter, service: Service) -> None:
    settings = service.settings

    @router.post(
        "/predict",
        tags=["predict"],
        summary="Classify one image",
        response_model=PredictAnswer,
        responses=_BODY_PROBLEMS,
    )
    async def predict_one(request: Request) -> Response:
        """Classify one image, with a proved radius around the answer.

        The same image in four forms:

            curl -O SERVER/samples/image.png && curl -O SERVER/samples/image.npy
            curl SERVER/predict -H 'Content-Type: application/json' -d "{\\"image\\": \\"$(base64 -w0 image.png)\\"}"
            curl SERVER/predict -F image=@image.png -F counterfactual=true
            curl 'SERVER/predict?epsilon=0.5' -H 'Content-Type: image/png' --data-binary @image.png
            curl 'SERVER/predict?epsilon=0.5' -H 'Content-Type: application/x-npy' --data-binary @image.npy

        Options stand in the JSON object, in form fields, or, for an image or npy body, in the query. An image
        that cannot be read without loss is refused, with what to do in `detail`.

        An RGB file is converted to grey where the model takes grey (0.299 R + 0.587 G + 0.114 B), and a grey file to
        RGB where it takes RGB (three copies); `image.conversion` says so. The conversion is part of what is proved:
        radius, counterfactual and distance are about the image that was sent, in its own channels. An array must have
        the model's channels.
        """
        media_type = media_type_of(request, PREDICT_TYPES)
        content_type = request.headers["content-type"]
        query = request.query_params.multi_items()
        content = await read_body(request, settings.max_body_bytes)

        def work() -> PredictAnswer:
            options, image = parse_predict(media_type, content_type, query, content)
            classifier = service.classifier(options.model)
            pixels_CHW = image.decode(classifier.input_shape, settings.max_pixels)
            return predict(classifier, pixels_CHW[None], options)[0]

        answer = await service.on_worker(work)
        service.metrics.count_predictions(answer.model, [answer.certificate.certified])
        return _json(answer)

    @router.post(
        "/predict/batch",
        tags=["predict"],
        summary="Classify several images of one size",
        response_model=BatchAnswer,
        responses=_BODY_PROBLEMS,
    )
    async def predict_batch(request: Request) -> Response:
        """Classify several images of one size, all grey or all RGB; answers in their order. One bad image refuses all.

        The answer to an image does not depend on the batch it is in: its class and radius hold either way.
        """
        media_type = media_type_of(request, BATCH_TYPES)
        query = request.query_params.multi_items()
        content = await read_body(request, settings.max_body_bytes)

        def work() -> BatchAnswer:
            options, images = parse_batch(media_type, query, content)
            classifier = service.classifier(options.model)
            image_NCHW = images.decode(classifier.input_shape, settings.max_pixels, settings.max_batch, options.resize)
            return BatchAnswer(predictions=predict(classifier, image_NCHW, options))

        answer = await service.on_worker(work)
        service.metrics.count_predictions(
            answer.predictions[0].model, [one.certificate.certified for one in answer.predictions]
        )
        return _json(answer)


def _add_models(router: APIRouter, service: Service) -> None:
    default_model = service.settings.default_model

    @router.get("/models", tags=["models"], summary="What is served", response_model=ModelsAnswer)
    async def list_models() -> Response:
        """The models that are served: labels, input, proved bound, digest."""
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
        """One model: what is proved of it, what serves it, and its card."""
        return _json(describe_in_full(service.classifier(name), default_model))


def _add_operations(router: APIRouter, service: Service) -> None:
    @router.get("/health/live", tags=["operations"], summary="Is the process alive", response_model=HealthAnswer)
    async def live() -> Response:
        """Whether the process answers."""
        return _json(HealthAnswer(status="live"))

    @router.get(
        "/health/ready",
        tags=["operations"],
        summary="Can it answer",
        response_model=HealthAnswer,
        responses={503: {"model": HealthAnswer, "description": "No default model is loaded."}},
    )
    async def ready() -> Response:
        """Whether the default model is proved, loaded and has answered once."""
        is_ready = service.settings.default_model in service.classifiers
        return _json(HealthAnswer(status="ready" if is_ready else "not ready"), status=200 if is_ready else 503)

    @router.get("/metrics", tags=["operations"], summary="Counters for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Requests, latency, predictions and abstentions, for Prometheus."""
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
    """Serialised by pydantic itself: shortest floats that read back the same, null for what is not finite."""
    return Response(answer.model_dump_json(), status_code=status, media_type="application/json")
