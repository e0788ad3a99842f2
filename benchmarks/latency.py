"""Latency of one `/predict` on an idle server, over loopback: `python benchmarks/latency.py --data DIR`.

Starts `python -m service` on a free port, posts MNIST test images as PNG one after the other over one
connection, without and with a counterfactual, and prints median and 99th percentile as Markdown. The times
are a client's: from the first byte of the request to the last of the answer. `--write` replaces the section
of `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
HEADING = "## Latency of one request"
START_DEADLINE_S = 60.0

sys.path.insert(0, str(ROOT))

from models.data import load_mnist  # noqa: E402
from models.export import code_version, environment  # noqa: E402


@dataclass(frozen=True)
class Times:
    """Milliseconds of n requests."""

    p50: float
    p99: float
    n: int


def main() -> None:
    """Measure, print, and on request write."""
    arguments = _arguments()
    _, test = load_mnist(arguments.data)
    images = [_png(image) for image in test.images_NCHW[: arguments.requests, 0].numpy()]
    port = arguments.port or _free_port()
    server = _start(arguments.models, arguments.model, port, arguments.threads)
    try:
        connection = _connect(server, port)
        rows = []
        for what, query in (("without counterfactual", ""), ("with counterfactual", "&counterfactual=true")):
            path = f"/predict?model={arguments.model}{query}"
            _post_all(connection, path, images[: arguments.warm_up])
            rows.append((what, _times(_post_all(connection, path, images))))
        digest = _get(connection, f"/models/{arguments.model}")["digest"]
    finally:
        server.terminate()
        server.wait(timeout=30)
    section = _section(arguments, digest, rows)
    sys.stdout.write(section)
    if arguments.write:
        _write(section)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the MNIST idx files")
    parser.add_argument("--models", type=Path, default=ROOT / "models" / "zoo", help="folder of artefacts")
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--requests", type=int, default=1000, help="timed requests of each kind")
    parser.add_argument("--warm-up", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="LIPCERT_THREADS of the server")
    parser.add_argument("--port", type=int, default=0, help="a free one by default")
    parser.add_argument("--write", action="store_true", help=f"replace the section of {RESULTS.name}")
    return parser.parse_args()


def _png(image_HW: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW).save(file, "PNG")
    return file.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(models: Path, model: str, port: int, threads: int) -> subprocess.Popen[bytes]:
    settings = {
        "LIPCERT_HOST": "127.0.0.1",
        "LIPCERT_PORT": str(port),
        "LIPCERT_MODELS": str(models.resolve()),
        "LIPCERT_DEFAULT_MODEL": model,
        "LIPCERT_THREADS": str(threads),
        "LIPCERT_LOG_LEVEL": "warning",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("LIPCERT_")}
    return subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env={**inherited, **settings})


def _connect(server: subprocess.Popen[bytes], port: int) -> http.client.HTTPConnection:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/health/ready")
            response = connection.getresponse()
            response.read()
            if response.status == http.HTTPStatus.OK:
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
        except OSError:
            connection.close()
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}; its log above says why")
        if time.monotonic() > deadline:
            raise SystemExit(f"the server was not ready within {START_DEADLINE_S:g} s")
        time.sleep(0.05)


def _get(connection: http.client.HTTPConnection, path: str) -> dict[str, object]:
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def _post_all(connection: http.client.HTTPConnection, path: str, images: list[bytes]) -> list[float]:
    """Milliseconds of each request."""
    times: list[float] = []
    for image in images:
        started = time.perf_counter()
        connection.request("POST", path, body=image, headers={"Content-Type": "image/png"})
        response = connection.getresponse()
        body = response.read()
        times.append(1000 * (time.perf_counter() - started))
        if response.status != http.HTTPStatus.OK:
            raise SystemExit(f"the server answered {response.status}: {body.decode(errors='replace')}")
    return times


def _times(milliseconds: list[float]) -> Times:
    percentiles = statistics.quantiles(milliseconds, n=100, method="inclusive")
    return Times(statistics.median(milliseconds), percentiles[98], len(milliseconds))


def _section(arguments: argparse.Namespace, digest: object, rows: list[tuple[str, Times]]) -> str:
    made = environment(0.0)
    lines = [
        HEADING,
        "",
        f"`python benchmarks/latency.py`: `/predict` with one 28 x 28 PNG, sequential, loopback, one connection; model "
        f"`{arguments.model}` ({digest}), code {code_version()}, LIPCERT_THREADS={arguments.threads}.",
        "",
        f"Hardware: {made['cpu']}, {os.cpu_count()} logical CPUs. Versions: Python {platform.python_version()}, ONNX "
        f"Runtime {made['onnxruntime']}, numpy {made['numpy']}, FastAPI {metadata.version('fastapi')}, uvicorn "
        f"{metadata.version('uvicorn')}. Load average of the machine afterwards: {os.getloadavg()[0]:.1f}.",
        "",
        "| | p50, ms | p99, ms | n |",
        "|---|---|---|---|",
        *(f"| {what} | {times.p50:.2f} | {times.p99:.2f} | {times.n} |" for what, times in rows),
        "",
    ]
    return "\n".join(lines)


def _write(section: str) -> None:
    """Replace our section and leave the others as they are."""
    text = RESULTS.read_text() if RESULTS.exists() else "# Benchmark results\n\n"
    before, found, after = text.partition(HEADING)
    _, next_heading, rest = after.partition("\n## ")
    if not found and not before.endswith("\n\n"):
        before = before.rstrip("\n") + "\n\n"
    RESULTS.write_text(before + section + (f"{next_heading}{rest}" if next_heading else ""))


if __name__ == "__main__":
    main()
