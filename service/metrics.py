"""Counters for Prometheus: requests and their latency by route and status, predictions and abstentions by model."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "lipcert_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._duration_s = Histogram(
            "lipcert_http_request_duration_seconds",
            "Seconds from the first byte of the request to the last byte of the answer.",
            ["method", "route", "status"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._predictions = Counter("lipcert_predictions", "Images classified.", ["model"], registry=self._registry)
        self._abstentions = Counter(
            "lipcert_abstentions",
            "Images answered without a certified radius.",
            ["model"],
            registry=self._registry,
        )

    def count_predictions(self, model: str, certified: Iterable[bool]) -> None:
        """Count the images that a model answered, and those whose answer certifies nothing."""
        for is_certified in certified:
            self._predictions.labels(model).inc()
            if not is_certified:
                self._abstentions.labels(model).inc()

    def count_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        """Count one HTTP request; methods nobody defined share one label, so that clients cannot add labels."""
        labels = (method if method in _METHODS else "other", route, str(status))
        self._requests.labels(*labels).inc()
        self._duration_s.labels(*labels).observe(duration_s)

    def exposition(self) -> bytes:
        """All counters in the text format of Prometheus."""
        return generate_latest(self._registry)


class MetricsMiddleware:
    """Counts every HTTP request; plain ASGI, so bodies stream through untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = perf_counter()
        status = 500  # unless an answer starts: an exception passes here before it becomes an answer

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            # The route is its pattern, /models/{name}: paths would let clients add labels without end.
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.count_request(scope["method"], route, status, perf_counter() - started_s)
