"""Metrics for Prometheus: requests and latency by route and status, predictions and abstentions by model, batches."""

from __future__ import annotations

import functools

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CACHED = 1024
_BUCKETS_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The metrics of one application, in a separate registry."""

    def __init__(self, shared: bool = False) -> None:
        """Start with all counters at 0.

        Args:
            shared: whether to add up the counters of all processes that are forked from this one. Then the variable
                `PROMETHEUS_MULTIPROC_DIR` must name their folder before `prometheus_client` is imported.
        """
        self._shared = shared
        self._registry = CollectorRegistry()
        if not shared:
            ProcessCollector(registry=self._registry)
        requests = Counter(
            "lipcert_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        duration_s = Histogram(
            "lipcert_http_request_duration_seconds",
            "Seconds from the first byte of the request to the last byte of the answer.",
            ["method", "route", "status"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        predictions = Counter("lipcert_predictions", "Images classified.", ["model"], registry=self._registry)
        abstentions = Counter(
            "lipcert_abstentions",
            "Images answered without a certified radius.",
            ["model"],
            registry=self._registry,
        )

        @functools.lru_cache(_CACHED)
        def requests_of(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
            # Unknown methods share one label, so that clients cannot add labels.
            labels = (method if method in _METHODS else "other", route, str(status))
            return requests.labels(*labels), duration_s.labels(*labels)

        @functools.lru_cache(_CACHED)
        def predictions_of(model: str) -> tuple[Counter, Counter]:
            return predictions.labels(model), abstentions.labels(model)

        self.requests_of = requests_of
        """Requests and their duration in seconds, by method, pattern of the path, and status."""
        self.predictions_of = predictions_of
        """Images classified, and the abstentions among them, by model."""
        self._models = Gauge(
            "lipcert_model_info",
            "Served models with their execution provider and digest; always 1.",
            ["model", "provider", "digest"],
            multiprocess_mode="livemax",
            registry=self._registry,
        )
        batch_images = Histogram(
            "lipcert_batch_images",
            "Images that shared one pass (prediction) or one search (counterfactual).",
            ["kind"],
            buckets=_BUCKETS_IMAGES,
            registry=self._registry,
        )
        self.batch_images = {kind: batch_images.labels(kind) for kind in ("prediction", "counterfactual")}
        self.waiting = Gauge(
            "lipcert_waiting",
            "Requests, and parts of large ones, that no worker has taken yet.",
            multiprocess_mode="livesum",
            registry=self._registry,
        )

    def note_model(self, model: str, provider: str, digest: str) -> None:
        """Note a served model.

        Args:
            model: its name.
            provider: ONNX Runtime execution provider.
            digest: `sha256:<hex>` of its graph.
        """
        self._models.labels(model, provider, digest).set(1)

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
