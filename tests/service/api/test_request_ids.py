"""Every answer of the application names its request, and so do problem documents and the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from client import Client
from encoding import npy

from service.api.app import create_app
from service.api.refusals import Refusals
from service.inference.classifier import Classifier
from service.settings import Settings

_IMAGE = npy(np.full((1, 4, 5), 0.5))
_NPY = {"Content-Type": "application/x-npy"}
_MADE = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize("number", ["a", "x" * 128, "~!\"\\{}'`<>;", "7d1f0a"])
def test_the_identifier_of_the_client_is_in_answers_and_problems(client: Client, number: str) -> None:
    for method, path, body, status in (
        ("POST", "/predict", _IMAGE, 200),
        ("POST", "/predict", b"no array", 422),
        ("POST", "/predict", b"", 400),
        ("GET", "/nothing", b"", 404),
        ("DELETE", "/predict", b"", 405),
        ("GET", "/models/absent", b"", 404),
        ("GET", "/health/live", b"", 200),
        ("OPTIONS", "/predict", b"", 204),
    ):
        answer = client.request(method, path, content=body, headers={**_NPY, "X-Request-ID": number})
        assert answer.status_code == status, answer.text
        assert answer.headers.get_list("X-Request-ID") == [number]
        if status >= 400:
            assert answer.json()["request_id"] == number
            assert int(answer.headers["Content-Length"]) == len(answer.content)


@pytest.mark.parametrize("number", ["", "x" * 129, "a b", "\tx", "é", "a\x7f"])
def test_another_identifier_is_replaced(client: Client, number: str) -> None:
    sent = [(b"X-Request-ID", number.encode("latin-1"))]
    answers = [client.request("GET", "/nothing", headers=sent) for _ in range(2)]
    made = [answer.headers["X-Request-ID"] for answer in answers]
    assert all(map(_MADE.fullmatch, made))
    assert made[0] != made[1]
    assert [answer.json()["request_id"] for answer in answers] == made


def test_refusals_of_access_are_one_response_and_name_each_request(
    classifiers: Mapping[str, Classifier], runner: Any
) -> None:
    app = create_app(Settings(default_model="grey", rate_per_address=1e-6, rate_burst=1), classifiers)
    limited = Client(app, runner)
    assert limited.post("/predict", content=_IMAGE, headers=_NPY).status_code == 200
    for number in ("first", "second"):
        answer = limited.post("/predict", content=_IMAGE, headers={**_NPY, "X-Request-ID": number})
        assert answer.status_code == 429
        assert answer.headers.get_list("X-Request-ID") == [answer.json()["request_id"]] == [number]
    assert 'lipcert_refusals_total{reason="rate-limit"} 2.0' in app.state.service.metrics.exposition().decode()


def test_a_failure_names_its_request_in_the_answer_and_in_the_log(
    classifiers: Mapping[str, Classifier], runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(default_model="grey"), classifiers)
    monkeypatch.setattr("service.api.routes.describe", lambda *_: 1 / 0)
    seen: list[str] = []

    async def record(scope: Any, receive: Any, send: Any) -> None:
        from service.logs import request_id

        try:
            await app(scope, receive, send)
        except ZeroDivisionError:
            seen.append(request_id.get())

    answer = Client(record, runner).get("/models", headers={"X-Request-ID": "mine"})  # type: ignore[arg-type]
    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == "mine"
    assert seen == ["mine"]


def test_a_refusal_before_the_application_names_its_request(
    classifiers: Mapping[str, Classifier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(default_model="grey"), classifiers)
    service = app.state.service
    monkeypatch.setattr(service.batcher, "refusal", lambda _: ("LIPCERT_X", 1))
    refusals = Refusals(service)
    scope = {"method": "POST", "path": "/predict", "client": None, "headers": [(b"x-request-id", b"mine")]}
    answer = refusals.refuse(scope)
    assert answer is not None
    assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\nx-request-id: mine\r\n")
    refusals.refused(answer)
    assert 'lipcert_refusals_total{reason="overloaded"} 1.0' in service.metrics.exposition().decode()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
