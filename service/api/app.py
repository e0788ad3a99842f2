"""The ASGI application: models, routes, middleware, and every error as problem details."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import onnxruntime
from fastapi import APIRouter, FastAPI
from fastapi.params import Depends
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.api import kserve, model_control, open_inference
from service.api.access import KEY_HEADERS, Access, AccessMiddleware, access_of, describe_access
from service.api.body import JSON_LENGTH
from service.api.errors import add_error_handlers
from service.api.examples import STATIC, make_examples
from service.api.instances import InstancesRequest
from service.api.metrics import MetricsMiddleware
from service.api.openapi import document
from service.api.predict import Service
from service.api.refusals import Refusals
from service.api.routes import add_predictions, build_router
from service.api.tensors import InferRequest
from service.artefact.verified_files import watched
from service.errors import ArtefactChangedError
from service.inference.admission import Limits
from service.inference.batching import Batcher
from service.inference.catalogue import Catalogue
from service.inference.classifier import Classifier
from service.inference.loading import load_classifiers
from service.inference.served import Models
from service.metrics import Metrics
from service.runtime.cpus import usable_cpus
from service.runtime.provider import CUDA
from service.runtime.session import GpuLimits
from service.settings import Settings, Threads, list_of, threads_of

# Least number of requests in progress that are an overload, of all processes and of one.
_BURST = 80
_LEAST_BURST = 16
_DESCRIPTION = """
Image classifiers with a certificate in every answer. For an image x the service answers a class and a `radius`: for
every other valid image x' at an L2 distance below the radius (pixels in [0, 1]), this service gives the same class,
for any batch, number of threads and processor. `radius` is rounded down; where nothing is certified it is 0 and
`certified` is false. A counterfactual is the nearest image of another class that was found, measured by the same path.

The radius does not imply that the class is correct. It does not cover changes that are small in another sense than L2
(rotation, lighting), nor changes as large as the radius.

Pixels are those of the image that was sent, decoded losslessly, in the channels of the file; an image that cannot be
read losslessly is refused. An RGB file is converted to grey for a grey model (0.299 R + 0.587 G + 0.114 B), a grey file
to RGB for an RGB model, and with `resize` an image is resized to the model's size. These maps are part of the
certificate: the radius refers to the image that was sent, which `image` in the answer identifies.

Errors are RFC 9457 problem details, `application/problem+json`; `detail` states the cause and the remedy.
"""

# Longest wait for the workers at the end.
_CLOSE_S = 1.0


def create_app(
    settings: Settings,
    classifiers: Mapping[str, Classifier] | None = None,
    dependencies: Sequence[Depends] = (),
    access: Access | None = None,
    catalogue: Catalogue | None = None,
) -> FastAPI:
    """Return the application, ready to answer.

    Args:
        settings: see `service.settings`.
        classifiers: by name, for example of `load_classifiers`; default: those in `settings.models`.
        dependencies: FastAPI dependencies of every route.
        access: keys and limits that several processes share; default: those of the settings.
        catalogue: of `classifiers`; default: one that nobody changes.

    Raises:
        ArtefactError, ProviderError, SettingsError: see `load_classifiers` and `access_of`.
    """
    access = access or access_of(settings)
    if classifiers is None:
        classifiers = load_classifiers(settings)
    models = classifiers if isinstance(classifiers, Models) else Models(classifiers)
    default = models.find(settings.default_model)
    examples = None
    if default is not None:
        # A process that takes the place of another may find changed files; its requests are told.
        with contextlib.suppress(ArtefactChangedError):
            examples = make_examples(default)
    threads = threads_of(settings, usable_cpus())
    metrics = Metrics(shared=threads.processes > 1)
    batcher = Batcher(limits_of(settings, threads, classifiers), metrics)
    if catalogue is None:
        catalogue = Catalogue(models, settings)
    service = Service(settings, catalogue, examples, metrics, batcher)
    service.note_models()
    metrics.note_build(__version__, onnxruntime.__version__)

    app = FastAPI(
        title="lipcert",
        version=__version__,
        summary="Image classification with a certificate in every answer.",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=dependencies,
        lifespan=_running(batcher, catalogue),
        # FastAPI would look for a provider of traces in each request, for 5 us; a tracer can be added as a middleware.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        generate_unique_id_function=lambda route: route.name,
        openapi_tags=[
            {"name": "predict", "description": "Classes, certified radii and counterfactuals."},
            {"name": "models", "description": "The served models and their proved bounds."},
            {"name": "operations", "description": "Health and metrics."},
            {
                "name": "open inference protocol",
                "description": "The same models for clients of the protocol, version 2.",
            },
            {"name": "KServe V1 protocol", "description": "The same models for clients of version 1."},
        ],
    )
    # At the head of the router, which tries its routes in order.
    add_predictions(app.router, service)
    protocols = (open_inference, kserve, model_control)
    for router in (build_router(service), *(protocol.build_router(service) for protocol in protocols)):
        app.include_router(router)
        app.include_router(_heads(router))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    # The last one added is the first to see a request: preflight requests have no key, and all answers are counted.
    if access is not None:
        app.add_middleware(AccessMiddleware, access=access)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list_of(settings.cors_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=[
                *("Accept", "Content-Encoding", "Content-Type", JSON_LENGTH, "Prefer", "Traceparent", "X-Request-ID"),
                *KEY_HEADERS,
            ],
            expose_headers=[JSON_LENGTH, "Retry-After", "X-Request-ID"],
        )
    app.add_middleware(MetricsMiddleware, metrics=metrics, traces=service.traces)
    add_error_handlers(app)
    app.state.service = service

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = document(app, examples, [InferRequest, InstancesRequest])
            if access is not None:
                describe_access(app.openapi_schema, access)
        return app.openapi_schema

    app.openapi = openapi
    refusals = Refusals(service)
    app.state.refuse, app.state.refused = refusals.refuse, refusals.refused
    return app


def _heads(router: APIRouter) -> APIRouter:
    """Return a route for HEAD wherever `router` has one for GET (RFC 9110 section 9.1); the server drops the body."""
    heads = APIRouter()
    for route in router.routes:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            heads.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                name=route.name,
                response_model=route.response_model,
                response_class=route.response_class,
                include_in_schema=False,
            )
    return heads


def limits_of(settings: Settings, threads: Threads, classifiers: Mapping[str, Classifier]) -> Limits:
    """Return the limits of one process.

    Args:
        settings: those of the server; requests and bytes are shared among the processes.
        threads: see `threads_of`.
        classifiers: by name; a GPU has a larger default of the forward batch.
    """
    on_gpu = any(classifier.provider == CUDA for classifier in classifiers.values())
    forward_batch = settings.forward_batch or (GpuLimits().batch if on_gpu else 32)
    return Limits(
        workers=threads.workers,
        forward_batch=forward_batch,
        max_delay_s=settings.max_delay_ms / 1000.0,
        max_requests=-(-settings.max_requests // threads.processes),
        max_bytes=-(-settings.max_waiting_bytes // threads.processes),
        max_wait_s=settings.max_wait_ms / 1000.0 or settings.deadline_s,
        burst=sys.maxsize if settings.max_wait_ms else _burst(forward_batch, threads),
        client_share=settings.client_share,
        min_rate=settings.min_rate,
        max_pixels=settings.max_pixels,
    )


def _burst(forward_batch: int, threads: Threads) -> int:
    """Return more than two full batches, of which one is computed while the other gathers."""
    return max(_LEAST_BURST, max(_BURST, 5 * forward_batch // 2) // threads.processes)


def _running(
    batcher: Batcher, catalogue: Catalogue
) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        with watched(lambda: [classifier.files for classifier in catalogue.models.values()]):
            yield
        if not batcher.is_closed:
            # Called on the event loop, which hands the last answers over afterwards.
            batcher.close(_CLOSE_S)

    return lifespan
