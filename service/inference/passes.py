"""Forward passes and searches of a batch, whose images come from several requests."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from service.certificate import Certificate, Radii
from service.inference.admission import Limits
from service.inference.classifier import Classifier, Prediction, View
from service.inference.deliveries import Deliveries
from service.inference.heartbeats import LOAD_S, Beats
from service.inference.jobs import Chunk, Request
from service.inference.outcome import Decoded, Outcome, check_predictions, explain, needs_gradients, search_cost
from service.inference.pace import Pace, measure_pace
from service.inference.queues import SEARCH_SHARE, Queues
from service.metrics import Metrics
from service.pixels.images import unit_images

_log = logging.getLogger(__name__)

# Forward passes that cost at least as much as a step of a search.
_GRADIENT_PASSES = 4


class Passes:
    """Computation of batches; one that fails runs again chunk by chunk, so that one request alone fails."""

    def __init__(
        self,
        limits: Limits,
        queues: Queues,
        metrics: Metrics,
        predict_waiting: Callable[[], None],
        beats: Beats,
    ) -> None:
        """Compute nothing yet.

        Args:
            limits: largest batches.
            queues: where searches wait for their turn.
            metrics: counts batches.
            predict_waiting: computes a batch of waiting predictions, if there is one.
            beats: receives the steps of the workers.
        """
        self._beats = beats
        self._limits = limits
        self._queues = queues
        self._metrics = metrics
        self._predict_waiting = predict_waiting
        self._paces: dict[str, Pace] = {}
        """By digest of the model."""
        self._searched: set[str] = set()
        """Digests of the models whose gradients are loaded."""
        self._measuring = threading.Lock()

    def split(self, request: Request[Any], decoded: Decoded[Any], view: View) -> list[Chunk]:
        """Return the chunks of a decoded request: one, or one for each forward pass or idle worker.

        Args:
            request: not computed yet.
            decoded: its images.
            view: the model for them.
        """
        count = len(decoded.pixels_NCHW)
        request.decoded = decoded
        request.predictions = [None] * count
        # Measuring a pace loads the model and may fail, and other requests wait for this worker: it belongs to the
        # pass.
        pace = self._paces.get(decoded.classifier.digest)
        most = 1 if pace is None else count // pace.share
        if pace is not None:
            work_s = pace.alone_s + (count - 1) * pace.image_s
            if not 0.5 < work_s / request.place.work_s < 2.0:
                request.place.weigh(work_s)
        shares = min(most, 1 + self._queues.idle) if most > 1 else 1
        return _chunks(request, decoded, view, max(-(-count // self._limits.forward_batch), shares))

    def predict(self, chunks: Sequence[Chunk], deliveries: Deliveries) -> None:
        """Predict chunks; those of one view share forward passes.

        Args:
            chunks: of any views.
            deliveries: receive the requests that are complete or have failed.
        """
        latest: dict[int, list[Chunk]] = {}
        room: dict[int, int] = {}
        for chunk in chunks:
            key = id(chunk.view)
            if key not in latest or room[key] < chunk.count:
                if key in latest:
                    self._predict(latest[key], deliveries)
                latest[key], room[key] = [], self._limits.forward_batch
            latest[key].append(chunk)
            room[key] -= chunk.count
        for together in latest.values():
            self._predict(together, deliveries)

    def search(self, chunks: Sequence[Chunk], deliveries: Deliveries) -> None:
        """Compute the results that need gradients, in one batch.

        Args:
            chunks: predicted, of one view.
            deliveries: receive the requests that are complete or have failed.
        """
        with self._queues.occupied():
            self._search(chunks, deliveries)

    def _predict(self, chunks: Sequence[Chunk], deliveries: Deliveries) -> None:
        chunks = [chunk for chunk in chunks if not chunk.request.future.done()]
        if not chunks:
            return
        first = chunks[0]
        try:
            classifier = first.decoded.classifier
            pace = self._paces.get(classifier.digest) or self._measure_pace(classifier)
            self._queues.pays = pace.share
            image_NCHW = unit_images([chunk.pixels_NCHW for chunk in chunks])
            expected_s = pace.fixed_s + pace.image_s * len(image_NCHW)
            self._beats[threading.get_ident()] = time.monotonic(), "a forward pass", expected_s
            started_s = time.monotonic()
            predictions = first.view.predict(image_NCHW)
            self._metrics.stage_s["forward"].append(time.monotonic() - started_s)
        except Exception as error:
            self._alone_or_fail(chunks, error, deliveries, self._predict)
            return
        self._metrics.batch_images["prediction"].observe(len(predictions))
        offset = 0
        for chunk in chunks:
            chunk.request.images[chunk.start] = image_NCHW[offset : offset + chunk.count]
            offset += chunk.count
        for chunk in deliveries.store(chunks, predictions):
            if needs_gradients(chunk.decoded.options, _answers(chunk.request)):
                self._queue_search(chunk, deliveries)
            else:
                deliveries.computed.append(chunk.request)

    def _queue_search(self, chunk: Chunk, deliveries: Deliveries) -> None:
        """Queue the search of a predicted request; its gradients wait for those of other requests."""
        request, decoded = chunk.request, chunk.decoded
        predictions = list(_answers(request))
        try:
            check_predictions(decoded.classifier, decoded.options, predictions)
            n_images, guard = len(predictions), decoded.classifier.guard
            works = [(decoded.classifier, n_images * search_cost(decoded.options))]
            if decoded.options.novelty and guard is not None:
                works.append((guard, n_images))
            request.place.search(sum(self._seconds(*work) for work in works))
        except Exception as error:
            deliveries.fail(request, error)
            return
        request.images.clear()  # nine tenths of the memory of a request that waits
        most = max(1, self._limits.forward_batch // SEARCH_SHARE)
        self._queues.put_searches(_chunks(request, decoded, chunk.view, -(-len(predictions) // most)))

    def _seconds(self, classifier: Classifier, passes: float) -> float:
        """Return the expected time of a search, or of a guard, in units of one image each."""
        pace = self._paces.get(classifier.digest) or self._measure_pace(classifier)
        return pace.alone_s + (passes - 1) * pace.image_s

    def _search(self, chunks: Sequence[Chunk], deliveries: Deliveries) -> None:
        chunks = [chunk for chunk in chunks if not chunk.request.future.done()]
        if not chunks:
            return
        thread, classifier = threading.get_ident(), chunks[0].decoded.classifier
        pace = self._paces.get(classifier.digest)
        count = sum(chunk.count for chunk in chunks)
        # The first search of a model loads its gradient.
        is_loaded = pace is not None and (classifier.is_warm or classifier.digest in self._searched)
        step_s = _GRADIENT_PASSES * (pace.fixed_s + pace.image_s * count) if pace is not None and is_loaded else LOAD_S

        def beat() -> None:
            self._beats[thread] = time.monotonic(), "a search", step_s

        beat()
        try:
            view = _PreemptibleView(chunks[0].view, self._predict_waiting, lambda: self._is_abandoned(chunks), beat)
            started_s = time.monotonic()
            predictions = explain(view, [_predicted(chunk) for chunk in chunks])
            self._metrics.stage_s["counterfactual"].append(time.monotonic() - started_s)
        except _AbandonedError:
            return
        except Exception as error:
            self._alone_or_fail(chunks, error, deliveries, self._search)
            return
        self._searched.add(classifier.digest)
        self._metrics.batch_images["counterfactual"].observe(len(predictions))
        deliveries.computed += [chunk.request for chunk in deliveries.store(chunks, predictions)]

    def _is_abandoned(self, chunks: Sequence[Chunk]) -> bool:
        return self._queues.is_closed or all(chunk.request.future.done() for chunk in chunks)

    def _alone_or_fail(
        self,
        chunks: Sequence[Chunk],
        error: Exception,
        deliveries: Deliveries,
        run: Callable[[Sequence[Chunk], Deliveries], None],
    ) -> None:
        if len(chunks) == 1:
            deliveries.fail(chunks[0].request, error)
            return
        _log.warning("a batch of %d requests failed and runs again one by one: %s", len(chunks), error)
        for chunk in chunks:
            run([chunk], deliveries)

    def _measure_pace(self, classifier: Classifier) -> Pace:
        """Measure a pace once: two measurements at the same time would slow each other."""
        thread = threading.get_ident()

        def beat(expected_s: float) -> None:
            self._beats[thread] = time.monotonic(), "the first passes of a model", expected_s

        # Another model may be loading.
        beat(LOAD_S)
        with self._queues.occupied(), self._measuring:
            beat(0.0 if classifier.is_warm else LOAD_S)
            pace = self._paces.get(classifier.digest)
            if pace is None:
                pace = self._paces[classifier.digest] = measure_pace(classifier, beat)
        return pace


def _answers(request: Request[Any]) -> Iterator[Prediction]:
    """Yield the predictions of a request that are computed."""
    return (prediction for prediction in request.predictions if prediction is not None)


def _chunks(request: Request[Any], decoded: Decoded[Any], view: View, pieces: int) -> list[Chunk]:
    """Return the images in pieces of nearly one size, all still to compute."""
    pixels_NCHW = decoded.pixels_NCHW
    count = len(pixels_NCHW)
    pixels = pixels_NCHW[0, 0].size if count else 0
    request.left = pieces
    chunks: list[Chunk] = []
    for piece in range(pieces):
        start, stop = count * piece // pieces, count * (piece + 1) // pieces
        images = pixels_NCHW[start:stop]
        chunks.append(Chunk(request, decoded, view, start, images, stop - start, (stop - start) * pixels))
    return chunks


def _predicted(chunk: Chunk) -> Outcome[Any]:
    """Return the outcome of a predicted chunk, for the search."""
    predictions = chunk.request.predictions[chunk.start : chunk.start + chunk.count]
    return Outcome(
        chunk.decoded.classifier,
        chunk.decoded.options,
        unit_images([chunk.pixels_NCHW]),
        [prediction for prediction in predictions if prediction is not None],
    )


class _AbandonedError(Exception):
    """No client waits for the rest of a search."""


class _PreemptibleView:
    """A view whose search lets predictions pass before each of its passes, and ends when no client waits for it."""

    def __init__(
        self,
        view: View,
        predict_waiting: Callable[[], None],
        is_abandoned: Callable[[], bool],
        beat: Callable[[], None],
    ) -> None:
        self._view = view
        self._beat = beat
        self._predict_waiting = predict_waiting
        self._is_abandoned = is_abandoned

    @property
    def certificate(self) -> Certificate:
        return self._view.certificate

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, Radii]:
        self._let_pass()
        return self._view.classify(image_NCHW)

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._let_pass()
        return self._view.margin_gradient(image_NCHW, weights_NK)

    def _let_pass(self) -> None:
        self._predict_waiting()
        if self._is_abandoned():
            raise _AbandonedError
        self._beat()
