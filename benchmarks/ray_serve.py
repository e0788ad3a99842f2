"""`python -m benchmarks.ray_serve [--seconds 3] [--rounds 3]`: the service on Ray Serve beside the plain service.

At 64 clients (wrk), on two CPUs: the plain service with two workers; one replica with two CPUs and two with one CPU
each, with the batcher of the service and with `serve.batch` in its place, which has no options, limits or metrics. Each
is measured in turn with the plain service, which runs beside it. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from benchmarks.serving.load import Request, run_wrk
from service.api.answers import in_words
from service.api.schema import NO_OPTIONS
from service.cluster.command import DEFAULTS
from service.inference.classifier import Classifier
from service.inference.outcome import compute
from service.pixels.images import decode_plain

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 64
PLAIN_PORT, RAY_PORT = 8418, 8419
_READY_S = 120.0
_PIXELS = 1 << 20


class Batched:
    """A replica with `serve.batch`: the same decoder, classifier and answer."""

    def __init__(self, cpus: int) -> None:
        """Load the model."""
        self._classifier = Classifier.load(ROOT / "models" / "zoo" / "mnist", "cpu", cpus)

    async def answer(self, bodies: list[bytes]) -> list[bytes]:
        """Return the JSON of each image file."""
        pixels = [decode_plain(body, _PIXELS) for body in bodies]
        pixels_NCHW = np.stack([image_CHW for image_CHW in pixels if image_CHW is not None])
        outcome = compute(self._classifier, pixels_NCHW / 255.0, NO_OPTIONS)
        return [to_json(words, inf_nan_mode="null") for words in in_words(outcome)]


def batched(serve: Any, cpus: int, replicas: int) -> Any:
    """Return the application with `serve.batch`."""

    class Replica(Batched):
        # Ray looks it up by its name.
        answer = serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)(Batched.answer)

        async def __call__(self, request: HttpRequest) -> Response:
            return Response(await self.answer(await request.body()), media_type="application/json")

    options = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": cpus}, "max_ongoing_requests": 1024}
    return serve.deployment(**options)(Replica).bind(cpus)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name has it")
    options = parser.parse_args()
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="lipcert-ray-") as folder:
        (Path(folder) / "mnist").symlink_to(ROOT / "models" / "zoo" / "mnist")
        settings = {"MODELS": folder, "PROVIDER": "cpu", "CLIENT_SHARE": "1", "WORKERS": "2", "PORT": str(PLAIN_PORT)}
        plain_settings = {f"LIPCERT_{name}": value for name, value in settings.items()}
        plain = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env={**os.environ, **plain_settings})
        try:
            del settings["WORKERS"]
            os.environ.update({f"LIPCERT_{name}": value for name, value in settings.items()}, PYTHONPATH=str(ROOT))
            _measure_ray(options.seconds, options.rounds, options.only)
        finally:
            plain.terminate()
            plain.wait()


def _measure_ray(seconds: int, rounds: int, only: str) -> None:
    ray: Any = importlib.import_module("ray")
    serve: Any = importlib.import_module("ray.serve")
    from service.cluster.ray import app

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": RAY_PORT}, logging_config={"enable_access_log": False})
        variants = {
            "our batcher, 1 replica": app({"replicas": 1, "cpus": 2}),
            "our batcher, 2 replicas": app({"replicas": 2, "cpus": 1}),
            "serve.batch, 1 replica": batched(serve, 2, 1),
            "serve.batch, 2 replicas": batched(serve, 1, 2),
        }
        print(f"{'':26}requests/s  of plain  p50 ms  p99 ms")
        for name, application in variants.items():
            if only not in name:
                continue
            serve.run(application, name="lipcert", logging_config={"enable_access_log": False})
            found = [(_load(PLAIN_PORT, seconds), _load(RAY_PORT, seconds)) for _ in range(rounds)]
            ratio = statistics.median(ours.requests_per_s / plain.requests_per_s for plain, ours in found)
            rate, p50, p99 = (
                statistics.median(getattr(ours, kind) for _, ours in found)
                for kind in ("requests_per_s", "p50_ms", "p99_ms")
            )
            print(f"{name:26}{rate:10.0f}{ratio:10.2f}{p50:8.0f}{p99:8.0f}", flush=True)
            serve.delete("lipcert")
    finally:
        serve.shutdown()
        ray.shutdown()


def _load(port: int, seconds: int) -> Any:
    bodies = [file.read_bytes() for file in sorted((ROOT / "service" / "static" / "samples").glob("mnist-*.png"))]
    _wait(port, bodies[0])
    return run_wrk(port, Request("/predict", {"Content-Type": "image/png"}, bodies), CLIENTS, seconds)


def _wait(port: int, body: bytes) -> None:
    until_s = time.monotonic() + _READY_S
    while True:
        try:
            asked = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "image/png"})
            with urllib.request.urlopen(asked, timeout=10.0):
                return
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main()
