"""Keys and limits in front of every path: without a valid key of the scope nothing is served, whatever the request."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import npy
from fake_clock import Clock
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from service.access import limits
from service.access.keys import new_key
from service.access.scopes import ADMIN, METRICS, PREDICT
from service.api.access import AccessMiddleware, access_of, scope_of
from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings

SCOPES = {
    "/": None,
    "/docs": None,
    "/openapi.json": None,
    "/static": None,
    "/samples/image.png": None,
    "/samples/image.npy": None,
    "/samples/batch.npy": None,
    "/health/live": None,
    "/health/ready": None,
    "/v2/health/live": None,
    "/v2/health/ready": None,
    "/predict": PREDICT,
    "/predict/batch": PREDICT,
    "/models": PREDICT,
    "/models/{name}": PREDICT,
    "/models/{name}/samples/{n}": PREDICT,
    "/v2": PREDICT,
    "/v2/models": PREDICT,
    "/v2/repository/index": PREDICT,
    **{
        f"/v2/models/{{name}}{version}{end}": PREDICT
        for version in ("", "/versions/{version}")
        for end in ("", "/ready", "/config", "/stats", "/infer", "/explain")
    },
    "/v2/models/stats": PREDICT,
    "/v1/models": PREDICT,
    "/v1/models/{name}": PREDICT,
    "/v1/models/{name}:predict": PREDICT,
    "/v1/models/{name}:explain": PREDICT,
    "/metrics": METRICS,
    "/v2/repository/models/{name}/load": ADMIN,
    "/v2/repository/models/{name}/unload": ADMIN,
}
"""Scope of every route. A new route belongs here and into `service.api.access`."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
KEYS = {scope: new_key(f"only-{scope}", [scope]) for scope in (PREDICT, METRICS, ADMIN)}
REVOKED, _ = new_key("revoked", [ADMIN])
LINES = ";".join(line for _, line in KEYS.values())
WRONG = {
    "no key": {},
    "a wrong secret": {"X-API-Key": KEYS[ADMIN][0][:-8] + "AAAAAAAA"},
    "an unknown name": {"X-API-Key": KEYS[ADMIN][0].replace("only-admin", "somebody")},
    "a revoked key": {"Authorization": f"Bearer {REVOKED}"},
    "a line of the file": {"X-API-Key": KEYS[ADMIN][1]},
    "another scheme": {"Authorization": "Basic " + base64.b64encode(f":{KEYS[ADMIN][0]}".encode()).decode()},
    "no scheme": {"Authorization": KEYS[ADMIN][0]},
    "two keys": {"X-API-Key": KEYS[ADMIN][0], "Authorization": f"Bearer {KEYS[PREDICT][0]}"},
    "an empty key": {"X-API-Key": ""},
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock().install(monkeypatch, limits)


@pytest.fixture
def app(classifiers: Mapping[str, Classifier]) -> FastAPI:
    return create_app(Settings(default_model="grey", api_keys=LINES), classifiers)


def paths_of(app: FastAPI) -> list[str]:
    return [context.path.removesuffix("/{path:path}") for context in iter_route_contexts(app.routes)]


def concrete(path: str) -> str:
    return "/static/docs.js" if path == "/static" else path.format(name="grey", version="1", n=0)


def test_every_route_has_a_scope(app: FastAPI) -> None:
    assert set(paths_of(app)) == set(SCOPES)
    assert {path: scope_of(concrete(path)) for path in SCOPES} == SCOPES


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/predict/",
        "/predictions",
        "/v2x",
        "/v1",
        "/v1x",
        "/v2/repository",
        "/static",
        "//predict",
        "/docs/",
        "",
        "*",
    ],
)
def test_a_path_that_nobody_has_placed_needs_admin(path: str) -> None:
    assert scope_of(path) == ADMIN


@pytest.mark.parametrize("kind", WRONG)
def test_without_a_valid_key_nothing_is_served(client: Client, app: FastAPI, clock: Clock, kind: str) -> None:
    guarded = Client(app, client._runner)
    texts: set[str] = set()
    for path in [concrete(path) for path, scope in SCOPES.items() if scope] + ["/nothing", "/v2/nothing", "/predict/"]:
        for method in METHODS:
            clock.now_s += 60.0
            response = guarded.request(method, path, headers=WRONG[kind], content=b"")
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == 'Bearer realm="lipcert"'
            media_type = "application/json" if path.startswith("/v1/") else "application/problem+json"
            assert response.headers["content-type"] == media_type
            texts |= {response.json()["detail"]} if method != "HEAD" else set()
    # Which part of a key is wrong is not said.
    assert len(texts) == 1


@pytest.mark.parametrize("scope", KEYS)
def test_a_key_serves_the_paths_of_its_scope_alone(client: Client, app: FastAPI, scope: str) -> None:
    guarded = Client(app, client._runner)
    headers = {"Authorization": f"bearer {KEYS[scope][0]}"}
    for path, needed in SCOPES.items():
        for method in METHODS:
            response = guarded.request(method, concrete(path), headers=headers)
            if needed in (None, scope) or scope == ADMIN:
                assert response.status_code not in (401, 403), (method, path)
            else:
                assert response.status_code == 403, (method, path)
                assert method == "HEAD" or f"scope {needed}" in response.json()["detail"]
                assert f'scope="{needed}"' in response.headers["www-authenticate"]


def test_both_headers_are_answered_as_without_keys(client: Client, app: FastAPI) -> None:
    guarded = Client(app, client._runner)
    content, headers = npy(np.zeros((1, HEIGHT, WIDTH))), {"Content-Type": "application/x-npy"}
    plain = client.post("/predict", content=content, headers=headers)
    for key in ({"X-API-Key": KEYS[PREDICT][0]}, {"Authorization": f"Bearer {KEYS[PREDICT][0]}"}):
        assert guarded.post("/predict", content=content, headers=headers | key).content == plain.content


def test_the_scheme_of_a_proxy_does_not_hide_a_key(client: Client, app: FastAPI) -> None:
    headers = {"Authorization": "Basic cHJveHk6cHJveHk=", "X-API-Key": KEYS[PREDICT][0]}
    assert Client(app, client._runner).get("/models", headers=headers).status_code == 200


_Headers = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"x-api-key", b"cookie", b"content-type"]),
        st.one_of(
            st.binary(max_size=80),
            st.sampled_from([value.encode() for headers in WRONG.values() for value in headers.values()]),
        ),
    ),
    max_size=4,
)
_VALID = {key.encode() for key, _ in KEYS.values()}
_SPY_ACCESS = access_of(Settings(api_keys=LINES))


@given(
    st.one_of(st.sampled_from([concrete(path) for path, scope in SCOPES.items() if scope]), st.text(max_size=20)),
    st.sampled_from(METHODS),
    _Headers,
)
def test_no_request_without_a_valid_key_reaches_the_application(
    path: str, method: str, headers: list[tuple[bytes, bytes]]
) -> None:
    reached: list[str] = []
    statuses: list[int] = []

    async def spy(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])

    async def receive() -> dict[str, Any]:
        raise AssertionError("a body is read without a key")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    assert _SPY_ACCESS is not None
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "client": ("192.0.2.1", 1)}
    asyncio.run(AccessMiddleware(spy, _SPY_ACCESS)(scope, receive, send))
    sent = [
        value.removeprefix(b"Bearer ").strip() for name, value in headers if name in (b"authorization", b"x-api-key")
    ]
    if scope_of(path) is None or set(sent) & _VALID:
        return
    assert reached == []
    assert statuses == [401]


def test_many_wrong_keys_are_429_and_the_right_one_is_served(
    client: Client, app: FastAPI, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    guarded = Client(app, client._runner)
    with caplog.at_level(logging.WARNING):
        statuses = [guarded.get("/models", headers=WRONG["a wrong secret"]).status_code for _ in range(100)]
    assert statuses == [401] * 20 + [429] * 80
    refused = guarded.get("/models")
    assert refused.headers["retry-after"] == "1"
    assert guarded.get("/models", headers={"X-API-Key": KEYS[PREDICT][0]}).status_code == 200
    (record,) = (record for record in caplog.records if record.name == "service.api.access")
    assert "127.0.0.1" in record.getMessage()
    assert KEYS[ADMIN][0][:-8] not in record.getMessage()


def test_a_rate_limits_each_key_and_each_address(
    client: Client, classifiers: Mapping[str, Classifier], clock: Clock
) -> None:
    settings = Settings(default_model="grey", api_keys=LINES, rate_per_key=0.5, rate_burst=3)
    limited = Client(create_app(settings, classifiers), client._runner)
    headers = {"X-API-Key": KEYS[PREDICT][0]}
    assert [limited.get("/models", headers=headers).status_code for _ in range(5)] == [200] * 3 + [429] * 2
    refused = limited.get("/models", headers=headers)
    assert refused.json()["type"] == "urn:problem-type:lipcert:rate-limit"
    assert refused.headers["retry-after"] == "2"
    assert len(refused.content) < 300
    assert limited.get("/models", headers={"X-API-Key": KEYS[ADMIN][0]}).status_code == 200
    clock.now_s += 2.0
    assert limited.get("/models", headers=headers).status_code == 200

    by_address = Client(
        create_app(Settings(default_model="grey", rate_per_address=1, rate_burst=2), classifiers), client._runner
    )
    assert [by_address.get("/models").status_code for _ in range(3)] == [200, 200, 429]
    assert by_address.get("/v2/nothing").json()["error"] == by_address.get("/models").json()["detail"]
    # Probes are not limited: who is busy must not be restarted.
    assert {by_address.get("/health/ready").status_code for _ in range(10)} == {200}


def test_refusals_are_counted(client: Client, app: FastAPI) -> None:
    guarded = Client(app, client._runner)
    guarded.get("/models")
    text = guarded.get("/metrics", headers={"X-API-Key": KEYS[METRICS][0]}).text
    assert 'lipcert_http_requests_total{method="GET",route="unmatched",status="401"} 1.0' in text


def test_without_keys_and_limits_there_is_no_middleware(classifiers: Mapping[str, Classifier]) -> None:
    app = create_app(Settings(default_model="grey"), classifiers)
    assert [middleware.cls.__name__ for middleware in app.user_middleware] == ["MetricsMiddleware"]
    assert access_of(Settings(rate_per_key=5.0)) is None
    assert access_of(Settings(rate_per_address=5.0)) is not None


def test_the_document_names_keys_and_refusals_where_they_are(
    client: Client, app: FastAPI, classifiers: Mapping[str, Classifier]
) -> None:
    document = Client(app, client._runner).get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) is (SCOPES[path] is not None)
            assert ({"401", "403", "429"} <= set(operation["responses"])) is (SCOPES[path] is not None)
    plain = client.get("/openapi.json").json()
    assert "securitySchemes" not in plain["components"]
    assert "401" not in str(plain["paths"])


def test_pages_of_named_origins_may_send_requests(client: Client, classifiers: Mapping[str, Classifier]) -> None:
    settings = Settings(
        default_model="grey", api_keys=LINES, cors_origins="https://one.example, https://two.example:8443"
    )
    crossed = Client(create_app(settings, classifiers), client._runner)
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-api-key"}
    for origin, allowed in (("https://two.example:8443", True), ("https://three.example", False)):
        preflight = crossed.request("OPTIONS", "/predict", headers={"Origin": origin, **asked})
        assert (preflight.status_code == 200) is allowed
        assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed
        # A refusal can be read by the page as well.
        refused = crossed.get("/models", headers={"Origin": origin})
        assert refused.status_code == 401
        assert (refused.headers.get("access-control-allow-origin") == origin) is allowed
    assert "access-control-allow-origin" not in client.get("/models", headers={"Origin": "https://one.example"}).headers


def test_a_key_of_a_file_is_taken_from_the_settings(
    client: Client, classifiers: Mapping[str, Classifier], tmp_path: Path
) -> None:
    key, line = new_key("ci", [PREDICT])
    (tmp_path / "keys").write_text(line)
    settings = Settings(default_model="grey", api_keys_file=tmp_path / "keys")
    guarded = Client(create_app(settings, classifiers), client._runner)
    assert guarded.get("/models").status_code == 401
    assert guarded.get("/models", headers={"X-API-Key": key}).status_code == 200
