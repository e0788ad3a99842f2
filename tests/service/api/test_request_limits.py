"""Requests under load: limits, deadlines, clients that disconnect, and an event loop that stays free."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from client import HEIGHT, WIDTH, predict_scope
from encoding import encode, npy
from fastapi import FastAPI

from service.api.app import create_app
from service.inference import admission
from service.inference.classifier import Classifier, Prediction, View
from service.settings import Settings

LONG_S = 60.0
IMAGE = {"Content-Type": "image/png"}
PNG = encode(np.zeros((HEIGHT, WIDTH), np.uint8))


class Held(Classifier):
    """A classifier whose passes wait for an event."""

    def __init__(self, real: Classifier) -> None:
        self.__dict__.update(real.__dict__)
        self.reached, self.opened = threading.Event(), threading.Event()
        self._held: View | None = None

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        real = super().view(sent_shape, resize)
        if self._held is None:
            self._held = HeldView(real.model, real.transport, real.certificate, real.single_output, real.preprocessing)
            object.__setattr__(self._held, "held", self)
        return self._held


class HeldView(View):
    held: Held

    def predict(self, image_NCHW: np.ndarray) -> list[Prediction]:
        self.held.reached.set()
        assert self.held.opened.wait(LONG_S)
        return super().predict(image_NCHW)


@pytest.fixture
def held(classifiers: Mapping[str, Classifier]) -> Held:
    held = Held(classifiers["grey"])
    held.opened.set()
    return held


def run(app: FastAPI, test: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def within() -> None:
        # As for a client: the server logs an exception of the application, and sends its answer.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=LONG_S) as http:
            await asyncio.wait_for(test(http), LONG_S)

    asyncio.run(within())


def app_of(held: Held, **settings: Any) -> FastAPI:
    app = create_app(Settings(default_model="grey", workers=1, **settings), {"grey": held})
    # Its examples have gone through by now.
    held.reached.clear()
    held.opened.clear()
    return app


def predict(http: httpx.AsyncClient, **headers: str) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(http.post("/predict", content=PNG, headers=IMAGE | headers))


async def reached(held: Held) -> None:
    assert await asyncio.to_thread(held.reached.wait, LONG_S)


def assert_is_busy(response: httpx.Response, kind: str) -> None:
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"urn:problem-type:lipcert:{kind}"
    assert response.json()["instance"].startswith("/predict")


def test_the_event_loop_answers_while_every_worker_is_stuck(held: Held) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        slow = predict(http)
        await reached(held)
        for path in ("/health/live", "/health/ready", "/metrics", "/models", "/v2/health/live"):
            assert (await http.get(path)).status_code == 200
        held.opened.set()
        assert (await slow).status_code == 200

    run(app_of(held), test)


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize(("deadline_s", "prefer"), [(0.5, "wait=1000"), (0.5, ""), (1000.0, "wait=0")])
def test_prefer_wait_shortens_the_deadline_and_never_lengthens_it(
    held: Held, path: str, deadline_s: float, prefer: str
) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        headers = {"Content-Type": "application/x-npy", "Prefer": f"respond-async, {prefer}"}
        pixels = np.zeros((1, HEIGHT, WIDTH), np.uint8)
        response = await http.post(path, content=npy(pixels), headers=headers)
        assert_is_busy(response, "deadline")
        held.opened.set()
        # Neither is the worker lost nor the place of the request.
        assert (await http.post("/predict", content=PNG, headers=IMAGE)).status_code == 200

    run(app_of(held, deadline_s=deadline_s, max_requests=1), test)


class Unread(httpx.AsyncByteStream):
    """A body that nobody may read."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/v2/models/grey/infer", "/v1/models/grey:predict"])
def test_who_does_not_fit_in_is_refused_before_its_body_is_read(held: Held, path: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": "100"}

    async def test(http: httpx.AsyncClient) -> None:
        slow = predict(http)
        await reached(held)
        assert_is_busy(await predict(http), "overloaded")
        request = http.build_request("POST", path, headers=headers)
        request.stream = Unread()
        refused = await http.send(request)
        assert refused.status_code == 503
        assert refused.json()["type"] == "urn:problem-type:lipcert:overloaded"
        held.opened.set()
        assert (await slow).status_code == 200
        assert (await predict(http)).status_code == 200

    run(app_of(held, max_requests=1), test)


def test_declared_lengths_take_no_room(held: Held) -> None:
    app = app_of(held, max_body_bytes=1000, max_waiting_bytes=1000)
    held.opened.set()

    async def test(http: httpx.AsyncClient) -> None:
        declared = {"content-type": "image/png", "content-length": "1000"}
        silent = [asyncio.create_task(call(app, [PART, None], declared)) for _ in range(20)]
        await asyncio.sleep(0)
        assert (await predict(http)).status_code == 200
        for task in silent:
            task.cancel()

    run(app, test)


def test_a_body_whose_next_bytes_find_no_room_is_refused_and_nothing_of_it_stays(held: Held) -> None:
    app = app_of(held, max_waiting_bytes=1000, client_share=1.0)
    held.opened.set()

    async def test(http: httpx.AsyncClient) -> None:
        large = {"type": "http.request", "body": bytes(900), "more_body": True}
        waiting = asyncio.create_task(call(app, [large, None]))
        await asyncio.sleep(0)
        start, body = await call(app, [PART, large, None])
        assert start["status"] == 503
        assert b"LIPCERT_MAX_WAITING_BYTES" in body["body"]
        assert (await predict(http)).status_code == 200
        waiting.cancel()

    run(app, test)


def test_one_address_that_holds_its_share_is_refused_and_others_are_not(held: Held) -> None:
    app = app_of(held, max_requests=4)
    held.opened.set()

    async def test(http: httpx.AsyncClient) -> None:
        silent = [asyncio.create_task(call(app, [PART, None])) for _ in range(2)]
        await asyncio.sleep(0)
        start, body = await call(app, [PART, None])
        assert start["status"] == 503
        assert b"LIPCERT_CLIENT_SHARE" in body["body"]
        # From another address, 127.0.0.1.
        assert (await predict(http)).status_code == 200
        for task in silent:
            task.cancel()

    run(app, test)


def test_a_body_that_arrives_too_slowly_gets_408(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_GRACE_S", 0.1)
    app = app_of(held, min_rate=1e6)

    async def test(http: httpx.AsyncClient) -> None:
        start, body = await call(app, [PART, None])
        assert start["status"] == 408
        assert b"LIPCERT_MIN_RATE" in body["body"]

    run(app, test)


def test_a_refusal_before_a_task_is_the_one_of_the_application(held: Held) -> None:
    app = app_of(held, max_requests=1)
    routes = {
        "/predict": "/predict",
        "/predict/batch": "/predict/batch",
        "/v2/models/grey/infer": "/v2/models/{name}/infer",
        "/v2/models/grey/explain": "/v2/models/{name}/explain",
        f"/v2/models/grey/versions/{held.digest}/infer": "/v2/models/{name}/versions/{version}/infer",
        "/v1/models/grey:predict": "/v1/models/{name}:predict",
        "/v1/models/grey:explain": "/v1/models/{name}:explain",
    }

    def scope(path: str, method: str = "POST") -> dict[str, Any]:
        return {
            "type": "http",
            "method": method,
            "path": path,
            "client": ("test", 1),
            "headers": [(b"x-request-id", b"1")],
        }

    async def test(http: httpx.AsyncClient) -> None:
        refuse = app.state.refuse
        slow = predict(http)
        await reached(held)
        for path in routes:
            answer = refuse(scope(path))
            head, _, body = answer.partition(b"\r\n\r\n")
            expected = await http.post(
                path, content=PNG, headers={"Content-Type": "application/json", "X-Request-ID": "1"}
            )
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"connection: close" in head
            assert json.loads(body) | {"request_id": "1"} == expected.json()
            # The identifier stands in the header alone, so that the body is made once.
            for name, value in expected.headers.items():
                assert name == "content-length" or f"\r\n{name}: {value}".encode() in head
        for path in ("/health/live", "/health/ready", "/metrics", "/", "/docs", "/models", "/v2/models/grey"):
            assert refuse(scope(path, "GET")) is None
            assert refuse(scope(path)) is None
        text = (await http.get("/metrics")).text
        for path in routes.values():
            # Once by the application.
            assert f'lipcert_http_requests_total{{method="POST",route="{path}",status="503"}} 2.0' in text
        held.opened.set()
        assert (await slow).status_code == 200
        for path in routes:
            assert refuse(scope(path)) is None
            await asyncio.sleep(0)

    run(app, test)


def test_a_request_that_would_wait_longer_than_the_operator_permits_is_refused(held: Held) -> None:
    async def test(http: httpx.AsyncClient) -> None:
        slow = predict(http)
        await reached(held)
        response = await predict(http)
        assert_is_busy(response, "overloaded")
        assert "LIPCERT_MAX_WAIT_MS" in response.json()["detail"]
        held.opened.set()
        assert (await slow).status_code == 200
        assert (await predict(http)).status_code == 200

    run(app_of(held, max_wait_ms=0.001), test)


async def call(app: FastAPI, messages: list[Any], headers: Mapping[str, str] = IMAGE) -> list[Any]:
    """What the application sends about a request whose body comes in `messages`; None never comes."""
    sent: list[Any] = []

    async def receive() -> Any:
        message = messages.pop(0)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    await app(predict_scope(headers), receive, send)
    return sent


PART = {"type": "http.request", "body": PNG[:10], "more_body": True}
GONE = {"type": "http.disconnect"}


def test_a_body_that_never_ends_is_given_up_at_the_deadline(held: Held) -> None:
    app = app_of(held, deadline_s=0.5, max_requests=1)

    async def test(http: httpx.AsyncClient) -> None:
        start, body = await call(app, [PART, None])
        assert start["status"] == 503
        assert b"within 0.5 s" in body["body"]
        held.opened.set()
        assert (await predict(http)).status_code == 200

    run(app, test)


def test_every_end_of_a_request_gives_its_place_back(held: Held) -> None:
    app = app_of(held, max_requests=1, max_body_bytes=1000, deadline_s=LONG_S)
    held.opened.set()

    async def test(http: httpx.AsyncClient) -> None:
        async def there_is_a_place() -> None:
            assert (await predict(http)).status_code == 200

        await there_is_a_place()
        for content, status in ((b"GIF", 422), (b"", 400), (bytes(2000), 413)):
            assert (await http.post("/predict", content=content, headers=IMAGE)).status_code == status
            await there_is_a_place()
        await call(app, [PART, GONE])
        await there_is_a_place()
        for messages in ([PART, None], [{"type": "http.request", "body": PNG, "more_body": False}]):
            held.opened.clear()
            task = asyncio.create_task(call(app, messages))
            for _ in range(10):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            held.opened.set()
            await there_is_a_place()

    run(app, test)


def test_a_client_that_goes_leaves_its_neighbours_alone(held: Held) -> None:
    app = app_of(held)

    async def test(http: httpx.AsyncClient) -> None:
        gone = [asyncio.create_task(call(app, [PART, GONE])) for _ in range(3)]
        leaving = [predict(http) for _ in range(3)]
        staying = [predict(http) for _ in range(3)]
        await reached(held)
        for task in leaving:
            task.cancel()
        held.opened.set()
        assert [(await task).status_code for task in staying] == [200, 200, 200]
        assert [(await task)[0]["status"] for task in gone] == [400, 400, 400]

    run(app, test)


def test_an_unexpected_error_is_answered_500_and_raised_for_the_server_to_log(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_of(held)
    held.opened.set()

    def broken(_: Any) -> list[Prediction]:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(HeldView, "predict", lambda self, image_NCHW: broken(image_NCHW))

    async def test(http: httpx.AsyncClient) -> None:
        response = await predict(http)
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert "a defect" not in response.text
        metrics = (await http.get("/metrics")).text
        assert 'lipcert_http_requests_total{method="POST",route="/predict",status="500"} 1.0' in metrics

        with pytest.raises(ZeroDivisionError, match="a defect"):
            await call(app, [{"type": "http.request", "body": PNG}])

    run(app, test)
