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
import logging
import threading
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any

from service.errors import BusyError, DeadlineError, OverloadedError
from service.inference.admission import CLOCK_S, Limits, Reader
from service.inference.classifier import Classifier, View
from service.inference.jobs import Answer, Batch, Part, Question, Request, by_view, filled, unit_images
from service.inference.outcome import check_options, check_predictions, explain, needs_gradients
from service.inference.pace import Pace, measure_pace
from service.inference.queues import DECODED_BYTES, MOST_IN_A_ROW, SEARCH_SHARE, WAITING_BATCHES
from service.inference.workers import SMALL_BYTES, SMALL_PIXELS, AbandonedError, Done, MakingWay
from service.metrics import Metrics

_log = logging.getLogger(__name__)


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
        self._questions: deque[Request[Any]] = deque()
        self._parts: deque[Part] = deque()
        """Parts of batches that are decoded and wait for their pass."""
        self._searches: deque[Part] = deque()
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
        self._open: set[Request[Any] | Reader] = set()
        self._arrived: list[Request[Any]] = []
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
        reader = Reader(task, loop, loop.time() + deadline_s, deadline_s)
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

    async def ask(
        self, question: Question[Answer, Any], n_bytes: int, deadline_s: float, waited_s: float = 0.0
    ) -> Answer:
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
        request = Request(question, n_bytes, loop, loop.create_future(), now, now + deadline_s - waited_s, deadline_s)
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

    def _watch(self, request: Request[Any] | Reader) -> None:
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
        self._timer = loop.call_at(deadline + CLOCK_S, self._expire, loop)
        self._timer_at = deadline
        self._timer_loop = loop

    # From here on: worker threads.

    def _work(self) -> None:
        while self._wait_for_work():
            self._compute_next(searches=True)

    def _compute_next(self, searches: bool) -> None:
        """Take, decode, compute and answer one batch, if there is one; of searches only if wanted."""
        done = Done()
        # One worker at a time takes, decodes and answers: threads that all run Python only take the interpreter's lock
        # from each other. Whoever comes second finds a fuller batch.
        with self._python:
            batch = self._take(searches)
            if batch is None:
                return
            is_small = sum(request.n_bytes for request in batch.requests if request.decoded is None) <= SMALL_BYTES
            parts = self._decode_all(batch, done) if is_small else []
        if not is_small:
            # Decoders of large files mostly run without the interpreter's lock.
            with self._taking_long():
                parts = self._decode_all(batch, done)
        self._compute(batch, parts, done)

    def _compute(self, batch: Batch, parts: list[Part], done: Done) -> None:
        """Everything after decoding, and the answers on their way."""
        try:
            for view, group in by_view(parts):
                for together in filled(group, self._limits.forward_batch):
                    self._predict(view, together, done)
            for view, group in by_view(batch.searches):
                with self._taking_long():
                    self._search(view, group, done)
        except Exception as error:  # a defect of this module: the worker goes on, and nobody waits in vain
            _log.exception("a worker failed on a batch")
            for request in {*batch.requests, *(part.request for part in [*parts, *batch.searches])}:
                done.fail(request, error)
        # Hashing and encoding large images mostly runs without the interpreter's lock.
        with self._python if done.pixels <= SMALL_PIXELS else contextlib.nullcontext():
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

    def _take(self, searches: bool) -> Batch | None:
        """What one worker does next: questions and parts to predict, or else, if wanted, searches.

        Searches have their turn even if there is always something to predict: they let it pass anyway.
        """
        with self._condition:
            waiting = bool(self._questions or self._parts) and self._delay_s() <= 0.0
            # What waits for a search is decoded already: more of it has to wait as it was sent.
            is_full = sum(part.pixels for part in self._searches) >= WAITING_BATCHES * self._limits.max_pixels
            is_turn = not waiting or is_full or self._in_a_row >= MOST_IN_A_ROW
            if searches and self._searches and is_turn:
                self._in_a_row = 0
                return Batch([], [], self._take_searches())
            if waiting and not is_full:
                self._in_a_row += searches
                return self._take_predictions()
            return None

    def _decode_all(self, batch: Batch, done: Done) -> list[Part]:
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

    def _take_predictions(self) -> Batch:
        limits = self._limits
        waiting = self._waiting()
        # What was gathered on purpose stays together: the rest would wait for others again.
        sharing = 1 + self._idle if limits.max_delay_s <= 0.0 else 1
        room = min(limits.forward_batch, max(self._pace.share, -(-waiting // sharing)))
        parts: list[Part] = []
        pixels = 0
        while self._parts and (not parts or (self._parts[0].count <= room and pixels < limits.max_pixels)):
            part = self._parts.popleft()
            parts.append(part)
            room -= part.count
            pixels += part.pixels
        requests: list[Request[Any]] = []
        n_bytes = 0
        while self._questions and room > 0 and (not requests or n_bytes + self._questions[0].n_bytes <= DECODED_BYTES):
            request = self._questions.popleft()
            requests.append(request)
            n_bytes += request.n_bytes
            room -= 1
        self._note_waiting()
        if self._waiting() and self._is_worth_a_worker():
            self._condition.notify()
        return Batch(requests, parts, [])

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

    def _take_searches(self) -> list[Part]:
        """Searches of one view, in order; those of others keep their places."""
        room = max(1, self._limits.forward_batch // SEARCH_SHARE)
        view = self._searches[0].view
        room = min(room, max(1, -(-sum(part.count for part in self._searches) // (1 + self._idle))))
        taken: list[Part] = []
        others: list[Part] = []
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

    def _decode(self, request: Request[Any], done: Done) -> list[Part]:
        """The part that this worker computes itself; others are left to whoever is free."""
        if request.future.done():  # its deadline has passed, or its client is gone
            return []
        try:
            decoded = request.decoded or request.question.decode()
            check_options(decoded.classifier, decoded.options)
            view = decoded.classifier.view(decoded.pixels_NCHW.shape[1:], decoded.options.resize)
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

    def _predict(self, view: View, parts: list[Part], done: Done) -> None:
        parts = [part for part in parts if not part.request.future.done()]
        if not parts:
            return
        try:
            self._pace = self._pace_of(parts[0].classifier)
            image_NCHW = unit_images([part.pixels_NCHW for part in parts])
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

    def _after_prediction(self, request: Request[Any], view: View, done: Done) -> None:
        decoded = request.decoded
        assert decoded is not None
        if not needs_gradients(decoded.options):
            done.answer(request)
            return
        try:
            check_predictions(decoded.classifier, decoded.options, request.predicted())
        except Exception as error:
            done.fail(request, error)
            return
        count = len(decoded.pixels_NCHW)
        request.images.clear()  # nine tenths of what a request takes while it waits
        parts = request.split(view, -(-count // max(1, self._limits.forward_batch // SEARCH_SHARE)))
        with self._condition:
            self._searches.extend(parts)
            self._note_waiting()
            if self._idle:
                self._condition.notify(len(parts))

    def _search(self, view: View, parts: list[Part], done: Done) -> None:
        parts = [part for part in parts if not part.request.future.done()]
        if not parts:
            return
        try:
            predictions = explain(MakingWay(self, view, parts), [part.outcome() for part in parts])
        except AbandonedError:
            return
        except Exception as error:
            self._alone_or_fail(parts, error, done, lambda part: self._search(view, [part], done))
            return
        self._metrics.count_batch("counterfactual", len(predictions))
        offset = 0
        for part in parts:
            part.request.predictions[part.start : part.stop] = predictions[offset : offset + part.count]
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

    def _alone_or_fail(self, parts: list[Part], error: Exception, done: Done, run: Any) -> None:
        if len(parts) == 1:
            done.fail(parts[0].request, error)
            return
        _log.warning("a batch of %d requests failed and runs again one by one: %s", len(parts), error)
        for part in parts:
            run(part)

    def _is_last(self, part: Part) -> bool:
        with self._condition:
            part.request.left -= 1
            return part.request.left == 0


def _stopping() -> BusyError:
    return BusyError("this server is stopping; send the request again, to the one that takes its place")
