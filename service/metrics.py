"""Metrics for Prometheus: requests, stages, refusals; predictions and radii by model; batches, models, connections.

Values that every request has are gathered in memory and counted ten times a second (`Metrics.flush`): a histogram of
`prometheus_client` takes 2 us for each, and longer where processes share files.
"""

from __future__ import annotations

import functools
import time
from bisect import bisect_left
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

Stage = Literal["decode", "queue", "forward", "counterfactual", "encode"]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STAGES: tuple[Stage, ...] = ("decode", "queue", "forward", "counterfactual", "encode")
_CACHED = 1024
_BUCKETS_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BUCKETS_STAGE_S = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_BUCKETS_RADIUS = (0.0, 0.05, 36 / 255, 0.25, 0.5, 0.75, 1.0, 1.58, 2.0, 3.0, 5.0)
_MOST_GATHERED = 65_536


class Gathered:
    """Values for one child of a histogram, which are counted together; `append` may be called from any thread."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        # Full only where nobody flushes.
        self._values: deque[float] = deque(maxlen=_MOST_GATHERED)
        self.append: Callable[[float], None] = self._values.append
        self.extend: Callable[[Iterable[float]], None] = self._values.extend

    def flush(self) -> None:
        """Count the gathered values; called from one thread at a time."""
        values: list[float] = []
        for _ in range(len(self._values)):
            values.append(self._values.popleft())
        if not values:
            return
        # As `Histogram.observe` does for one value.
        histogram = self._histogram
        bounds: Sequence[float] = histogram._upper_bounds  # pyright: ignore[reportPrivateUsage]
        for bucket, count in Counts(bisect_left(bounds, value) for value in values).items():
            histogram._buckets[bucket].inc(count)  # pyright: ignore[reportPrivateUsage]
        histogram._sum.inc(sum(values))  # pyright: ignore[reportPrivateUsage]


class Metrics:
    """The metrics of one application, in a separate registry."""

    def __init__(self, shared: bool = False) -> None:
        """Start with all counters at 0.

        Args:
            shared: whether to add up the counters of all processes that are forked from this one. Then the variable
                `PROMETHEUS_MULTIPROC_DIR` must name their folder before `prometheus_client` is imported.
        """
        self._shared = shared
        self._registry = registry = CollectorRegistry()
        if not shared:
            ProcessCollector(registry=registry)
        labels = ["method", "route", "status"]
        requests = Counter("lipcert_http_requests", "HTTP requests answered.", labels, registry=registry)
        duration_s = Histogram(
            "lipcert_http_request_duration_seconds",
            "Seconds from the first byte of the request to the last byte of the answer.",
            labels,
            buckets=_BUCKETS_S,
            registry=registry,
        )
        predictions = Counter("lipcert_predictions", "Images classified.", ["model"], registry=registry)
        abstentions = Counter(
            "lipcert_abstentions", "Images answered without a certified radius.", ["model"], registry=registry
        )
        radius = Histogram(
            "lipcert_certified_radius",
            "Certified L2 radius of classified images, in [0, 1] pixel units; 0 where nothing is certified.",
            ["model"],
            buckets=_BUCKETS_RADIUS,
            registry=registry,
        )
        stage_s = Histogram(
            "lipcert_stage_duration_seconds",
            "Seconds of a stage: decode and queue of each request, forward of each pass, counterfactual of each "
            "search, encode of the answers of each batch.",
            ["stage"],
            buckets=_BUCKETS_STAGE_S,
            registry=registry,
        )
        self.stage_s: Mapping[Stage, Gathered] = {stage: Gathered(stage_s.labels(stage)) for stage in _STAGES}
        """Durations of stages, to append to."""
        self._gathered = list(self.stage_s.values())

        @functools.lru_cache(_CACHED)
        def requests_of(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
            # Unknown methods share one label, so that clients cannot add labels.
            of = (method if method in _METHODS else "other", route, str(status))
            return requests.labels(*of), duration_s.labels(*of)

        @functools.lru_cache(_CACHED)
        def predictions_of(model: str) -> tuple[Counter, Counter, Gathered]:
            gathered = Gathered(radius.labels(model))
            self._gathered.append(gathered)
            return predictions.labels(model), abstentions.labels(model), gathered

        self.requests_of = requests_of
        """Requests and their duration in seconds, by method, pattern of the path, and status."""
        self.predictions_of = predictions_of
        """Images classified, the abstentions among them, and their radii, by model."""
        refusals = Counter(
            "lipcert_refusals",
            "Requests refused, by the type of the problem document; `http-STATUS` for those without a type.",
            ["reason"],
            registry=registry,
        )
        self.refusals_of: Callable[[str], Counter] = functools.lru_cache(_CACHED)(refusals.labels)
        """Refused requests by type; clients cannot add reasons."""
        batch_images = Histogram(
            "lipcert_batch_images",
            "Images that shared one pass (prediction) or one search (counterfactual).",
            ["kind"],
            buckets=_BUCKETS_IMAGES,
            registry=registry,
        )
        self.batch_images = {kind: batch_images.labels(kind) for kind in ("prediction", "counterfactual")}

        def gauge(name: str, text: str, of: Sequence[str] = (), *, adds_up: bool = False) -> Gauge:
            mode = "livesum" if adds_up else "livemax"
            return Gauge(name, text, of, multiprocess_mode=mode, registry=registry)

        self.waiting = gauge(
            "lipcert_waiting", "Requests, and parts of large ones, that no worker has taken yet.", adds_up=True
        )
        self.connections = gauge("lipcert_connections", "Open connections.", adds_up=True)
        self.in_progress = gauge("lipcert_requests_in_progress", "Requests that are not answered yet.", adds_up=True)
        self._build = gauge("lipcert_build_info", "Versions of this server; always 1.", ["version", "onnxruntime"])
        self._models = gauge(
            "lipcert_model_info",
            "Served models with their execution provider and digest; always 1.",
            ["model", "provider", "digest"],
        )
        self._rejected = gauge(
            "lipcert_model_rejected",
            "Whether a newer version of a model is not served; GET /models/NAME has the reason.",
            ["model"],
        )
        self._broken = gauge("lipcert_models_broken", "Models in the folder that cannot be served.")
        self._changed_s = gauge(
            "lipcert_models_changed_timestamp_seconds", "Unix time at which the served models were looked at last."
        )
        self._noted: Set[tuple[str, str, str]] = frozenset()
        self._named: Set[str] = frozenset()

    def note_build(self, version: str, onnxruntime: str) -> None:
        """Note the versions of the server and of ONNX Runtime."""
        self._build.labels(version, onnxruntime).set(1)

    def note_models(self, served: Set[tuple[str, str, str]], rejected: Iterable[str], broken: int) -> None:
        """Note which models are served.

        Args:
            served: name, ONNX Runtime execution provider and `sha256:<hex>` of the graph of each.
            rejected: names of those whose newer version is not served.
            broken: number of models that cannot be served.
        """
        for labels in served:
            self._models.labels(*labels).set(1)
        for labels in self._noted - served:
            # Files that several processes share have no room that is given back.
            if self._shared:
                self._models.labels(*labels).set(0)
            else:
                self._models.remove(*labels)
        self._noted = set(served)
        names = set(rejected)
        for model in {model for model, _, _ in served} | self._named:
            self._rejected.labels(model).set(model in names)
        self._named |= {model for model, _, _ in served}
        self._broken.set(broken)
        self._changed_s.set(time.time())

    def flush(self) -> None:
        """Count the gathered values; called from the event loop."""
        for gathered in self._gathered:
            gathered.flush()

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus; called from the event loop."""
        self.flush()
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
