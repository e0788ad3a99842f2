"""Traces by OpenTelemetry: a span for each request, with spans of its stages, sent by OTLP over HTTP.

Off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) is set and the extra `otel` is installed; nothing of
it is imported otherwise. Its other variables are those of OpenTelemetry: `OTEL_SERVICE_NAME`,
`OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_SDK_DISABLED` ...
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider  # pyright: ignore[reportMissingImports]
    from opentelemetry.trace import Span

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_PROPAGATED = (b"traceparent", b"tracestate")
_LAST_MS = 500
"""Milliseconds for the last spans when the server ends."""
_OF_PROBES = ("/health/", "/v2/health/", "/metrics")

_log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """A stage of a request, in seconds of `time.monotonic`."""

    name: str
    start_s: float
    end_s: float


def is_wanted() -> bool:
    """Return whether the environment asks for traces."""
    return any(os.environ.get(name) for name in _ENDPOINTS) and os.environ.get("OTEL_SDK_DISABLED", "") != "true"


def tracer_of(version: str) -> Tracer | None:
    """Return a tracer; null where the environment does not ask for it, or, with a warning, where libraries are missing.

    Called after a fork: it starts a thread, which sends spans.
    """
    if not is_wanted():
        return None
    missing = [name for name in _NEEDED if not _is_installed(name)]
    if missing:
        _log.warning(
            "no traces: OTEL_EXPORTER_OTLP_ENDPOINT is set, and %s is not installed; `pip install 'lipcert[otel]'`",
            " and ".join(missing),
        )
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # pyright: ignore[reportMissingImports]
    from opentelemetry.sdk.resources import Resource  # pyright: ignore[reportMissingImports]
    from opentelemetry.sdk.trace import TracerProvider  # pyright: ignore[reportMissingImports]
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # pyright: ignore[reportMissingImports]

    resource = Resource.create(
        {"service.name": os.environ.get("OTEL_SERVICE_NAME") or "lipcert", "service.version": version}
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


class Tracer:
    """Makes the spans of requests. It never blocks: a span that cannot be sent is dropped by the library."""

    def __init__(self, provider: TracerProvider) -> None:
        """Use a provider of the SDK."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("lipcert")
        self._propagator = TraceContextTextMapPropagator()
        # Clocks of stages and of spans.
        self._epoch_s = time.time() - time.monotonic()

    def start(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], number: str) -> Span | None:
        """Return the span of a request, a child of the caller's `traceparent`; null for probes.

        Args:
            method: of the request.
            path: of the request.
            headers: of the request.
            number: its identifier.
        """
        from opentelemetry.trace import SpanKind

        if path.startswith(_OF_PROBES):
            return None
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers if name in _PROPAGATED}
        return self._tracer.start_span(
            method,
            context=self._propagator.extract(carrier) if carrier else None,
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": path[:200], "lipcert.request_id": number},
        )

    def end(self, span: Span, method: str, route: str, status: int, stages: Iterable[Stage]) -> None:
        """End the span of a request.

        Args:
            span: of `start`.
            method: of the request.
            route: pattern of the path.
            status: of the answer.
            stages: those that the request has passed.
        """
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        context = set_span_in_context(span)
        for stage in stages:
            of_stage = self._tracer.start_span(stage.name, context=context, start_time=self._ns(stage.start_s))
            of_stage.end(self._ns(stage.end_s))
        span.update_name(f"{method} {route}")
        attributes: Mapping[str, str | int] = {"http.route": route, "http.response.status_code": status}
        span.set_attributes(attributes)
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send the last spans, for a moment."""
        with contextlib.suppress(Exception):
            self._provider.force_flush(_LAST_MS)

    def _ns(self, seconds: float) -> int:
        return int((self._epoch_s + seconds) * 1e9)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
