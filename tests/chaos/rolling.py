"""Restart two replicas behind HAProxy, one after the other, while clients count the requests that fail.

`python tests/chaos/rolling.py [--seconds 300] [--clients 64]` (`make rolling`), with `haproxy` on the path and
`deploy/proxy/haproxy.cfg` on other ports. Exit status 1: a request failed, or a replica did not stop with status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from encoding import npy  # noqa: E402
from exchanges import Answer, Exchange, read_answer  # noqa: E402
from server_process import without_settings  # noqa: E402

CONFIGURATION = ROOT / "deploy" / "proxy" / "haproxy.cfg"
IMAGES = sorted((ROOT / "service" / "static" / "samples").glob("mnist-*.png"))
PATIENCE_S = 60.0
STOP_S = 60.0
SEEN_S = 1.0
"""Time in which HAProxy sees twice that a replica is ready."""


@dataclass
class Report:
    """Figures of a run."""

    latencies_s: list[float] = field(default_factory=list)
    by_replica: Counter[int] = field(default_factory=Counter)
    """Restarts."""
    failures: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Of replicas."""
    seconds: float = 0.0

    @property
    def is_well(self) -> bool:
        """Whether every request was answered, and rightly."""
        return bool(self.latencies_s) and not self.failures and not self.faults

    def lines(self) -> list[str]:
        """Return the report."""
        p50, p99, most = np.quantile(self.latencies_s or [0.0], [0.5, 0.99, 1.0]) * 1000.0
        count = len(self.latencies_s) + len(self.failures)
        return [
            f"{self.seconds:.0f} s, {sum(self.by_replica.values())} restarts, {count} requests "
            f"({count / max(1.0, self.seconds):.0f} a second), {len(self.failures)} failed; "
            f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {most:.0f} ms",
            *self.failures[:20],
            *self.faults,
        ]


@dataclass
class Replica:
    """A server that is started again and again."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the server and wait until it is ready; raise `AssertionError` if it ends."""
        environment = without_settings()
        environment |= {
            "LIPCERT_PORT": str(self.port),
            "LIPCERT_PROVIDER": "cpu",
            "LIPCERT_MODELS": str(self.folder / "models"),
            "LIPCERT_CLIENT_SHARE": "1",
            "PYTHONPATH": str(ROOT),
        }
        with (self.folder / f"log-{self.port}").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stderr=log)
        async with asyncio.timeout(PATIENCE_S):
            while not await self._is_ready():
                assert self.process.poll() is None, (self.folder / f"log-{self.port}").read_text()
                await asyncio.sleep(0.05)

    async def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_S):
            return await asyncio.to_thread(self.process.wait)

    def kill(self) -> None:
        """End the server, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, EOFError, ValueError):
            async with connected(self.port) as (reader, writer):
                writer.write(b"GET /health/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                return (await read_answer(reader, is_head=False)).status == 200
        return False


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a port of this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def exchanges() -> list[Exchange]:
    """Return the requests: small ones, a search, and bodies above the buffer of HAProxy, which it cannot send twice."""
    arrays = [np.array(Image.open(image)) for image in IMAGES]
    found = [_post(f"png-{image.stem}", "/predict", "image/png", image.read_bytes(), 6.0) for image in IMAGES]
    large = npy(np.stack((arrays * 40)[:40]))
    assert len(large) > 16384
    return [
        *found,
        _post("large", "/predict/batch", "application/x-npy", large, 2.0),
        _post("counterfactual", "/predict?counterfactual=true", "image/png", IMAGES[0].read_bytes(), 0.5),
    ]


def _post(name: str, target: str, content_type: str, body: bytes, weight: float) -> Exchange:
    head = (
        f"POST /ai/lipcert{target} HTTP/1.1\r\nHost: a\r\nX-Request-ID: 1\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return Exchange(name, head.encode(), body, weight)


async def ask(port: int, exchange: Exchange) -> Answer:
    """Return the answer on a new connection."""
    async with asyncio.timeout(PATIENCE_S), connected(port) as (reader, writer):
        writer.write(exchange.head + exchange.body)
        return await read_answer(reader, is_head=False)


@contextlib.asynccontextmanager
async def balanced() -> AsyncIterator[tuple[int, list[Replica]]]:
    """Start two replicas of one model behind HAProxy, and yield the port of HAProxy and the replicas."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lipcert-rolling-")))
        (folder / "models").mkdir()
        (folder / "models" / "mnist").symlink_to(ROOT / "models" / "zoo" / "mnist")
        port, *ports = _free_ports(3)
        text = CONFIGURATION.read_text(encoding="utf-8").replace("bind :80\n", f"bind 127.0.0.1:{port}\n")
        for shipped, other in zip((8000, 8001), ports, strict=True):
            text = text.replace(f"127.0.0.1:{shipped}", f"127.0.0.1:{other}")
        (folder / "haproxy.cfg").write_text(text)
        replicas = [Replica(of, folder) for of in ports]
        for replica in replicas:
            stack.callback(replica.kill)
            await replica.start()
        with (folder / "log-haproxy").open("wb") as log:
            proxy = subprocess.Popen(["haproxy", "-db", "-f", str(folder / "haproxy.cfg")], stdout=log, stderr=log)
        stack.callback(proxy.wait)
        stack.callback(proxy.kill)
        await asyncio.sleep(SEEN_S)
        assert proxy.poll() is None, (folder / "log-haproxy").read_text()
        yield port, replicas


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]


async def run(seconds: float, n_clients: int, restarts: int = 0, pause_s: float = 0.0) -> Report:
    """Restart the replicas in turn under load and return the report.

    Args:
        seconds: in which restarts begin.
        n_clients: each with a kept connection.
        restarts: number of them at which to end before; 0 sets no limit.
        pause_s: of each client after an answer.
    """
    report = Report()
    async with balanced() as (port, replicas):
        asked = exchanges()
        expected = {exchange.name: await ask(port, exchange) for exchange in asked}
        refused = [name for name, answer in expected.items() if answer.status != 200]
        assert not refused, expected[refused[0]]
        ends = asyncio.Event()
        start_s = time.monotonic()
        clients = [
            asyncio.create_task(_client(port, asked, expected, random.Random(n), pause_s, ends, report))
            for n in range(n_clients)
        ]
        while time.monotonic() - start_s < seconds and not (restarts and sum(report.by_replica.values()) >= restarts):
            replica = replicas[sum(report.by_replica.values()) % 2]
            status = await replica.stop()
            if status:
                report.faults.append(f"a replica ended with status {status}")
            await replica.start()
            report.by_replica[replica.port] += 1
            await asyncio.sleep(SEEN_S)
        ends.set()
        await asyncio.gather(*clients)
        report.seconds = time.monotonic() - start_s
        logs = "".join((replica.folder / f"log-{replica.port}").read_text() for replica in replicas)
        report.faults += re.findall(r"^Traceback.*", logs, re.MULTILINE)
    return report


async def _client(
    port: int,
    asked: Sequence[Exchange],
    expected: dict[str, Answer],
    chosen: random.Random,
    pause_s: float,
    ends: asyncio.Event,
    report: Report,
) -> None:
    weights = [exchange.weight for exchange in asked]
    while not ends.is_set():
        try:
            async with connected(port) as (reader, writer):
                while not ends.is_set():
                    (exchange,) = chosen.choices(asked, weights)
                    start_s = time.monotonic()
                    async with asyncio.timeout(PATIENCE_S):
                        writer.write(exchange.head + exchange.body)
                        answer = await read_answer(reader, is_head=False)
                    if (answer.status, answer.body) != (200, expected[exchange.name].body):
                        report.failures.append(f"{exchange.name}: {answer.status} {answer.body[:200]!r}")
                        await asyncio.sleep(0.05)
                    else:
                        report.latencies_s.append(time.monotonic() - start_s)
                        await asyncio.sleep(pause_s)
                    if answer.closes:
                        break
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            report.failures.append(repr(error))
            await asyncio.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args(arguments)
    report = asyncio.run(run(options.seconds, options.clients))
    print(*report.lines(), sep="\n")
    return not report.is_well


if __name__ == "__main__":
    sys.exit(main())
