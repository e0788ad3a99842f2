"""The routes, and their texts in the documentation."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from service.api.answers import describe, describe_in_full
from service.api.examples import PAGES
from service.api.openapi import SAMPLES, problem_responses
from service.api.predict import Service, image_endpoint
from service.api.schema import (
    BatchAnswer,
    BrokenModel,
    LiveAnswer,
    ModelAnswer,
    ModelsAnswer,
    PredictAnswer,
    ReadyAnswer,
)
from service.errors import UnknownSampleError

_PREDICT = """Classify one image, with a certified radius.

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
_PREDICT_BATCH = """Classify several images of one size, all grey or all RGB; answers are in the order of the images.

One invalid image refuses the whole batch. The certificate of an image holds in any batch.
"""
_BODY_PROBLEMS = problem_responses(400, 404, 413, 415, 422, 503)
# The pages load from this server alone, and no other page frames them; the browser enforces it.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def build_router(service: Service) -> APIRouter:
    """Return the routes of models, operations and pages, over one `Service`."""
    router = APIRouter()
    _add_models(router, service)
    _add_operations(router, service)
    _add_pages(router, service)
    return router


class _RequestRoute(APIRoute):
    """A route whose function takes the request alone and returns the response.

    All middleware, limits and dependencies of the application apply to it. Without dependencies FastAPI has nothing to
    resolve or serialise, so the function is called directly: 25 us of framework per request instead of 71.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the handlers of the application answer its exceptions."""
        if self.dependencies or scope["method"] not in self.methods:
            await super().handle(scope, receive, send)
        else:
            response = await self.endpoint(Request(scope, receive, send))
            await response(scope, receive, send)


def add_predictions(router: APIRouter, service: Service) -> None:
    """Add `/predict` and `/predict/batch` to the router of the application itself: an included router costs 25 us."""
    for path, name, summary, description, answer in (
        ("/predict", "predict_one", "Classify one image", _PREDICT, PredictAnswer),
        ("/predict/batch", "predict_batch", "Classify several images of one size", _PREDICT_BATCH, BatchAnswer),
    ):
        router.add_api_route(
            path,
            image_endpoint(service, is_batch=answer is BatchAnswer),
            methods=["POST"],
            name=name,
            description=description,
            tags=["predict"],
            summary=summary,
            response_model=answer,
            responses=_BODY_PROBLEMS,
            route_class_override=_RequestRoute,
        )


def _add_models(router: APIRouter, service: Service) -> None:
    @router.get("/models", tags=["models"], summary="All models", response_model=ModelsAnswer)
    async def list_models() -> Response:
        """The served models: labels, input, proved bound, digests, execution provider; and those that are broken."""
        models = service.models
        broken = [BrokenModel(name=name, reason=error.line) for name, error in models.broken.items()]
        default = models.find(service.settings.default_model)
        served = [describe(one, one is default, models.aliases_of(one)) for one in models.values()]
        return _json(ModelsAnswer(models=served, broken=broken))

    @router.get(
        "/models/{name}",
        tags=["models"],
        summary="One model, with its card",
        response_model=ModelAnswer,
        responses=problem_responses(404, 503),
    )
    async def show_model(name: str) -> Response:
        """One model: its proved bounds, its execution provider and its card."""
        models = service.models
        found = models[name]
        is_default = found is models.find(service.settings.default_model)
        return _json(describe_in_full(found, is_default, models.aliases_of(found), models.rejected.get(found.name)))

    @router.get(
        "/models/{name}/samples/{n}",
        tags=["models"],
        summary="One sample image",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **problem_responses(404, 503),
        },
    )
    async def show_sample(name: str, n: str) -> Response:
        """A PNG file of the artefact, by its number; `samples` of the model has the true classes."""
        samples = service.models[name].samples
        sample = {str(number): sample for number, sample in enumerate(samples)}.get(n)
        if sample is None:
            raise UnknownSampleError(name, len(samples))
        return Response(sample.content, media_type="image/png")


def _add_operations(router: APIRouter, service: Service) -> None:
    @router.get(
        "/health/live",
        tags=["operations"],
        summary="Liveness",
        response_model=LiveAnswer,
        responses={503: {"model": LiveAnswer, "description": "A worker is stuck: the process has to be replaced."}},
    )
    async def live() -> Response:
        """Whether the process works, or only a restart helps."""
        faults = service.health.fatal_faults()
        return _health(LiveAnswer(status="not live" if faults else "live", reasons=faults))

    @router.get(
        "/health/ready",
        tags=["operations"],
        summary="Readiness",
        response_model=ReadyAnswer,
        responses={503: {"model": ReadyAnswer, "description": "The server must not get requests; `reasons` says why."}},
    )
    async def ready() -> Response:
        """Whether the default model is loaded and answers, the workers and the queue move, and the server is not
        stopping."""
        default = service.models.find(service.settings.default_model)
        faults = service.health.faults()
        status = "not ready" if faults else "ready"
        provider = None if default is None else default.provider
        return _health(ReadyAnswer(status=status, provider=provider, reasons=faults))

    @router.get("/metrics", tags=["operations"], summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Requests, latency, batches, predictions and abstentions, in the text format of Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _add_pages(router: APIRouter, service: Service) -> None:
    @router.get("/", include_in_schema=False)
    async def playground() -> Response:
        return FileResponse(PAGES / "playground.html", headers=_PAGE_HEADERS)

    @router.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGES / "docs.html", headers=_PAGE_HEADERS)

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


def _health(answer: LiveAnswer | ReadyAnswer) -> Response:
    content = answer.model_dump_json(exclude=None if answer.reasons else {"reasons"})
    return Response(content, status_code=503 if answer.reasons else 200, media_type="application/json")


def _json(answer: BaseModel, status: int = 200) -> Response:
    """Return a response written by pydantic: shortest floats that read back the same, null if not finite."""
    return Response(answer.model_dump_json(), status_code=status, media_type="application/json")
