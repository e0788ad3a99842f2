"""The measurement: rounds over all servers, each cell between two measurements of raw ONNX Runtime.

One server runs at a time. The contestants take turns within each round, so that a machine that becomes slower is slow
for all; every ratio is taken within its own cell, against the raw runs just before and after it.
"""

from __future__ import annotations

import http.client
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.serving.arrays import is_npy
from benchmarks.serving.artefacts import Payloads, Subject
from benchmarks.serving.contestants import ROOT, Contestant, LoadName
from benchmarks.serving.load import Load, LoadError, Request, run_wrk
from benchmarks.serving.plan import Cell, Effort, Instance
from benchmarks.serving.processes import Server, ServerError, free_port
from benchmarks.serving.raw import Raw

LOGIT_TOLERANCE = 1e-6
"""Largest difference between an answer's logits and raw ones: another graph or another decoding differs by more."""
_CHECKED = 8
"""Bodies of each load whose answers are looked at."""
_WARM_UP_S = 1


@dataclass(frozen=True)
class CellResult:
    """One cell in one round."""

    contestant: str
    subject: str
    load: LoadName
    clients: int
    round: int
    requests: int
    images_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_image: float
    """Processor time of the server."""
    raw_images_per_s: float
    """Mean of the raw runs before and after; of the gradient graph for `counterfactual`."""
    raw_one_ms: float | None
    """Median raw time of one image, where there is one client."""
    answers_npy: bool
    run: str
    """When the run began that measured it."""

    @property
    def ratio(self) -> float:
        """Images a second over raw."""
        return self.images_per_s / self.raw_images_per_s


@dataclass(frozen=True)
class StartResult:
    """One start of a server."""

    contestant: str
    subject: str
    round: int
    ready_s: float
    idle_rss_mb: float
    idle_pss_mb: float
    loaded_rss_mb: float
    loaded_pss_mb: float
    processes: int
    run: str


def measure(
    plan: Sequence[Instance],
    effort: Effort,
    subjects: Mapping[str, Subject],
    payloads: Payloads,
    logs: Path,
    run: str,
) -> tuple[list[CellResult], list[StartResult], dict[str, str]]:
    """Run all rounds.

    Args:
        plan: the servers of one round.
        effort: how many rounds, and how long each cell.
        subjects: every artefact of the plan, by name.
        payloads: what is sent.
        logs: folder for the logs of the servers.
        run: stands in every result.

    Returns:
        Cells, starts, and the reason for each contestant that could not be measured.
    """
    raws = {name: Raw(subject, payloads.image_NCHW) for name, subject in subjects.items()}
    cells: list[CellResult] = []
    starts: list[StartResult] = []
    failed: dict[str, str] = {}
    for round_ in range(effort.rounds):
        turn = _Turn(round_, effort, run)
        for instance in plan:
            contestant = instance.contestant
            if contestant.name in failed or not effort.takes_part(instance.subject, round_):
                continue
            print(f"round {round_ + 1}/{effort.rounds}  {contestant.name}  {instance.subject}", file=sys.stderr)
            try:
                found, start = turn.take(instance, subjects[instance.subject], raws[instance.subject], payloads, logs)
            except (ServerError, LoadError) as error:
                if contestant.kind != "peer":
                    raise
                failed[contestant.name] = str(error)
                print(f"{contestant.name} is left out: {error}", file=sys.stderr)
                continue
            cells += found
            starts.append(start)
    return cells, starts, failed


@dataclass(frozen=True)
class _Turn:
    """One round."""

    round: int
    effort: Effort
    run: str

    def take(
        self, instance: Instance, subject: Subject, raw: Raw, payloads: Payloads, logs: Path
    ) -> tuple[list[CellResult], StartResult]:
        """Start a server, measure its cells, stop it."""
        contestant = instance.contestant
        if why := contestant.why_not_installed():
            raise ServerError(why)
        port = free_port()
        command = [str(contestant.python), *contestant.command(subject, port)]
        log = logs / f"{contestant.name}-{instance.subject}.log"
        with Server(command, contestant.environment(subject, port), port, log, ROOT) as server:
            server.wait_ready(contestant.ready_path, contestant.deadline_s)
            idle = server.usage()
            results: list[CellResult] = []
            npy: dict[LoadName, bool] = {}
            for cell in instance.cells:
                request = contestant.requests[cell.load](payloads)
                if cell.load not in npy:
                    npy[cell.load] = _check(server, contestant, cell.load, request, raw.logits())
                    run_wrk(port, request, cell.clients, _WARM_UP_S)
                results.append(self._cell(server, instance, cell, request, raw, npy[cell.load]))
            loaded = server.usage()
        return results, StartResult(
            contestant=contestant.name,
            subject=instance.subject,
            round=self.round,
            ready_s=server.ready_s,
            idle_rss_mb=idle.rss_mb,
            idle_pss_mb=idle.pss_mb,
            loaded_rss_mb=loaded.rss_mb,
            loaded_pss_mb=loaded.pss_mb,
            processes=loaded.processes,
            run=self.run,
        )

    def _cell(
        self, server: Server, instance: Instance, cell: Cell, request: Request, raw: Raw, answers_npy: bool
    ) -> CellResult:
        raw_run = raw.gradient_images_per_s if cell.load == "counterfactual" else raw.images_per_s
        before = raw_run(self.effort.raw_s)
        used = server.usage().cpu_s
        load = run_wrk(server.port, request, cell.clients, self.effort.seconds_of(cell))
        used = server.usage().cpu_s - used
        after = raw_run(self.effort.raw_s)
        result = CellResult(
            contestant=instance.contestant.name,
            subject=instance.subject,
            load=cell.load,
            clients=cell.clients,
            round=self.round,
            requests=load.requests,
            images_per_s=load.requests_per_s * request.images,
            p50_ms=load.p50_ms,
            p99_ms=load.p99_ms,
            cpu_ms_per_image=1e3 * used / (load.requests * request.images),
            raw_images_per_s=(before + after) / 2,
            raw_one_ms=raw.run_ms(1, self.effort.raw_s) if cell.clients == 1 else None,
            answers_npy=answers_npy,
            run=self.run,
        )
        _show(result, load)
        return result


def _show(result: CellResult, load: Load) -> None:
    print(
        f"  {result.load:<14} {result.clients:>3} clients {result.images_per_s:>8.0f} images/s"
        f"  {result.ratio:>6.3f} of raw  p50 {load.p50_ms:>8.2f}  p99 {load.p99_ms:>8.2f} ms"
        f"  {result.cpu_ms_per_image:>7.3f} CPU ms/image",
        file=sys.stderr,
    )


def _check(server: Server, contestant: Contestant, load: LoadName, request: Request, expected: np.ndarray) -> bool:
    """Ask once for some bodies and compare the answers with raw logits; whether the answers are npy arrays.

    Raises:
        ServerError: another status than 200, or other logits.
    """
    is_array = False
    for index, body in enumerate(request.bodies[:_CHECKED]):
        answer = _post(server, request, body)
        is_array = is_npy(answer)
        if contestant.logits is None:
            if answer != body:
                raise ServerError("the echo differs from the body")
            continue
        found = np.array(contestant.logits(load, answer), np.float64)
        # A batch begins at image 8 * index, a single request is image `index`.
        first = 8 * index if request.images > 1 else index
        wanted = np.take(expected, range(first, first + request.images), axis=0, mode="wrap")
        if found.shape != (request.images, wanted.shape[1]):
            found = found[:, : wanted.shape[1]]  # A model with one output f is answered as (f, -f).
        if found.shape != wanted.shape or not np.abs(found - wanted).max() <= LOGIT_TOLERANCE:
            raise ServerError(f"logits of body {index} differ from raw ones: {found[0]} and {wanted[0]}")
    return is_array


def _post(server: Server, request: Request, body: bytes) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", request.path, body=body, headers=dict(request.headers))
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"no answer ({error}):\n{server.log_tail()}") from error
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        text = answer.decode(errors="replace")
        raise ServerError(f"answered {response.status}: {text[:500]}\n{server.log_tail()}")
    return answer


def stamp() -> str:
    """Now, to the minute, UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
