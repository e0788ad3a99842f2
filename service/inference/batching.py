"""Dynamic batching: requests that wait at the same time share a forward pass.

::

    coroutine of a request          worker threads                                event loop
    ---------------------           ---------------------------------------      -----------------
    admit, read the body  ──► queue ──► decode each ─► one pass per view ─┬─► answer each ──► all at once
                                            counterfactual wanted ────────┘
                                            queue of searches ─► one search per view ─► answer each

An image of a few thousand pixels is decoded where it arrives: that takes less time than reading its HTTP request does,
and several times as long on a worker, because decoders let go of the interpreter's lock and wait for it again.

A worker that is free takes what is waiting and never waits for more (unless `max_delay_s` says so): while it computes,
the next batch gathers by itself. A pass of the network runs without the interpreter's lock, so workers overlap.

A search for counterfactuals takes many passes. It has a queue of its own and makes way for predictions before each
of its passes, so that a prediction never waits for a whole search.

What is wrong with one request is answered to that request: each is decoded and answered on its own, and if a shared
pass fails, its images run again alone. That a batch changes no answer beyond `logit_error` is not of this module's
making: the certificate holds for any order of summation.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from service.certificate import Radii
from service.inference.classifier import Classifier, Prediction, View, counterfactuals
from service.inference.counterfactual import Counterfactual
from service.errors import BusyError, DeadlineError, InputError, OverloadedError
from service.pixels.images import to_unit
from service.metrics import Metrics
from service.shapes import Float64, UInt8

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)

# Bytes of requests that one worker decodes before it computes: a large file does not make many small ones wait.
_DECODED_BYTES = 1024 * 1024
_SMALL_BYTES = 64 * 1024
_SMALL_PIXELS = 256 * 1024
# No clock of an event loop is coarser.
_CLOCK_S = 0.001
# See `Pace.share`.
_MOST_SHARE = 32
_LEAST_PASS_S = 0.003
# A search keeps this share of a forward batch: each image of it costs several passes, and predictions wait for one.
_SEARCH_SHARE = 2
# So many batches of predictions go before a search that waits,
_MOST_IN_A_ROW = 4
# and images that wait for a search have at most so many times the pixels that share a pass.
_WAITING_BATCHES = 16


@dataclass(frozen=True)
class Decoded:
    """A request that has been read: images of one shape for one model."""

    classifier: Classifier
    pixels_NCHW: UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]
    """As they were sent: 0..255, or in [0, 1]."""
    resize: bool = False
    counterfactual: bool = False
    target: int | None = None
    """Class that the counterfactuals shall have."""


class Question(Protocol[Answer_co]):
    """A request; what its methods raise is the answer to this request alone."""

    def decode_at_once(self) -> Decoded | None:
        """Read the request on the event loop, if that takes no longer than handing it to a worker; None otherwise."""
        ...

    def decode(self) -> Decoded:
        """Read the request, on a worker thread."""
        ...

    def answer(
        self,
        classifier: Classifier,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        predictions: Sequence[Prediction],
        found: Sequence[Counterfactual] | None,
    ) -> Answer_co:
        """Put into words, on a worker thread, what was computed about images (pixels in [0, 1]).

        `found` is None where no counterfactual was asked for.
        """
        ...


@dataclass(frozen=True)
class Limits:
    """How much a `Batcher` takes at once, and for how long."""

    workers: int = 1
    """Threads that decode, compute and answer."""
    forward_batch: int = 32
    """Most images that share one pass."""
    max_delay_s: float = 0.0
    """How long a request waits for others while the batch is not full; 0 takes what is there."""
    max_requests: int = 1024
    """Requests that are read, wait or are computed at the same time; more are refused."""
    max_bytes: int = 256 * 1024 * 1024
    """The same for the bytes of their bodies."""
    max_pixels: int = 2 * 1024 * 1024
    """Requests whose images have more pixels together than this do not share a pass or a search: memory goes with
    pixels, and a file of a few thousand bytes can have millions."""


class Batcher:
    """Answers `Question`s on worker threads, which start with the first one."""

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        """Nothing runs yet.

        Raises:
            ValueError: `workers` or `forward_batch` below 1.
        """
        if limits.workers < 1 or limits.forward_batch < 1:
            raise ValueError(f"a batcher needs 1 worker and batches of 1 image or more, got {limits}")
        self._limits = limits
        self._metrics = metrics
        self._threads: list[threading.Thread] = []
        # Everything of these is guarded by the condition; it wakes workers.
        self._condition = threading.Condition()
        self._questions: deque[_Request[Any]] = deque()
        self._parts: deque[_Part] = deque()
        """Parts of batches that are decoded and wait for their pass."""
        self._searches: deque[_Part] = deque()
        self._idle = 0
        self._away = 0
        """Workers that are in the middle of something long."""
        self._in_a_row = 0
        """Batches of predictions since a search was taken."""
        self._closed = False
        self._python = threading.Lock()
        """Held by the worker that decodes or answers."""
        self._paces: dict[str, Pace] = {}
        """By the digest of the model."""
        self._pace = Pace(0.0, 0.0)
        """Of the batch that was computed last."""
        # These belong to the event loop.
        self._open: set[_Request[Any] | _Reader] = set()
        self._arrived: list[_Request[Any]] = []
        self._admitted_requests = 0
        self._admitted_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._timer_loop: asyncio.AbstractEventLoop | None = None

    def admit(self, n_bytes: int) -> None:
        """Hold a place for a request while it is read and answered; `release` gives it back.

        Args:
            n_bytes: the declared or largest possible length of its body.

        Raises:
            OverloadedError: there is no place; nothing of the body needs to be read.
        """
        limits = self._limits
        # One request may always come in: a body above the limit of bytes is the body's own limit to refuse.
        full = self._admitted_requests > 0 and self._admitted_bytes + n_bytes > limits.max_bytes
        if full or self._admitted_requests >= limits.max_requests:
            raise OverloadedError(self._admitted_requests)
        self._admitted_requests += 1
        self._admitted_bytes += n_bytes

    def release(self, n_bytes: int) -> None:
        """Give back what `admit` held."""
        self._admitted_requests -= 1
        self._admitted_bytes -= n_bytes

    async def in_time(self, reading: Coroutine[Any, Any, Answer], deadline_s: float) -> Answer:
        """What `reading` gives, which a slow client can make last.

        Raises:
            DeadlineError: it took longer than this many seconds, and was cancelled.
            Exception: whatever it raises itself.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        reader = _Reader(task, loop, loop.time() + deadline_s, deadline_s)
        self._watch(reader)
        try:
            return await reading
        except asyncio.CancelledError:
            if reader.error is None:
                raise
            task.uncancel()
            raise reader.error from None
        finally:
            self._open.discard(reader)
            # Garbage is rarely looked for: no error may hold itself, and with it a body, through this frame.
            del reader, task

    async def ask(self, question: Question[Answer], n_bytes: int, deadline_s: float, waited_s: float = 0.0) -> Answer:
        """The answer to a question.

        Args:
            question: what to do.
            n_bytes: how much there is to decode.
            deadline_s: seconds after which nobody waits for the answer.
            waited_s: how many of them have passed.

        Raises:
            DeadlineError: the deadline passed; what was computed is thrown away.
            BusyError: the batcher is closed, or was before the answer was there.
            Exception: whatever the question's own methods raise.
        """
        if self._closed:
            raise _stopping()
        loop = asyncio.get_running_loop()
        now = loop.time()
        request = _Request(question, n_bytes, loop, loop.create_future(), now, now + deadline_s - waited_s, deadline_s)
        request.decoded = question.decode_at_once()
        self._watch(request)
        try:
            # Those that arrived together go to the workers together, after the last of them.
            self._arrived.append(request)
            if len(self._arrived) == 1:
                loop.call_soon(self._hand_over)
            return await request.future
        finally:
            self._open.discard(request)
            del request  # as in `in_time`

    def _hand_over(self) -> None:
        with self._condition:
            self._questions.extend(self._arrived)
            self._note_waiting()
            if self._is_worth_a_worker():
                self._condition.notify()
        self._arrived.clear()
        if not self._threads:
            self._start()

    def close(self) -> None:
        """Let the workers finish what they compute, and end them; `BusyError` is the answer to questions that wait."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for request in list(self._open):
            # Its loop may be closed by now: then nobody waits.
            with contextlib.suppress(RuntimeError):
                # After the outcomes that the workers have just handed over.
                request.loop.call_soon_threadsafe(request.settle, _stopping())

    def _start(self) -> None:
        self._threads = [
            threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
            for number in range(self._limits.workers)
        ]
        for thread in self._threads:
            thread.start()

    def _watch(self, request: _Request[Any] | _Reader) -> None:
        """One timer for all deadlines, at the earliest."""
        self._open.add(request)
        if self._timer is None or self._timer_loop is not request.loop or request.deadline < self._timer_at:
            self._expire_at(request.deadline, request.loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for request in [request for request in self._open if request.deadline <= now]:
            self._open.discard(request)
            request.settle(DeadlineError(request.deadline_s))
        self._forget()
        self._timer = None
        if self._open:
            self._expire_at(min(request.deadline for request in self._open), loop)

    def _forget(self) -> None:
        """Let go of what nobody waits for: its place is given to others, so its bytes must not stay."""
        with self._condition:
            self._questions = deque(request for request in self._questions if not request.future.done())
            self._parts = deque(part for part in self._parts if not part.request.future.done())
            self._searches = deque(part for part in self._searches if not part.request.future.done())
            self._note_waiting()

    def _note_waiting(self) -> None:
        """Where a queue has changed, and the condition is held."""
        self._metrics.note_waiting(len(self._questions) + len(self._parts) + len(self._searches))

    def _expire_at(self, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # uvloop counts whole milliseconds, and gives a handle without a time for what is due at once.
        self._timer = loop.call_at(deadline + _CLOCK_S, self._expire, loop)
        self._timer_at = deadline
        self._timer_loop = loop

    # From here on: worker threads.

    def _work(self) -> None:
        while self._wait_for_work():
            self._compute_next(searches=True)

    def _compute_next(self, searches: bool) -> None:
        """Take, decode, compute and answer one batch, if there is one; of searches only if wanted."""
        done = _Done()
        # One worker at a time takes, decodes and answers: threads that all run Python only take the interpreter's lock
        # from each other. Whoever comes second finds a fuller batch.
        with self._python:
            batch = self._take(searches)
            if batch is None:
                return
            is_small = sum(request.n_bytes for request in batch.requests if request.decoded is None) <= _SMALL_BYTES
            parts = self._decode_all(batch, done) if is_small else []
        if not is_small:
            # Decoders of large files mostly run without the interpreter's lock.
            with self._taking_long():
                parts = self._decode_all(batch, done)
        self._compute(batch, parts, done)

    def _compute(self, batch: _Batch, parts: list[_Part], done: _Done) -> None:
        """Everything after decoding, and the answers on their way."""
        try:
            for view, group in _by_view(parts):
                for together in _filled(group, self._limits.forward_batch):
                    self._predict(view, together, done)
            for view, group in _by_view(batch.searches):
                with self._taking_long():
                    self._search(view, group, done)
        except Exception as error:  # a defect of this module: the worker goes on, and nobody waits in vain
            _log.exception("a worker failed on a batch")
            for request in {*batch.requests, *(part.request for part in [*parts, *batch.searches])}:
                done.fail(request, error)
        # Hashing and encoding large images mostly runs without the interpreter's lock.
        with self._python if done.pixels <= _SMALL_PIXELS else contextlib.nullcontext():
            done.answer_all()
        done.deliver()

    def _wait_for_work(self) -> bool:
        """Return when there is something to do; false at the end."""
        with self._condition:
            while not self._closed:
                delay_s = self._delay_s()
                if self._searches or self._parts or (self._questions and delay_s <= 0.0):
                    return True
                self._idle += 1
                self._condition.wait(delay_s if self._questions else None)
                self._idle -= 1
            return False

    def _take(self, searches: bool) -> _Batch | None:
        """What one worker does next: questions and parts to predict, or else, if wanted, searches.

        Searches have their turn even if there is always something to predict: they let it pass anyway.
        """
        with self._condition:
            waiting = bool(self._questions or self._parts) and self._delay_s() <= 0.0
            # What waits for a search is decoded already: more of it has to wait as it was sent.
            is_full = sum(part.pixels for part in self._searches) >= _WAITING_BATCHES * self._limits.max_pixels
            is_turn = not waiting or is_full or self._in_a_row >= _MOST_IN_A_ROW
            if searches and self._searches and is_turn:
                self._in_a_row = 0
                return _Batch([], [], self._take_searches())
            if waiting and not is_full:
                self._in_a_row += searches
                return self._take_predictions()
            return None

    def _decode_all(self, batch: _Batch, done: _Done) -> list[_Part]:
        """All parts to predict; requests beyond the limit of pixels go back to their place in the queue."""
        parts = list(batch.parts)
        pixels = sum(part.pixels for part in parts)
        for number, request in enumerate(batch.requests):
            if pixels >= self._limits.max_pixels:
                with self._condition:
                    self._questions.extendleft(reversed(batch.requests[number:]))
                    self._note_waiting()
                del batch.requests[number:]
                break
            decoded = self._decode(request, done)
            pixels += sum(part.request.pixels for part in decoded)
            parts += decoded
        return parts

    def _delay_s(self) -> float:
        """How much longer the first question may wait for others."""
        limits = self._limits
        if limits.max_delay_s <= 0.0 or self._parts or not self._questions:
            return 0.0
        if len(self._questions) >= limits.forward_batch:
            return 0.0
        first = self._questions[0]
        return first.arrived + limits.max_delay_s - first.loop.time()

    def _take_predictions(self) -> _Batch:
        limits = self._limits
        waiting = self._waiting()
        # What was gathered on purpose stays together: the rest would wait for others again.
        sharing = 1 + self._idle if limits.max_delay_s <= 0.0 else 1
        room = min(limits.forward_batch, max(self._pace.share, -(-waiting // sharing)))
        parts: list[_Part] = []
        pixels = 0
        while self._parts and (not parts or (self._parts[0].count <= room and pixels < limits.max_pixels)):
            part = self._parts.popleft()
            parts.append(part)
            room -= part.count
            pixels += part.pixels
        requests: list[_Request[Any]] = []
        n_bytes = 0
        while self._questions and room > 0 and (not requests or n_bytes + self._questions[0].n_bytes <= _DECODED_BYTES):
            request = self._questions.popleft()
            requests.append(request)
            n_bytes += request.n_bytes
            room -= 1
        self._note_waiting()
        if self._waiting() and self._is_worth_a_worker():
            self._condition.notify()
        return _Batch(requests, parts, [])

    def _waiting(self) -> int:
        """Images to predict; requests that are not decoded count as one."""
        return len(self._questions) + sum(part.count for part in self._parts)

    def _is_worth_a_worker(self) -> bool:
        """Whether to wake a worker for what waits: always if no other is awake that comes for it soon."""
        nobody_comes = self._idle + self._away >= len(self._threads)
        return self._idle > 0 and (nobody_comes or self._waiting() >= self._pace.share)

    @contextlib.contextmanager
    def _taking_long(self) -> Generator[None]:
        """Around what keeps this worker for longer than a pass: who waits is not to wait for it."""
        with self._condition:
            self._away += 1
            if self._waiting() and self._is_worth_a_worker():
                self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                self._away -= 1

    def _take_searches(self) -> list[_Part]:
        """Searches of one view, in order; those of others keep their places."""
        room = max(1, self._limits.forward_batch // _SEARCH_SHARE)
        view = self._searches[0].view
        room = min(room, max(1, -(-sum(part.count for part in self._searches) // (1 + self._idle))))
        taken: list[_Part] = []
        others: list[_Part] = []
        pixels = 0
        while self._searches and room > 0:
            part = self._searches.popleft()
            too_many = part.count > room or pixels + part.pixels > self._limits.max_pixels
            if part.view is not view or (taken and too_many):
                others.append(part)
                continue
            taken.append(part)
            room -= part.count
            pixels += part.pixels
        self._searches.extendleft(reversed(others))
        self._note_waiting()
        if self._searches and self._idle:
            self._condition.notify()
        return taken

    def _decode(self, request: _Request[Any], done: _Done) -> list[_Part]:
        """The part that this worker computes itself; others are left to whoever is free."""
        if request.future.done():  # its deadline has passed, or its client is gone
            return []
        try:
            decoded = request.decoded or request.question.decode()
            view = decoded.classifier.view(decoded.pixels_NCHW.shape[1:], decoded.resize)
        except Exception as error:
            done.fail(request, error)
            return []
        count = len(decoded.pixels_NCHW)
        request.decoded = decoded
        request.predictions = [None] * count
        # Measuring a pace loads the model, may fail, and others wait for this worker: that belongs to the pass.
        pace = self._paces.get(decoded.classifier.digest)
        shares = 1 if pace is None else min(1 + self._idle, count // pace.share)
        pieces = max(-(-count // self._limits.forward_batch), shares, 1)
        parts = request.split(view, pieces)
        if len(parts) > 1:
            with self._condition:
                self._parts.extend(parts[1:])
                self._note_waiting()
                self._condition.notify(len(parts) - 1)
        return parts[:1]

    def _predict(self, view: View, parts: list[_Part], done: _Done) -> None:
        parts = [part for part in parts if not part.request.future.done()]
        if not parts:
            return
        try:
            self._pace = self._pace_of(parts[0].classifier)
            image_NCHW = _unit_images([part.pixels_NCHW for part in parts])
            predictions = view.predict(image_NCHW)
        except Exception as error:
            self._alone_or_fail(parts, error, done, lambda part: self._predict(view, [part], done))
            return
        self._metrics.count_batch("prediction", len(predictions))
        offset = 0
        for part in parts:
            part.request.images[part.start] = image_NCHW[offset : offset + part.count]
            part.request.predictions[part.start : part.stop] = predictions[offset : offset + part.count]
            offset += part.count
            if self._is_last(part):
                self._after_prediction(part.request, view, done)

    def _pace_of(self, classifier: Classifier) -> Pace:
        pace = self._paces.get(classifier.digest)
        if pace is None:
            with self._taking_long():
                pace = self._paces[classifier.digest] = measure_pace(classifier)
        return pace

    def _after_prediction(self, request: _Request[Any], view: View, done: _Done) -> None:
        decoded = request.decoded
        assert decoded is not None
        if not decoded.counterfactual:
            done.answer(request)
            return
        count = len(decoded.pixels_NCHW)
        try:
            decoded.classifier.check_targets(request.predicted(), [decoded.target] * count)
        except Exception as error:
            done.fail(request, error)
            return
        request.found = list[Counterfactual | None]([None] * count)
        request.images.clear()  # nine tenths of what a request takes while it waits
        parts = request.split(view, -(-count // max(1, self._limits.forward_batch // _SEARCH_SHARE)))
        with self._condition:
            self._searches.extend(parts)
            self._note_waiting()
            if self._idle:
                self._condition.notify(len(parts))

    def _search(self, view: View, parts: list[_Part], done: _Done) -> None:
        parts = [part for part in parts if not part.request.future.done()]
        if not parts:
            return
        predictions = [prediction for part in parts for prediction in part.predictions()]
        targets = [target for part in parts for target in [part.target] * part.count]
        try:
            found = counterfactuals(
                _MakingWay(self, view, parts), np.concatenate([part.image_NCHW for part in parts]), predictions, targets
            )
        except _AbandonedError:
            return
        except Exception as error:
            self._alone_or_fail(parts, error, done, lambda part: self._search(view, [part], done))
            return
        self._metrics.count_batch("counterfactual", len(found))
        offset = 0
        for part in parts:
            assert part.request.found is not None
            part.request.found[part.start : part.stop] = found[offset : offset + part.count]
            offset += part.count
            if self._is_last(part):
                done.answer(part.request)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def predict_what_waits(self) -> None:
        """Compute one batch of predictions if there is one: called by a worker that is in the middle of a search."""
        if self._questions or self._parts:
            self._compute_next(searches=False)

    def _alone_or_fail(self, parts: list[_Part], error: Exception, done: _Done, run: Any) -> None:
        if len(parts) == 1:
            done.fail(parts[0].request, error)
            return
        _log.warning("a batch of %d requests failed and runs again one by one: %s", len(parts), error)
        for part in parts:
            run(part)

    def _is_last(self, part: _Part) -> bool:
        with self._condition:
            part.request.left -= 1
            return part.request.left == 0


@dataclass(frozen=True)
class Pace:
    """How long a pass of the network takes: `fixed_s + n * image_s` for n images."""

    fixed_s: float
    """What a pass costs however many images it has: the weights are read, and the interpreter has its share."""
    image_s: float

    @functools.cached_property
    def share(self) -> int:
        """Images for which it pays that one more worker runs a pass of its own; at least 1.

        The pass spends as much time on them as on itself, and takes longer than waking a worker, and than the answers
        to the pass before take to bring the next requests.
        """
        if self.image_s <= 0.0:
            return 1
        efficient = min(_MOST_SHARE, self.fixed_s / self.image_s)
        long_enough = (_LEAST_PASS_S - self.fixed_s) / self.image_s
        return max(1, math.ceil(max(efficient, long_enough)))


def measure_pace(classifier: Classifier) -> Pace:
    """The pace of a model, from passes of one and of four black images; the first pass also loads it."""
    view = classifier.view(classifier.input_shape)
    seconds: dict[int, float] = {}
    for count in (1, 4):
        image_NCHW = np.zeros((count, *classifier.input_shape))
        view.classify(image_NCHW)
        took: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            view.classify(image_NCHW)
            took.append(time.perf_counter() - start)
        seconds[count] = min(took)
    image_s = max((seconds[4] - seconds[1]) / 3.0, seconds[1] / _MOST_SHARE)
    return Pace(max(seconds[1] - image_s, 0.0), image_s)


class _Request(Generic[Answer]):
    """A question on its way."""

    __slots__ = (
        "arrived", "deadline", "deadline_s", "decoded", "found", "future", "images", "left", "loop", "n_bytes",
        "predictions", "question",
    )  # fmt: skip

    def __init__(
        self,
        question: Question[Answer],
        n_bytes: int,
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Answer],
        arrived: float,
        deadline: float,
        deadline_s: float,
    ) -> None:
        self.question = question
        self.n_bytes = n_bytes
        self.loop = loop
        self.future = future
        self.arrived = arrived
        self.deadline = deadline
        self.deadline_s = deadline_s
        self.decoded: Decoded | None = None
        self.images: dict[int, np.ndarray] = {}
        """Pixels in [0, 1] of each part, by its start, as parts are computed; none while it waits for a search."""
        self.predictions: list[Prediction | None] = []
        self.found: list[Counterfactual | None] | None = None
        """One for each image, where counterfactuals are wanted."""
        self.left = 0
        """Parts that are not computed yet."""

    def split(self, view: View, pieces: int) -> list[_Part]:
        """The images in pieces of nearly one size, all of them still to do."""
        assert self.decoded is not None
        count = len(self.decoded.pixels_NCHW)
        bounds = [count * piece // pieces for piece in range(pieces + 1)]
        parts = [_Part(self, view, start, stop) for start, stop in itertools.pairwise(bounds)]
        self.left = len(parts)
        return parts

    @property
    def pixels(self) -> int:
        """Of all images, not counting channels."""
        return 0 if self.decoded is None else self.decoded.pixels_NCHW[:, 0].size

    def predicted(self) -> list[Prediction]:
        """All predictions, once every part is done."""
        return [prediction for prediction in self.predictions if prediction is not None]

    def image_NCHW(self) -> np.ndarray:
        """All images, likewise."""
        if self.images:
            return _joined([self.images[start] for start in sorted(self.images)])
        assert self.decoded is not None
        return _unit_images([self.decoded.pixels_NCHW])

    def settle(self, outcome: Answer | Exception) -> None:
        """Give the answer, on the event loop, unless somebody did before or nobody waits any more."""
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


@dataclass(eq=False)
class _Reader:
    """A body on its way."""

    task: asyncio.Task[Any]
    loop: asyncio.AbstractEventLoop
    deadline: float
    deadline_s: float
    error: Exception | None = None
    """Why the task was cancelled, if it was from here."""

    def settle(self, error: Exception) -> None:
        """Wait no longer."""
        if self.error is None:
            self.error = error
            self.task.cancel()


@dataclass(frozen=True)
class _Batch:
    """What a worker has taken."""

    requests: list[_Request[Any]]
    parts: list[_Part]
    searches: list[_Part]


@dataclass(frozen=True, eq=False)
class _Part:
    """Images `start` to `stop` of a request."""

    request: _Request[Any]
    view: View
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def pixels(self) -> int:
        """Not counting channels."""
        return self.pixels_NCHW[:, 0].size

    @property
    def pixels_NCHW(self) -> np.ndarray:
        assert self.request.decoded is not None
        return self.request.decoded.pixels_NCHW[self.start : self.stop]

    @property
    def image_NCHW(self) -> np.ndarray:
        return _unit_images([self.pixels_NCHW])

    @property
    def classifier(self) -> Classifier:
        assert self.request.decoded is not None
        return self.request.decoded.classifier

    @property
    def target(self) -> int | None:
        assert self.request.decoded is not None
        return self.request.decoded.target

    def predictions(self) -> list[Prediction]:
        """Of these images, once they are done."""
        done = self.request.predictions[self.start : self.stop]
        return [prediction for prediction in done if prediction is not None]


class _AbandonedError(Exception):
    """Nobody waits for the rest of a search."""


class _MakingWay:
    """A view for a search that lets predictions pass before each of its gradients, and ends when nobody waits."""

    def __init__(self, batcher: Batcher, view: View, parts: Sequence[_Part]) -> None:
        self._batcher = batcher
        self._view = view
        self._parts = parts

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, Radii]:
        return self._view.classify(image_NCHW)

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._batcher.predict_what_waits()
        if self._batcher.is_closed or all(part.request.future.done() for part in self._parts):
            raise _AbandonedError
        return self._view.margin_gradient(image_NCHW, weights_NK)


class _Done:
    """Outcomes that a worker hands to the event loop at once: waking it for each would cost more than an answer."""

    def __init__(self) -> None:
        self._computed: list[_Request[Any]] = []
        self.pixels = 0
        """Of all images that are to be answered, every channel counted."""
        self._outcomes: list[tuple[_Request[Any], Any]] = []

    def answer(self, request: _Request[Any]) -> None:
        """This request is computed."""
        self._computed.append(request)
        assert request.decoded is not None
        self.pixels += request.decoded.pixels_NCHW.size

    def answer_all(self) -> None:
        """Put into words what is computed."""
        for request in self._computed:
            assert request.decoded is not None
            found = None if request.found is None else [one for one in request.found if one is not None]
            try:
                answer = request.question.answer(
                    request.decoded.classifier, request.image_NCHW(), request.predicted(), found
                )
            except Exception as error:
                self.fail(request, error)
            else:
                self._outcomes.append((request, answer))
        self._computed.clear()

    def fail(self, request: _Request[Any], error: Exception) -> None:
        """This is the answer: of what the client did, or what there is no time for, without where it was found.

        The frames there hold the request, which holds the error.
        """
        expected = isinstance(error, InputError | BusyError)
        self._outcomes.append((request, error.with_traceback(None) if expected else error))

    def deliver(self) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Request[Any], Any]]] = {}
        for request, outcome in self._outcomes:
            by_loop.setdefault(request.loop, []).append((request, outcome))
        for loop, outcomes in by_loop.items():
            # The loop may be closed by now: then nobody waits.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, outcomes)


def _stopping() -> BusyError:
    return BusyError("this server is stopping; send the request again, to the one that takes its place")


def _settle(outcomes: list[tuple[_Request[Any], Any]]) -> None:
    for request, outcome in outcomes:
        request.settle(outcome)


def _unit_images(pixels: Sequence[np.ndarray]) -> np.ndarray:
    """All images as one array in [0, 1]; bytes are converted together."""
    if all(pixels_NCHW.dtype == np.uint8 for pixels_NCHW in pixels):
        if len(pixels) == 1:
            return to_unit(pixels[0])
        # numpy lets go of the interpreter's lock for each array of more than 500 values that it copies, and waits to
        # have it again; joining bytes does not.
        joined = b"".join([np.ascontiguousarray(pixels_NCHW).data for pixels_NCHW in pixels])
        return to_unit(np.frombuffer(joined, np.uint8).reshape(-1, *pixels[0].shape[1:]))
    return _joined([to_unit(one_NCHW) if one_NCHW.dtype == np.uint8 else one_NCHW for one_NCHW in pixels])


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _by_view(parts: list[_Part]) -> list[tuple[View, list[_Part]]]:
    groups: dict[int, list[_Part]] = {}
    for part in parts:
        groups.setdefault(id(part.view), []).append(part)
    return [(group[0].view, group) for group in groups.values()]


def _filled(parts: list[_Part], most: int) -> Generator[list[_Part]]:
    """Batches of at most `most` images, each with one part or more."""
    batch: list[_Part] = []
    count = 0
    for part in parts:
        if batch and count + part.count > most:
            yield batch
            batch, count = [], 0
        batch.append(part)
        count += part.count
    if batch:
        yield batch
