"""The queueing model of docs/scaling.md against queues with known answers, and its client against a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks.scaling.load import closed_loop, open_loop
from benchmarks.scaling.queueing import InTurn, Node, Service, at_random, better_of_two, simulate

EXPONENTIAL = -np.log1p(-(np.arange(10_000) + 0.5) / 10_000)
PAUSE_S = 0.02


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_one_request_at_a_time_with_exponential_durations_is_the_known_queue(load: float) -> None:
    """M/M/1: the time in the system is exponential, with mean 1 / (mu - lambda)."""
    service = Service(0.0, 0.001, EXPONENTIAL / EXPONENTIAL.mean(), most=1)
    seconds = simulate([service], load * service.capacity, 40_000)
    mean_s = 1.0 / (service.capacity * (1.0 - load))
    np.testing.assert_allclose(seconds.mean(), mean_s, rtol=0.05)
    np.testing.assert_allclose(np.quantile(seconds, [0.5, 0.99]), mean_s * np.log([2.0, 100.0]), rtol=0.08)


def test_constant_durations_wait_half_as_long() -> None:
    """M/D/1, by the formula of Pollaczek and Khinchine: the mean wait is rho s / (2 (1 - rho))."""
    service = Service(0.0, 0.001, np.ones(1), most=1)
    seconds = simulate([service], 800.0, 40_000)
    np.testing.assert_allclose(seconds.mean() - 0.001, 0.8 * 0.001 / (2 * 0.2), rtol=0.05)


def test_requests_that_wait_together_share_a_batch() -> None:
    service = Service(0.01, 0.001, np.ones(1), around_s=0.5)
    seconds = simulate([service], 500.0, 20_000)
    # A batch of n takes 10 + n ms, in which 0.5 n / ms arrive: n settles at 10.
    assert 0.52 < np.median(seconds) < 0.54
    assert seconds.max() < 0.6


def test_the_better_of_two_is_the_one_with_fewer_requests() -> None:
    service = Service(0.001, 0.0001, np.ones(1))
    quantiles = [
        np.quantile(simulate([service] * 20, 20 * 0.8 * service.capacity, 20_000, policy), 0.99)
        for policy in (better_of_two, at_random)
    ]
    assert quantiles[0] < quantiles[1]
    nodes = [Node(None, service, np.random.default_rng(0)) for _ in range(3)]  # type: ignore[arg-type]
    in_turn, random = InTurn(), np.random.default_rng(0)
    assert [in_turn(nodes, random) for _ in range(4)] == [*nodes, nodes[0]]
    nodes[0].ahead = 5
    assert all(better_of_two(nodes[:1] + nodes[1:2], random) in nodes for _ in range(10))


class Slow(BaseHTTPRequestHandler):
    """Answers each request after a pause, in two pieces."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(PAUSE_S)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"o")
        self.wfile.write(b"k")

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_an_open_loop_sends_whatever_the_server_does(port: int) -> None:
    seconds = open_loop(port, [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], 400.0, 0.5, seed=1)
    assert len(seconds) == 200
    assert (seconds >= PAUSE_S).all()


def test_a_closed_loop_has_one_request_of_each_client_in_progress(port: int) -> None:
    seconds = closed_loop(port, [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], 3, 0.3)
    assert (seconds >= PAUSE_S).all()
    assert 3 <= len(seconds) <= 3 * (0.3 / PAUSE_S + 2)
