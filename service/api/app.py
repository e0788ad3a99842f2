"""The application: models loaded and proved, routes, and every error as problem details."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service import __version__
from service.api import open_inference
from service.artefact.card import artefact_folders
from service.inference.batching import Batcher, Limits
from service.inference.classifier import Classifier
from service.runtime.cpus import usable_cpus
from service.direct import DirectFastAPI
from service.runtime.engine import CUDA, resolve_provider
from service.errors import ArtefactError, LipcertError, SettingsError
from service.metrics import Metrics, MetricsMiddleware
from service.api.openapi import STATIC, document, make_examples
from service.api.problem import problem, problem_of
from service.artefact.proving import Provers
from service.api.routes import Service, build_router
from service.settings import Settings, Threads, threads_of

_log = logging.getLogger(__name__)

_DIRECT_PATHS = frozenset({"/predict", "/predict/batch"})

_DESCRIPTION = """
Image classifiers whose every answer carries a proof. For an image x the service answers a class and a `radius`: for
every other valid image x' with L2 distance below the radius (pixels in [0, 1]), this service gives the same class,
whatever the batch, the threads or the processor. `radius` is rounded down; where nothing can be proved it is 0 and
`certified` is false. A counterfactual is the nearest image of another class that was found, measured by the same path.

The radius does not say that the class is right, and says nothing about changes that are small in another sense than L2
(rotation, lighting) or that are as large as the radius.

Pixels are those that were sent, after lossless decoding, in the channels of the file: what cannot be read without loss
is refused. A colour file is converted to grey for a grey model (0.299 R + 0.587 G + 0.114 B), a grey file to RGB for a
colour model, and with `resize` to the model's size. These maps are part of the proof, so that the radius is about the
image that was sent; `image` in the answer names it.

Errors are RFC 9457 problem details, `application/problem+json`; `detail` says what to do.
"""


def load_classifiers(settings: Settings, provers: Provers | None = None) -> dict[str, Classifier]:
    """Load every artefact in `settings.models`, by name, each proved by this run of the server.

    Args:
        settings: see `service.settings`.
        provers: at work on the folders of `settings.models`; new ones if absent.

    Raises:
        ArtefactError: the folder cannot be read or holds no artefact, or a file of one is missing, damaged or without
            proof.
        ProviderError: the provider cannot be had.
        SettingsError: there is no model of the default name.
    """
    # The default model first: it warms up while others are still being proved.
    folders = artefact_folders(settings.models, settings.default_model)
    if provers is None:
        with Provers(usable_cpus()) as new:
            new.start(folders, settings.provider)
            return load_classifiers(settings, new)
    provider = resolve_provider(settings.provider)
    threads = threads_of(settings, usable_cpus())
    classifiers: dict[str, Classifier] = {}
    for folder in folders:
        classifier = Classifier.proved(folder, provers.findings(folder), provider, threads.inference)
        if classifier.name in classifiers:
            raise ArtefactError(
                folder / "card.json", f"the name {classifier.name!r} is taken by another artefact; change one"
            )
        classifiers[classifier.name] = classifier
        if classifier.name == settings.default_model and threads.run_before_fork:
            classifier.warm_up()
    if settings.default_model not in classifiers:
        raise SettingsError(
            f"LIPCERT_DEFAULT_MODEL={settings.default_model!r}: {settings.models} has no such model; it has "
            f"{', '.join(sorted(classifiers))}"
        )
    return dict(sorted(classifiers.items()))


def create_app(settings: Settings, classifiers: Mapping[str, Classifier] | None = None) -> FastAPI:
    """The application, ready to answer.

    Args:
        settings: see `service.settings`.
        classifiers: by name; loaded from `settings.models` if absent.

    Raises:
        ArtefactError, ProviderError, SettingsError: see `load_classifiers`.
    """
    if classifiers is None:
        classifiers = load_classifiers(settings)
    default = classifiers.get(settings.default_model)
    examples = None if default is None else make_examples(default)
    threads = threads_of(settings, usable_cpus())
    metrics = Metrics(shared=threads.processes > 1)
    batcher = Batcher(_limits(settings, threads, classifiers), metrics)
    service = Service(settings, classifiers, examples, metrics, batcher)

    app = DirectFastAPI(
        title="lipcert",
        version=__version__,
        summary="Image classification with a proof in every answer.",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_closing(batcher),
        generate_unique_id_function=lambda route: route.name,
        openapi_tags=[
            {"name": "predict", "description": "Classes, certified radii and counterfactuals."},
            {"name": "models", "description": "What is served, and what is proved of it."},
            {"name": "operations", "description": "Health and metrics."},
            {"name": "open inference protocol", "description": "The same models for clients of version 2."},
        ],
    )
    router = build_router(service)
    app.include_router(router)
    app.include_router(open_inference.build_router(service))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    direct = [route for route in router.routes if isinstance(route, APIRoute) and route.path in _DIRECT_PATHS]
    app.call_directly(direct, _answer_any_error, MetricsMiddleware, metrics=metrics)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    _add_error_handlers(app)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = document(app, examples, [open_inference.InferRequest])
        return app.openapi_schema

    app.openapi = openapi
    return app


def _limits(settings: Settings, threads: Threads, classifiers: Mapping[str, Classifier]) -> Limits:
    on_gpu = any(classifier.provider == CUDA for classifier in classifiers.values())
    return Limits(
        workers=threads.workers,
        forward_batch=settings.forward_batch or (256 if on_gpu else 32),
        max_delay_s=settings.max_delay_ms / 1000.0,
        max_requests=-(-settings.max_requests // threads.processes),
        max_bytes=-(-settings.max_waiting_bytes // threads.processes),
        max_pixels=settings.max_pixels,
    )


def _closing(batcher: Batcher) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        batcher.close()

    return lifespan


async def _answer_error(request: Request, error: Exception) -> Response:
    """Errors of the domain and of connections; others are raised again."""
    if isinstance(error, ClientDisconnect):
        # Nobody reads this; without it a client that hangs up would count as an error of the server.
        return Response(status_code=HTTPStatus.BAD_REQUEST)
    if not isinstance(error, LipcertError):
        raise error
    path = request.url.path
    answer = problem_of(error, path, error_member=path.startswith(open_inference.PREFIX + "/"))
    if answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("%s %s: %s", request.method, path, error, exc_info=error)
    return answer


async def _answer_any_error(request: Request, error: Exception) -> Response:
    try:
        return await _answer_error(request, error)
    except Exception:
        _log.exception("%s %s", request.method, request.url.path)
        return _unexpected(request)


def _unexpected(request: Request) -> Response:
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "the server failed on this request; its log says more",
        instance=request.url.path,
    )


def _add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(LipcertError, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        detail = str(error.detail)
        if error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is nothing at {path}; /docs lists what there is"
        elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = (error.headers or {}).get("Allow", "another method")
            detail = f"{request.method} does nothing at {path}; use {allowed}"
        return problem(error.status_code, detail, instance=path, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, faults, instance=request.url.path)

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        # Starlette raises it again after this answer, and the server logs it with its traceback.
        del error
        return _unexpected(request)
