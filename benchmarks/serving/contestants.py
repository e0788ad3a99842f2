"""Who is measured, how each is started, what it is sent, and where the logits stand in its answer.

This service answers class, certified radius and logits; the peers answer logits alone. Every peer runs the same graph
with one ONNX Runtime thread for each worker and as many workers as there are CPUs, batches dynamically where it can,
and decodes the same PNG with Pillow. Their programs are in `benchmarks/serving/peers`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.serving.artefacts import BATCH, Payloads, Subject
from benchmarks.serving.load import Request

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = Path(__file__).resolve().parent / "peers"

LoadName = Literal["single", "base64", "batch", "counterfactual"]
LOADS: tuple[LoadName, ...] = ("single", "base64", "batch", "counterfactual")

Logits = list[list[float]]


@dataclass(frozen=True)
class Contestant:
    """A server under measurement."""

    name: str
    title: str
    kind: Literal["ours", "echo", "peer"]
    packaged: bool
    """A peer that is a product, not an endpoint written for the occasion."""
    venv: str | None
    """Folder of the virtual environment that runs it; None is the one of this program."""
    command: Callable[[Subject, int], list[str]]
    """Arguments after the interpreter."""
    ready_path: str
    requests: Mapping[LoadName, Callable[[Payloads], Request]]
    logits: Callable[[LoadName, bytes], Logits] | None
    """Logits of each image in an answer; None for the one that echoes."""
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """Environment variables that configure it."""
    note: str = ""
    """Its configuration, for the report."""
    deadline_s: float = 120.0

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        return Path(sys.executable) if self.venv is None else ROOT / self.venv / "bin" / "python"

    def why_not_installed(self) -> str | None:
        """What keeps it from being started, in the words of pip where that failed; None if nothing is known."""
        if self.venv is None:
            return None
        folder = ROOT / self.venv
        if not self.python.exists():
            return f"{self.venv} is not there; `make bench` makes it"
        if (folder / "installed").exists() or not (folder / "errors.txt").exists():
            return None
        return "cannot be installed: " + error_of_pip((folder / "errors.txt").read_text(encoding="utf-8"))

    def environment(self, subject: Subject, port: int) -> dict[str, str]:
        """Environment variables of the server."""
        if self.kind == "ours":
            return {
                "LIPCERT_HOST": "127.0.0.1",
                "LIPCERT_PORT": str(port),
                "LIPCERT_MODELS": str(subject.zoo.resolve()),
                "LIPCERT_DEFAULT_MODEL": subject.name,
                "LIPCERT_LOG_LEVEL": "warning",
                "ORT_DISABLE_TELEMETRY": "1",
                **self.settings,
            }
        return {
            "BENCH_MODEL": str(subject.model.resolve()),
            "BENCH_PORT": str(port),
            "BENCH_WORKERS": str(cpus()),
            "BENCH_MAX_BATCH": str(BATCH),
            "BENCH_FOLDER": str(ROOT / "build" / "bench" / self.name),
            "ORT_DISABLE_TELEMETRY": "1",
            **self.settings,
        }


def error_of_pip(printed: str) -> str:
    """The line that says why; pip warns on the same stream."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip failed and printed nothing"])[-1]


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _png(path: str, headers: Mapping[str, str] | None = None) -> Callable[[Payloads], Request]:
    sent = {"Content-Type": "image/png"} if headers is None else headers
    return lambda payloads: Request(path, sent, payloads.png)


def _json_of(path: str, body: Callable[[str], Any]) -> Callable[[Payloads], Request]:
    """A JSON request around the base64 of the image."""
    headers = {"Content-Type": "application/json"}
    return lambda payloads: Request(path, headers, [json.dumps(body(image)).encode() for image in payloads.base64])


def _batch(payloads: Payloads) -> Request:
    headers = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}
    return Request("/predict/batch", headers, payloads.npy, images=BATCH)


def _after_json(answer: bytes) -> Any:
    """The float64 numbers after the JSON header of a binary answer of the Open Inference Protocol."""
    _, end = json.JSONDecoder().raw_decode(answer.decode("latin-1"))
    return np.frombuffer(answer[end:], "<f8")


def _our_logits(load: LoadName, answer: bytes) -> Logits:
    if load == "batch":
        from benchmarks.serving.arrays import logits_of_batch

        return logits_of_batch(answer)
    return [json.loads(answer)["logits"]]


def ours(name: str, title: str, settings: Mapping[str, str]) -> Contestant:
    """This service with these `LIPCERT_*` settings besides address and models."""
    return Contestant(
        name=name,
        title=title,
        kind="ours",
        packaged=False,
        venv=None,
        command=lambda _subject, _port: ["-m", "service"],
        ready_path="/health/ready",
        requests={
            "single": _png("/predict"),
            "base64": _json_of("/predict", lambda image: {"image": image}),
            "batch": _batch,
            "counterfactual": _png("/predict?counterfactual=true"),
        },
        logits=_our_logits,
        settings=settings,
        note=" ".join(f"`{key}={value}`" for key, value in settings.items()) or "default settings",
    )


def _peer(
    name: str,
    title: str,
    *,
    venv: str | None,
    request: Callable[[Payloads], Request],
    logits: Callable[[Any], list[float]],
    ready_path: str,
    note: str,
    packaged: bool = True,
    read: Callable[[bytes], Any] = json.loads,
) -> Contestant:
    return Contestant(
        name=name,
        title=title,
        kind="peer",
        packaged=packaged,
        venv=venv,
        command=lambda _subject, _port: [str(PEERS / f"{name}_server.py")],
        ready_path=ready_path,
        requests={"single": request},
        logits=lambda _load, answer: [[float(value) for value in logits(read(answer))]],
        note=note,
    )


ALL_CORES = {"LIPCERT_PROCESSES": "0"}


def _echo(name: str, title: str, processes: int, note: str) -> Contestant:
    return Contestant(
        name=name,
        title=title,
        kind="echo",
        packaged=False,
        venv=None,
        command=lambda _subject, _port: [str(PEERS / "echo_server.py")],
        ready_path="/ready",
        requests={"single": _png("/predict")},
        logits=None,
        settings={"BENCH_PROCESSES": str(processes)},
        note=f"uvicorn with uvloop and httptools, {note}; the body comes back",
    )


ECHOES = (
    _echo("echo", "echo (FastAPI)", 1, "one process"),
    _echo("echo-all", "echo (FastAPI), all cores", cpus(), "a worker process for each CPU"),
)

VENV = ".venv-peers"
"""LitServe, BentoML and Ray Serve share a resolution; MLServer and PyTriton pin older packages and have their own."""

_BATCHED = f"dynamic batches of up to {BATCH}"

PEER_LIST = (
    _peer(
        "naive",
        "naive FastAPI",
        venv=None,
        packaged=False,
        request=_png("/predict"),
        logits=lambda answer: answer["logits"],
        ready_path="/ready",
        note="uvicorn with one worker process for each CPU, `session.run` in an `async def`; no batching; PNG as body",
    ),
    _peer(
        "litserve",
        "LitServe",
        venv=VENV,
        request=_json_of("/predict", lambda image: {"image": image}),
        logits=lambda answer: answer["logits"],
        ready_path="/health",
        note=f"one worker for each CPU, {_BATCHED} within 5 ms, `fast_queue`; PNG as base64 in JSON",
    ),
    _peer(
        "bentoml",
        "BentoML",
        venv=VENV,
        request=_json_of("/predict", lambda image: {"images": [image]}),
        logits=lambda answer: answer[0],
        ready_path="/readyz",
        note=f"one worker for each CPU, adaptive {_BATCHED}; PNG as base64 in JSON",
    ),
    _peer(
        "mlserver",
        "MLServer",
        venv=f"{VENV}-mlserver",
        request=_json_of(
            "/v2/models/logits/infer",
            lambda image: {"inputs": [{"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [image]}]},
        ),
        logits=lambda answer: answer["outputs"][0]["data"],
        ready_path="/v2/models/logits/ready",
        note=f"one inference process for each CPU, adaptive {_BATCHED} within 5 ms; PNG as base64 in JSON",
    ),
    _peer(
        "ray",
        "Ray Serve",
        venv=VENV,
        request=_png("/"),
        logits=lambda answer: answer["logits"],
        ready_path="/",
        note=f"one replica for each CPU, `serve.batch`: {_BATCHED} within 5 ms, throughput-optimised; PNG as body",
    ),
    _peer(
        "triton",
        "Triton (PyTriton)",
        venv=f"{VENV}-triton",
        request=_png(
            "/v2/models/logits/infer",
            {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"},
        ),
        read=_after_json,
        logits=lambda answer: answer,
        ready_path="/v2/models/logits/ready",
        note=f"one instance for each CPU, {_BATCHED} within 1 ms; PNG as body",
    ),
)


def all_contestants() -> list[Contestant]:
    """In the order of the tables."""
    services = (ours("ours", "lipcert, one process", {}), ours("ours-all", "lipcert, all cores", ALL_CORES))
    return [*services, *ECHOES, *PEER_LIST]
