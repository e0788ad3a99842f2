"""The parameters of the queueing model, and what the model has to predict, from a server on a processor of its own."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.scaling.load import closed_loop
from benchmarks.scaling.queueing import Service
from benchmarks.serving.processes import Server

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "models" / "zoo"
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
WARM_S = 2.0
_READY_S = 120.0


def requests_of(model: str, query: str = "") -> list[bytes]:
    """Return `POST /predict` with each sample of a model."""
    requests: list[bytes] = []
    for path in sorted((ZOO / model / "samples").glob("*.png")):
        content = path.read_bytes()
        lines = [f"POST /predict?model={model}{query} HTTP/1.1", "Host: bench", "Content-Type: image/png"]
        requests.append("\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""]).encode() + content)
    return requests


@contextmanager
def served(model: str, port: int, **settings: str) -> Iterator[Server]:
    """Serve a model on the first processor, and keep this process on the last one."""
    usable = sorted(os.sched_getaffinity(0))
    assert len(usable) > 1, "server and clients need a processor each"
    chosen = {"MODELS": str(ZOO), "DEFAULT_MODEL": model, "PROVIDER": "cpu", "PORT": str(port), "CLIENT_SHARE": "1"}
    # What is modelled is the queue, without its limit.
    chosen["MAX_WAIT_MS"] = "10000"
    environment = {f"LIPCERT_{name}": value for name, value in {**chosen, **settings}.items()}
    command = ["taskset", "-c", str(usable[0]), sys.executable, "-m", "service"]
    os.sched_setaffinity(0, {usable[-1]})
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            Server(command, environment, port, Path(folder) / "log", ROOT) as server,
        ):
            server.wait_ready("/health/ready", _READY_S)
            yield server
    finally:
        os.sched_setaffinity(0, usable)


def batches(port: int) -> tuple[float, float]:
    """Return the batches that a server has computed, and the images in them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10.0) as answer:
        text = answer.read().decode()
    count, images = (
        sum(map(float, re.findall(rf"^lipcert_batch_images_{kind}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
        for kind in ("count", "sum")
    )
    return count, images


def calibrate(port: int, requests: list[bytes], seconds: float) -> Service:
    """Return the model of a server, fitted to images of a batch and seconds of one, while `CLIENTS` take turns.

    With several clients the server is never idle: batches follow each other, and one takes the time over their number.
    The line through these points is fitted by relative errors. A single client gives the spread of durations, and what
    a request costs outside of the server.
    """
    points: list[tuple[float, float]] = []
    closed_loop(port, requests, CLIENTS[-1], WARM_S)
    for clients in CLIENTS:
        before, started = batches(port), time.perf_counter()
        taken = closed_loop(port, requests, clients, seconds)
        elapsed_s = time.perf_counter() - started
        count, images = (after - earlier for after, earlier in zip(batches(port), before, strict=True))
        points.append((images / count, elapsed_s / count))
        if clients == 1:
            alone = taken
    sizes, durations = np.array(points).T
    # Without the first: one client leaves the server idle while its answer is on the way.
    matrix = np.stack([1.0 / durations[1:], sizes[1:] / durations[1:]], axis=1)
    fixed_s, each_s = np.linalg.lstsq(matrix, np.ones(len(sizes) - 1), rcond=None)[0].tolist()
    around_s = max(0.0, float(np.mean(alone)) - fixed_s - each_s)
    inside = np.maximum(alone - around_s, 0.0)
    return Service(fixed_s, each_s, inside / inside.mean(), around_s)
