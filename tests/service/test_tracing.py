"""Traces: a span for each request with its stages, below the caller's; nothing is imported where nobody asks."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client import Client
from encoding import encode, npy

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings
from service.tracing import tracer_of

_IMAGE = npy(np.full((1, 4, 5), 0.5))
_NPY = {"Content-Type": "application/x-npy"}
_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A server that takes spans by OTLP over HTTP; the environment names it."""
    pytest.importorskip("opentelemetry.sdk")
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        yield bodies
        server.shutdown()
        thread.join()


def test_a_request_is_a_span_with_its_stages_below_the_span_of_the_caller(
    collector: list[bytes], classifiers: Mapping[str, Classifier], runner: Any
) -> None:
    from opentelemetry.proto.collector.trace.v1 import (  # pyright: ignore[reportMissingImports]
        trace_service_pb2,  # pyright: ignore[reportUnknownVariableType]
    )

    app = create_app(Settings(default_model="grey"), classifiers)
    tracer = app.state.service.traces.tracer = tracer_of("1.2.3")
    assert tracer is not None
    client = Client(app, runner)
    headers = {"traceparent": _PARENT, "X-Request-ID": "mine"}
    assert client.post("/predict", content=_IMAGE, headers=_NPY | headers).status_code == 200
    colour = encode(np.zeros((4, 5), np.uint8), "BMP")
    assert client.post("/predict", content=colour, headers={"Content-Type": "image/bmp"}).status_code == 200
    assert client.post("/predict", content=b"no array", headers=_NPY).status_code == 422
    assert client.get("/health/live").status_code == 200
    tracer.close()
    spans = [
        span
        for body in collector
        for resource in trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    roots = [span for span in spans if span.name == "POST /predict"]
    assert len(roots) == 3
    (mine,) = (span for span in roots if span.trace_id.hex() == _PARENT.split("-")[1])
    assert mine.parent_span_id.hex() == _PARENT.split("-")[2]
    attributes = {entry.key: entry.value for entry in mine.attributes}
    assert attributes["lipcert.request_id"].string_value == "mine"
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["http.route"].string_value == "/predict"
    for root, names in zip(roots, (["decode", "wait", "compute", "answer"],) * 2, strict=False):
        stages = sorted(
            (span for span in spans if span.parent_span_id == root.span_id), key=lambda span: span.start_time_unix_nano
        )
        assert [stage.name for stage in stages] == names
        for stage, following in itertools.pairwise(stages):
            assert stage.start_time_unix_nano <= stage.end_time_unix_nano == following.start_time_unix_nano
        assert root.start_time_unix_nano - 1e7 <= stages[0].start_time_unix_nano
        assert stages[-1].end_time_unix_nano <= root.end_time_unix_nano + 1e7
    assert {span.name for span in spans} == {"POST /predict", "decode", "wait", "compute", "answer"}


def test_without_an_endpoint_nothing_of_the_sdk_is_imported() -> None:
    code = (
        "import sys, service.api.app, service.tracing; assert service.tracing.tracer_of('') is None;"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"


def test_an_endpoint_without_libraries_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("service.tracing._NEEDED", ("opentelemetry.no_such_part",))
    assert tracer_of("") is None
    (record,) = caplog.records
    assert "pip install 'lipcert[otel]'" in record.getMessage()
