"""Disturb a server of two processes while clients send mixed requests and every answer is checked.

`python tests/chaos/chaos.py [--seconds 600] [--clients 16] [--seed 1]` (`make chaos`): prints the requests by verdict.
Exit status 1: an answer was wrong, a request was lost while its process was not killed, the log has a traceback, or the
server did not stop with status 0 under load.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clients import Clients, ask  # noqa: E402
from disturbances import Disturbances, Target  # noqa: E402
from exchanges import Answer, Exchange, Keys, mixed, posted_back  # noqa: E402
from judging import Judge  # noqa: E402
from server_process import without_settings  # noqa: E402

from service.access.keys import new_key  # noqa: E402

IMAGES = sorted((ROOT / "service" / "static" / "samples").glob("mnist-*.png"))
MODELS = ("mnist", "mnist-0-8")
STOP_S = 30.0
"""Longest time from SIGTERM to the end; the server promises 9 s on a machine that is not busy."""
_DISK_BYTES = 16 * 1024 * 1024
_PAUSE_S = 1.0


@dataclass
class Report:
    """Figures of a run."""

    judge: Judge
    disturbances: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """Beside the answers."""
    seconds: float = 0.0

    @property
    def is_well(self) -> bool:
        """Whether nothing went wrong."""
        return self.judge.is_well and not self.faults

    def lines(self) -> list[str]:
        """Return the report."""
        judge = self.judge
        return [
            f"{self.seconds:.0f} s, {judge.counts['sent'] / max(1.0, self.seconds):.0f} requests a second",
            *[f"  {name}: {judge.counts[name]}" for name in ("sent", "right", "refused")],
            *[f"    {kind}: {count}" for kind, count in judge.refused.most_common()],
            *[f"  {name}: {judge.counts[name]}" for name in ("cut off by the client", "lost with the process")],
            *[f"  {name}: {judge.counts[name]}" for name in ("lost", "wrong")],
            "disturbances:",
            *[f"  {name}: {count}" for name, count in self.disturbances.items()],
            *judge.samples,
            *self.faults,
        ]


@dataclass
class Server:
    """The server that is disturbed, in a folder of its own."""

    folder: Path
    process: subprocess.Popen[bytes]
    target: Target
    keys: Keys

    @property
    def log(self) -> str:
        """Standard error so far."""
        return (self.folder / "log").read_text(errors="replace")


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[Server]:
    """Start a server of two processes, with keys, on copies of two shipped models."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lipcert-chaos-")))
        for name in MODELS:
            shutil.copytree(ROOT / "models" / "zoo" / name, folder / "models" / name)
        (folder / "tmp").mkdir()
        disk = _mounted(folder / "tmp", stack)
        made = {name: new_key(name, [scope]) for name, scope in (("steady", "predict"), ("narrow", "metrics"))}
        rotating, line = new_key("rotating", ["predict"])
        without = "\n".join(stored for _, stored in made.values()) + "\n"
        (folder / "keys").write_text(without + line + "\n")
        environment = without_settings()
        environment |= {
            "LIPCERT_PORT": "0",
            "LIPCERT_PROVIDER": "cpu",
            "LIPCERT_PROCESSES": "2",
            "LIPCERT_MODELS": str(folder / "models"),
            "LIPCERT_API_KEYS_FILE": str(folder / "keys"),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(ROOT),
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stderr=log, process_group=0)
        stack.callback(_kill_group, process)
        target = Target(process.pid, 0, folder / "models", folder / "keys", without + line + "\n", without, disk)
        server = Server(folder, process, target, Keys(made["steady"][0], rotating, made["narrow"][0]))
        await _until(lambda: server.log.count("Application startup complete") == 2 or process.poll() is not None, 120.0)
        found = re.search(r"serving on http://\S+:(\d+)", server.log)
        assert found is not None, server.log
        target.port = int(found[1])
        yield server


async def run(
    server: Server, n_clients: int, seed: int, seconds: float = 0.0, *, pause_s: float = 0.0, each_once: bool = False
) -> Report:
    """Disturb a server and return the report; the server is stopped at the end.

    Args:
        server: of `served`.
        n_clients: that are there all the time.
        seed: of the choices.
        seconds: in which disturbances begin.
        pause_s: of each client after an answer.
        each_once: whether each short disturbance comes once, side by side, instead of as many as fit.
    """
    exchanges, expected = await expectations(server)
    judge = Judge(expected)
    report = Report(judge)
    clients = Clients(server.target.port, exchanges, judge, seed, n_clients)
    body = next(exchange for exchange in exchanges if exchange.name == "png-0")
    disturbances = Disturbances(server.target, clients, judge, body, seed)
    start_s = time.monotonic()
    clients.start(n_clients, pause_s)
    if each_once:
        await _each_once(disturbances, report, seed)
    else:
        await _disturb(disturbances, report, start_s + seconds, seed)
    report.seconds = time.monotonic() - start_s
    await _stop(server, clients, report)
    _read_log(server, disturbances.kills, report)
    return report


async def expectations(server: Server) -> tuple[list[Exchange], dict[str, Answer]]:
    """Return the requests, and their answers by a server that nobody disturbs."""
    port, keys = server.target.port, server.keys
    exchanges = mixed(IMAGES, keys)
    expected: dict[str, Answer] = {}
    for exchange in list(exchanges):
        answer = expected[exchange.name] = await ask(port, exchange)
        again = posted_back(exchange, answer, keys)
        if again is not None:
            exchanges.append(again)
            found = expected[again.name] = await ask(port, again)
            assert json.loads(found.body)["class_id"] == json.loads(answer.body)["counterfactual"]["class_id"]
    _check(server.target.models, expected)
    return exchanges, expected


def _check(models: Path, expected: dict[str, Answer]) -> None:
    """Compare the expected answers with each other and with the files; raise `AssertionError`."""
    refusals = {answer.kind for answer in expected.values() if answer.status >= 400}
    assert {"unauthorized", "forbidden", "not-an-image", "malformed-body", "unknown-model"} <= refusals, refusals
    of_model = {
        name: f"sha256:{hashlib.sha256((models / name / 'model.onnx').read_bytes()).hexdigest()}" for name in MODELS
    }
    for n, file in enumerate(IMAGES):
        pixels_HW = np.array(Image.open(file))
        height, width = pixels_HW.shape
        digest = hashlib.sha256(
            b"1x%dx%d\n" % (height, width) + (pixels_HW / 255.0).astype("<f8").tobytes()
        ).hexdigest()
        answers = [json.loads(expected[f"{form}-{n}"].body) for form in ("png", "npy", "json", "form", "rotating")]
        for answer in answers:
            # Whatever the form, the same answer.
            assert answer == answers[0]
            assert answer["digest"] == of_model["mnist"]
            assert answer["image"]["digest"] == f"sha256:{digest}"
        assert json.loads(expected[f"second-{n}"].body)["digest"] == of_model["mnist-0-8"]


async def _disturb(disturbances: Disturbances, report: Report, until_s: float, seed: int) -> None:
    """Disturb by one or two at a time, in random order, each as often as the others."""
    chosen = random.Random(seed)
    waiting: list[str] = []

    async def one_after_the_other() -> None:
        while time.monotonic() < until_s:
            if not waiting:
                waiting.extend(chosen.sample(sorted(disturbances.all), len(disturbances.all)))
            await _one(waiting.pop(), disturbances, report)
            await asyncio.sleep(chosen.random() * _PAUSE_S)

    await asyncio.gather(one_after_the_other(), one_after_the_other())


async def _one(name: str, disturbances: Disturbances, report: Report) -> None:
    report.disturbances[name] += 1
    report.judge.active.append(name)
    try:
        await disturbances.all[name]()
    except AssertionError as error:
        report.faults.append(f"{name}: {error}")
    finally:
        report.judge.active.remove(name)


async def _each_once(disturbances: Disturbances, report: Report, seed: int) -> None:
    names = [name for name in disturbances.all if name not in ("process hangs", "stalled bodies")]
    random.Random(seed).shuffle(names)

    async def some(share: list[str]) -> None:
        for name in share:
            await _one(name, disturbances, report)

    await asyncio.gather(some(names[::2]), some(names[1::2]))


async def _stop(server: Server, clients: Clients, report: Report) -> None:
    """Stop the server under load."""
    report.judge.active.append("the end of the server")
    with report.judge.cause("not ready", "busy", slack_s=0.0):
        clients.is_stopping = True
        server.process.send_signal(signal.SIGTERM)
        stopped = asyncio.create_task(_until(lambda: server.process.poll() is not None, STOP_S))
        if not await stopped:
            report.faults.append(f"the server did not end within {STOP_S:g} s of SIGTERM")
        elif server.process.returncode:
            report.faults.append(f"the server ended with status {server.process.returncode}")
        await clients.end()


def _read_log(server: Server, kills: int, report: Report) -> None:
    """Add what the log says to the faults."""
    log = server.log
    replaced = log.count("another takes its place")
    if replaced != kills:
        report.faults.append(f"{replaced} processes were replaced, and {kills} were ended")
    for trouble in ("Traceback", "Fatal Python error", "Exception in"):
        if trouble in log:
            start = log.index(trouble)
            report.faults.append(log[max(0, start - 500) : start + 3000])


def _mounted(folder: Path, stack: contextlib.ExitStack) -> Path | None:
    """Mount a small file system, where this user may; return its folder."""
    if os.geteuid() != 0:
        return None
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return None
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
    return folder


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def _until(condition: Callable[[], bool], patience_s: float) -> bool:
    end_s = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        await asyncio.sleep(0.05)
    return True


async def _main(seconds: float, n_clients: int, seed: int) -> int:
    async with served() as server:
        report = await run(server, n_clients, seed, seconds)
        print("\n".join(report.lines()))
        if not report.is_well:
            kept = ROOT / "build" / "chaos.log"
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(server.folder / "log", kept)
            print(f"log of the server: {kept}")
    return int(not report.is_well)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    # The server and its folder go, however the run ends.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return asyncio.run(_main(chosen.seconds, chosen.clients, chosen.seed))


if __name__ == "__main__":
    sys.exit(main())
