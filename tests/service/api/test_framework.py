"""No path around the framework: every middleware, dependency and limit of the application applies to every path."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "BREW")
NPY = {"Content-Type": "application/x-npy"}


class RefuseEverything:
    """A middleware that answers 401 to every request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await Response(status_code=401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def refuse() -> None:
    raise HTTPException(401)


def paths(app: FastAPI) -> list[str]:
    """All paths of the application with a model's name for a parameter, files of a mount, and paths of no route."""
    found = {
        context.path.format(name="grey", version="1", n=0, path="samples/mnist-7.png")
        for context in iter_route_contexts(app.routes)
    }
    assert {"/", "/docs", "/openapi.json", "/metrics", "/predict", "/predict/batch", "/v2/models/grey/infer"} <= found
    return [
        *sorted(found),
        "/static/samples/mnist-7.png",
        "/static/nothing",
        "/nothing",
        "/predict/",
        "/v2/nothing",
        "",
    ]


@pytest.fixture
def app(classifiers: Mapping[str, Classifier]) -> FastAPI:
    return create_app(Settings(default_model="grey"), classifiers)


@pytest.mark.parametrize("method", METHODS)
def test_a_middleware_that_refuses_everything_finds_no_open_path(client: Client, app: FastAPI, method: str) -> None:
    app.add_middleware(RefuseEverything)
    guarded = Client(app, client._runner)
    statuses = {path: guarded.request(method, path).status_code for path in paths(app)}
    assert statuses == dict.fromkeys(statuses, 401)


def test_a_dependency_of_the_application_applies_to_every_documented_route(
    client: Client, classifiers: Mapping[str, Classifier]
) -> None:
    app = create_app(Settings(default_model="grey"), classifiers, dependencies=[Depends(refuse)])
    guarded = Client(app, client._runner)
    contexts = [context for context in iter_route_contexts(app.routes) if isinstance(context.original_route, APIRoute)]
    assert {"/predict", "/predict/batch", "/models/{name}", "/v2/models/{name}/infer"} <= {c.path for c in contexts}
    for context in contexts:
        for method in context.methods:
            response = guarded.request(method, context.path.format(name="grey", version="1", n=0))
            assert response.status_code == 401, (method, context.path)
            media_type = "application/json" if context.path.startswith("/v1/") else "application/problem+json"
            assert response.headers["content-type"] == media_type


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_an_answer_is_the_same_behind_a_dependency(
    client: Client, classifiers: Mapping[str, Classifier], path: str
) -> None:
    seen: list[str] = []

    def note(request: Request) -> None:
        seen.append(request.url.path)

    app = create_app(Settings(default_model="grey"), classifiers, dependencies=[Depends(note)])
    shape = (1, HEIGHT, WIDTH)
    content = npy(np.zeros(shape))
    plain = client.post(path, content=content, headers=NPY)
    assert plain.status_code == 200
    assert Client(app, client._runner).post(path, content=content, headers=NPY).content == plain.content
    assert seen == [path]


@pytest.mark.parametrize(
    "path",
    ["/predict", "/predict/batch", "/v2/models/grey/infer", "/v2/models/grey/explain", "/v1/models/grey:predict"],
)
def test_a_body_limit_of_the_application_applies_to_predictions(client: Client, app: FastAPI, path: str) -> None:
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=10)
    limited = Client(app, client._runner)
    assert limited.post(path, content=bytes(11), headers=NPY).status_code == 413


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_other_methods_than_post_are_refused(client: Client, path: str, method: str) -> None:
    response = client.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path",
    ["/predict", "/predict/batch", "/v2/models/grey/infer", "/v2/models/grey/explain", "/v1/models/grey:predict"],
)
def test_options_of_a_path_are_its_methods(client: Client, path: str) -> None:
    response = client.request("OPTIONS", path)
    assert (response.status_code, response.headers["allow"], response.content) == (204, "POST, OPTIONS", b"")


def test_head_is_answered_wherever_get_is(client: Client, app: FastAPI) -> None:
    found = {path for path in paths(app) if client.get(path).status_code == 200}
    assert {"/", "/docs", "/health/ready", "/metrics", "/models", "/models/grey", "/samples/image.png", "/v2"} <= found
    assert {"/v1/models", "/v1/models/grey", "/v2/models", "/v2/models/grey/config"} <= found
    for path in found:
        response = client.request("HEAD", path)
        got = client.get(path)
        assert response.status_code == 200, path
        assert response.content == b""
        assert response.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # which counts these requests
            assert response.headers["content-length"] == got.headers["content-length"]
        assert client.request("OPTIONS", path).headers["allow"] == "GET, HEAD, OPTIONS"
        assert client.post(path).headers["allow"] == "GET, HEAD"
