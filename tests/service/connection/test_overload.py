"""Floods and clients that leave, over real sockets and with a real application."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from client import HEIGHT, WIDTH
from encoding import encode
from live_server import PATIENCE_S, LiveServer, parse_answers, read_all, read_answer

from service.api.app import create_app
from service.inference.classifier import Classifier, View
from service.settings import Settings
from tests.service.inference.flood import flood, post

PNG = encode(np.zeros((HEIGHT, WIDTH), np.uint8))
READY = b"GET /health/ready HTTP/1.1\r\nHost: test\r\n\r\n"


def server_of(classifier: Classifier, **settings: Any) -> LiveServer:
    app = create_app(Settings(default_model="grey", workers=1, **settings), {"grey": classifier})
    return LiveServer(app, refuse=app.state.refuse)


def counted(server: LiveServer, status: int) -> int:
    """Return how many requests of `/predict` the metrics have with this status."""
    text = server.ask(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").body.decode()
    name = f'lipcert_http_requests_total{{method="POST",route="/predict",status="{status}"}} '
    return next((int(float(line[len(name) :])) for line in text.splitlines() if line.startswith(name)), 0)


@pytest.mark.parametrize("obeys", [False, True])
def test_in_a_flood_every_request_has_an_answer_and_a_count_and_others_are_served(
    classifiers: Mapping[str, Classifier], obeys: bool
) -> None:
    with server_of(classifiers["grey"]) as server:
        server.ask(post(PNG, "image/png"))
        seen = asyncio.run(flood(("127.0.0.1", server.port), post(PNG, "image/png"), 200, 1.5, obeys, PATIENCE_S))
        assert set(seen.seconds) == {200, 503}
        assert counted(server, 200) == len(seen.seconds[200]) + 1
        assert counted(server, 503) == len(seen.seconds[503])
        # Health is never refused.
        assert server.ask(READY).status == 200


def test_200_uploads_that_do_not_arrive_leave_a_client_alone(classifiers: Mapping[str, Classifier]) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nContent-Length: 16777216\r\n\r\n"
    with server_of(classifiers["grey"]) as server:
        slow = [server.connect() for _ in range(200)]
        for client in slow:
            client.sendall(head + bytes(100))
        with server.connect() as normal:
            for _ in range(50):
                normal.sendall(post(PNG, "image/png"))
                assert read_answer(normal).status == 200
        for client in slow:
            client.close()


class Searching(Classifier):
    """A classifier whose searches go on until they are abandoned, and which counts their gradients."""

    def __init__(self, real: Classifier) -> None:
        self.__dict__.update(real.__dict__)
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.gradients = 0
        self._view: View | None = None

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        real = super().view(sent_shape, resize)
        if self._view is None:
            parts = (real.model, real.transport, real.certificate, real.single_output, real.preprocessing)
            self._view = SearchingView(*parts)
            object.__setattr__(self._view, "classifier", self)
        return self._view


class SearchingView(View):
    classifier: Searching

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.classifier.gradients += 1
        self.classifier.reached.set()
        assert self.classifier.opened.wait(PATIENCE_S)
        return super().margin_gradient(image_NCHW, weights_NK)


@pytest.fixture
def searching(classifiers: Mapping[str, Classifier]) -> Iterator[Searching]:
    searching = Searching(classifiers["grey"])
    searching.opened.set()
    yield searching
    searching.opened.set()


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("leave", [_reset, socket.socket.close])
@pytest.mark.parametrize("query", ["counterfactual=true", "proof=best"])
def test_the_search_of_a_client_that_leaves_ends_and_its_place_is_free(
    searching: Searching, leave: Callable[[socket.socket], None], query: str
) -> None:
    with server_of(searching, max_requests=1) as server:
        # Its examples have gone through by now.
        searching.reached.clear()
        searching.opened.clear()
        client = server.connect()
        client.sendall(post(PNG, "image/png", f"/predict?{query}"))
        assert searching.reached.wait(PATIENCE_S)
        assert server.ask(post(PNG, "image/png")).status == 503
        leave(client)
        gradients = searching.gradients
        # Of the wrong media type: 503 without a place, and 415 with one.
        while server.ask(post(PNG, "image/png", "/v2/models/grey/infer")).status == 503:
            threading.Event().wait(0.05)
        searching.opened.set()
        assert server.ask(post(PNG, "image/png")).status == 200
        assert searching.gradients == gradients
        assert counted(server, 400) == 1


def test_a_client_that_closes_its_side_has_its_answer(classifiers: Mapping[str, Classifier]) -> None:
    with server_of(classifiers["grey"]) as server, server.connect() as client:
        client.sendall(post(PNG, "image/png"))
        client.shutdown(socket.SHUT_WR)
        (answer,) = parse_answers(read_all(client))
        assert answer.status == 200
