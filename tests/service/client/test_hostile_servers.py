"""A client of a server that is not as it should be: every call ends, in bounded time, with an error that says why."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from scripted_server import ScriptedServer, problem, response

from service.client import AsyncClient, Client, ServiceError, UnreachableError, UnreadableAnswerError
from service.client import clients as module
from service.client import retries as retries_module
from service.client.retries import Retries, retry_after_s

READY = response("200 OK", json.dumps({"status": "ready", "provider": "CPU", "new_field": 1}).encode())
MODELS = response("200 OK", b'{"models": [], "broken": [], "new_field": {"a": 1}}')
BUSY = problem("503 Service Unavailable", "overloaded", "Retry-After: 0")


def ask(server: ScriptedServer, **options: Any) -> Any:
    with Client(server.url, **options) as client:
        return client.models()


def ask_async(server: ScriptedServer, **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(server.url, **options) as client:
            return await client.models()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries_module, "FIRST_PAUSE_S", 0.01)


BOTH = pytest.mark.parametrize("ask", [ask, ask_async])


@BOTH
def test_a_refusal_for_now_is_asked_again_until_it_is_answered(ask: Callable[..., Any]) -> None:
    limited = problem("429 Too Many Requests", "rate-limit", "Retry-After: 0")
    gateway = response("502 Bad Gateway", b"<html>nginx</html>", "Retry-After: 0", media_type="text/html")
    with ScriptedServer(BUSY, limited, gateway, b"", MODELS) as server:
        answer = ask(server)
    assert len(server.requests) == 5
    assert answer.models == []
    assert answer.model_dump()["new_field"] == {"a": 1}


@BOTH
def test_tries_are_bounded_and_the_last_problem_is_raised(ask: Callable[..., Any]) -> None:
    with ScriptedServer(BUSY) as server, pytest.raises(ServiceError) as raised:
        ask(server, retries=2)
    assert len(server.requests) == 3
    assert (raised.value.status, raised.value.detail) == (503, "D")
    assert raised.value.type == "urn:problem-type:lipcert:overloaded"
    assert str(pickle.loads(pickle.dumps(raised.value))) == "503 T: D"


@pytest.mark.parametrize("pause", ["3600", "99999999999999999999999", "a date"])
def test_a_server_that_asks_for_a_long_pause_is_not_asked_again(pause: str) -> None:
    started = time.monotonic()
    pause = formatdate(time.time() + 3600, usegmt=True) if pause == "a date" else pause
    with (
        ScriptedServer(problem("503 Service Unavailable", "overloaded", f"Retry-After: {pause}")) as server,
        pytest.raises(ServiceError) as raised,
    ):
        ask(server)
    assert len(server.requests) == 1
    assert time.monotonic() - started < 10
    assert raised.value.retry_after_s is not None
    assert raised.value.retry_after_s > 3500


@pytest.mark.parametrize("pause", ["soon", "-1", "1.5", "", "٣"])
def test_an_invalid_pause_is_passed_over(pause: str) -> None:
    assert retry_after_s(pause) is None


def test_pauses_double_with_jitter_and_are_never_shorter_than_the_server_asks_for() -> None:
    retries = Retries(most=30, longest_s=8.0)
    for failures in range(1, 31):
        backoff = min(8.0, 0.01 * 2 ** (failures - 1))
        pauses = [retries.pause_s(failures, None) for _ in range(50)]
        assert all(pause is not None and backoff / 2 <= pause <= backoff for pause in pauses)
        assert len(set(pauses)) > 1
        asked = retries.pause_s(failures, 7.5)
        assert asked is not None
        assert 7.5 <= asked <= 7.5 + backoff
    assert retries.pause_s(31, None) is None
    assert retries.pause_s(1, 8.1) is None
    assert Retries(10**6, 8.0).pause_s(10**6, None) is not None


@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "404 Not Found", "413 X", "500 X", "504 X"])
def test_other_errors_are_not_asked_again(status: str) -> None:
    with ScriptedServer(problem(status, "input", "Retry-After: 0")) as server, pytest.raises(ServiceError):
        ask(server)
    assert len(server.requests) == 1


def test_a_model_that_waits_for_its_operator_is_not_asked_again() -> None:
    # The service sends Retry-After with every refusal that a pause ends.
    with (
        ScriptedServer(problem("503 Service Unavailable", "model-not-available")) as server,
        pytest.raises(ServiceError),
    ):
        ask(server)
    assert len(server.requests) == 1


@BOTH
@pytest.mark.parametrize(
    "reply",
    [
        MODELS[:-10],
        MODELS[:40],
        b"not HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_a_truncated_answer_is_an_error_of_the_connection(ask: Callable[..., Any], reply: bytes) -> None:
    with ScriptedServer(reply) as server, pytest.raises(UnreachableError, match=r"http://127\.0\.0\.1:\d+/models: "):
        ask(server, retries=1)
    assert len(server.requests) == 2


@BOTH
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (response("200 OK", b"<html>Log in</html>", media_type="text/html"), "text/html: <html>Log in</html>"),
        (response("200 OK", b'{"models": [{"name": "a"'), "not one of this service"),
        (response("200 OK", b"[]"), "not one of this service"),
        (response("200 OK", b"[" * 100_000), "not one of this service"),
        (response("200 OK", b'{"models": 7, "broken": []}'), "models"),
        (response("204 No Content"), "status 204"),
        (response("302 Found", b"", "Location: http://elsewhere.invalid/"), "redirects to http://elsewhere.invalid/"),
        (response("307 T", b"", "Location: /v9"), "give the URL of the service itself"),
        (response("304 Not Modified"), "redirects to nowhere"),
    ],
)
def test_an_answer_of_something_else_says_what_it_is(ask: Callable[..., Any], reply: bytes, reason: str) -> None:
    with ScriptedServer(reply) as server, pytest.raises(UnreadableAnswerError) as raised:
        ask(server)
    assert len(server.requests) == 1
    assert reason in str(raised.value)
    assert len(str(raised.value)) < 400


def test_the_html_page_of_a_proxy_becomes_a_problem_that_quotes_it() -> None:
    page = b"<html>\x1b[31m\n" + b"no upstream " * 100_000
    with (
        ScriptedServer(response("504 Gateway Time-out", page, media_type="text/html")) as server,
        pytest.raises(ServiceError) as raised,
    ):
        ask(server)
    error = raised.value
    assert (error.type, error.status, error.problem.title) == ("about:blank", 504, "Gateway Timeout")
    assert error.detail.startswith("text/html: <html>?[31m no upstream")
    assert len(error.detail) < 300


def test_a_problem_document_that_lies_about_its_status_or_is_damaged_has_the_status_of_the_response() -> None:
    lies = json.dumps({"type": "a", "title": "b", "status": 200, "detail": "d"}).encode()
    for body in (lies, b"{", b"[]", b""):
        with (
            ScriptedServer(response("403 X", body, media_type="application/problem+json")) as server,
            pytest.raises(ServiceError) as raised,
        ):
            ask(server)
        assert raised.value.status == 403


@BOTH
def test_a_slow_body_ends_with_the_time_of_the_try(ask: Callable[..., Any]) -> None:
    def drip(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            client.sendall(b" ")
            time.sleep(0.1)

    started = time.monotonic()
    with ScriptedServer(drip) as server:
        with pytest.raises(UnreachableError, match=r"not complete after 0\.5 s"):
            ask(server, timeout_s=0.5, retries=0)
        assert time.monotonic() - started < 3


@BOTH
def test_a_silent_server_ends_with_the_time_of_the_try(ask: Callable[..., Any]) -> None:
    with ScriptedServer(lambda client: time.sleep(1.5)) as server, pytest.raises(UnreachableError):
        ask(server, timeout_s=0.2, retries=0)


def test_an_endless_answer_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ANSWER_BYTES", 1_000_000)

    def flood(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        while True:
            client.sendall(b" " * 65536)

    with ScriptedServer(flood) as server, pytest.raises(UnreadableAnswerError, match="more than 1000000 bytes"):
        ask(server)


def test_a_closed_port_is_unreachable_and_a_probe_asks_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started = time.monotonic()
    with Client(url) as client, pytest.raises(UnreachableError, match="refused"):
        client.ready()
    assert time.monotonic() - started < 0.4
    with Client(url, retries=1) as client, pytest.raises(UnreachableError, match="refused"):
        client.models()


def test_a_service_that_is_not_ready_is_an_answer_and_a_proxy_without_one_is_not() -> None:
    body = json.dumps({"status": "not ready", "provider": None, "reasons": ["it stops"]}).encode()
    html = response("503 X", b"<html>", media_type="text/html")
    with ScriptedServer(READY, response("503 Service Unavailable", body), html) as server, Client(server.url) as client:
        assert client.ready().status == "ready"
        assert client.ready().reasons == ["it stops"]
        with pytest.raises(ServiceError):
            client.ready()
    assert len(server.requests) == 3


def test_another_number_of_answers_than_images_is_refused() -> None:
    with (
        ScriptedServer(response("200 OK", b'{"predictions": []}')) as server,
        Client(server.url) as client,
        pytest.raises(UnreadableAnswerError, match="0 predictions for 2 images"),
    ):
        list(client.predict_many([b"a", b"b"]))


def test_key_and_prefix_reach_the_server_and_the_key_no_error() -> None:
    with (
        ScriptedServer(problem("401 Unauthorized", "unauthorized")) as server,
        Client(server.url.replace("//", "//user:secret@") + "/prefix/", api_key="lip_123") as client,
        pytest.raises(ServiceError) as raised,
    ):
        client.model("a/b c")
    (request,) = server.requests
    assert request.startswith(b"GET /prefix/models/a%2Fb%20c HTTP/1.1\r\n")
    assert b"x-api-key: lip_123" in request.lower()
    assert "lip_123" not in f"{raised.value!r} {client!r}"
    with Client(f"{server.url.replace('//', '//user:secret@')}", retries=0) as client:
        with pytest.raises(UnreachableError) as gone:
            client.models()
        assert "secret" not in str(gone.value)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a/?b=1", "http://a/#b", 7])
def test_a_url_that_is_not_of_a_service_is_refused_at_once(url: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Client(url)


@pytest.mark.parametrize("key", ["a\r\nb", "a b", "schlüssel"])
def test_a_key_that_is_no_header_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Client(api_key=key)
