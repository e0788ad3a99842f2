"""Faults of a process are found by observation: silent workers, a queue that nobody takes from, a failed self-check."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from process_table import wait_until

from service.inference.admission import Limits
from service.inference.batching import Batcher
from service.inference.classifier import Classifier, Prediction, View
from service.inference.health import Health, SelfCheck
from service.inference.heartbeats import LOAD_S, Beats, Pulse
from service.inference.outcome import Decoded, Outcome
from service.inference.served import Models
from service.metrics import Metrics

_STUCK_S = 10.0


@dataclass
class Clock:
    """Seconds that pass when the test says so."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def pass_time(clock: Clock, observe: Callable[[], object], seconds: float, step_s: float = 0.5) -> None:
    for _ in range(round(seconds / step_s)):
        clock.now_s += step_s
        observe()


def test_a_worker_without_a_step_is_silent_and_a_step_ends_the_silence() -> None:
    clock, beats = Clock(), Beats()
    pulse = Pulse(beats, clock)
    beats[1] = clock(), "decoding", 0.0
    pass_time(clock, pulse.observe, 4)
    beats[2] = clock(), "a batch", 0.0
    pass_time(clock, pulse.observe, 2)
    assert pulse.silent(5) == ["decoding"]
    beats[1] = clock(), "answering", 0.0
    # Also before the next look.
    assert pulse.silent(5) == []
    pass_time(clock, pulse.observe, 4)
    assert pulse.silent(5) == ["a batch"]
    beats.clear()
    assert pulse.silent(0) == []
    pass_time(clock, pulse.observe, 9)
    beats[1] = clock(), "a batch", 0.0
    pass_time(clock, pulse.observe, 1)
    assert pulse.silent(5) == []


def test_a_step_that_is_expected_to_take_long_may_be_silent_for_longer() -> None:
    clock, beats = Clock(), Beats()
    pulse = Pulse(beats, clock)
    beats[1] = clock(), "a forward pass", 3.0
    pass_time(clock, pulse.observe, 5 + 12)
    assert pulse.silent(5) == []
    pass_time(clock, pulse.observe, 1)
    assert pulse.silent(5) == ["a forward pass"]


def test_a_pause_of_the_whole_process_is_not_the_silence_of_a_worker() -> None:
    clock, beats = Clock(), Beats()
    pulse = Pulse(beats, clock)
    beats[1] = clock(), "a batch", 0.0
    pulse.observe()
    clock.now_s += 3600.0
    pulse.observe()
    assert pulse.silent(2) == []
    pass_time(clock, pulse.observe, 2)
    assert pulse.silent(2) == ["a batch"]


class Model(Classifier):
    """A classifier that can be stopped where it predicts, searches or loads, and that can answer other bits."""

    def __init__(self, real: Classifier) -> None:
        self.__dict__.update(real.__dict__)
        self.digest = f"sha256:{id(self)}"
        self.stop_at = ""
        self.reached = threading.Event()
        self.opened = threading.Event()
        self.offset = 0.0

    def wait(self, where: str) -> None:
        if where == self.stop_at:
            self.reached.set()
            assert self.opened.wait(60)

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        real, model = super().view(sent_shape, resize), self

        class Stopped(View):
            def predict(self, image_NCHW: np.ndarray) -> list[Prediction]:
                model.wait("a forward pass")
                predictions = super().predict(image_NCHW)
                return [prediction._replace(logits_K=prediction.logits_K + model.offset) for prediction in predictions]

            def classify(self, image_NCHW: np.ndarray) -> Any:
                model.wait("the first passes of a model")
                return super().classify(image_NCHW)

            def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> Any:
                model.wait("a search")
                return super().margin_gradient(image_NCHW, weights_NK)

        return Stopped(real.model, real.transport, real.certificate, real.single_output, real.preprocessing)


@dataclass
class Options:
    counterfactual: bool = False
    resize: bool = False
    target: str | None = None
    proof: str = "fast"
    epsilon: float | None = None
    coverage: float | None = None
    max_error: float | None = None
    strength: float = 1.0
    path: int | None = None
    saliency: bool = False
    novelty: bool = False


@dataclass
class Question:
    model: Model
    options: Options = field(default_factory=Options)

    def decode_at_once(self) -> None:
        return None

    def decode(self) -> Decoded[Any]:
        self.model.wait("decoding")
        return Decoded(self.model, np.full((1, *self.model.input_shape), 0.5), self.options)  # type: ignore[arg-type]

    def answer(self, outcome: Outcome[Any]) -> Outcome[Any]:
        self.model.wait("answering")
        return outcome


class Loop:
    """An event loop on a thread, as that of a server."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def ask(self, batcher: Batcher, question: Question) -> Future[Any]:
        async def ask() -> Any:
            with batcher.place(60.0) as place:
                return await batcher.ask(question, 1, place)  # type: ignore[arg-type]

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    def close(self) -> None:
        async def cancel() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def network() -> Classifier:
    classifier = builders.load(builders.random_groupsort(3))
    assert classifier.is_warm
    return classifier


@pytest.fixture
def model(network: Classifier) -> Iterator[Model]:
    model = Model(network)
    yield model
    model.opened.set()


@pytest.fixture
def batcher(model: Model) -> Iterator[Batcher]:
    batcher = Batcher(Limits(workers=2), Metrics())
    yield batcher
    model.opened.set()
    assert batcher.close(60)


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@dataclass
class Served:
    """A catalogue."""

    models: Models


def health_of(model: Model, batcher: Batcher, clock: Clock) -> Health:
    return Health(Served(Models({"model": model})), "model", batcher, _STUCK_S, clock)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "where", ["decoding", "the first passes of a model", "a forward pass", "a search", "answering"]
)
def test_a_stuck_worker_makes_the_process_not_ready_and_then_not_live_wherever_it_is(
    model: Model, batcher: Batcher, loop: Loop, where: str
) -> None:
    clock = Clock()
    health = health_of(model, batcher, clock)
    assert loop.ask(batcher, Question(model)).result(60) if where == "a search" else True
    model.stop_at = where
    answer = loop.ask(batcher, Question(model, Options(counterfactual=where == "a search")))
    assert model.reached.wait(60)
    health.observe()
    pass_time(clock, health.observe, 4)
    assert health.faults() == []
    pass_time(clock, health.observe, 1)
    assert health.faults() == [f"a worker has been silent for 4 s in {where}"]
    assert health.fatal_faults() == []
    pass_time(clock, health.observe, 6)
    assert health.faults() == health.fatal_faults() == [f"a worker has been stuck for 10 s in {where}"]
    model.opened.set()
    answer.result(60)
    wait_until(lambda: not batcher.beats)
    assert health.faults() == health.fatal_faults() == []


def test_a_model_that_is_loaded_by_its_first_request_gets_the_time_for_it(
    model: Model, batcher: Batcher, loop: Loop
) -> None:
    clock = Clock()
    health = health_of(model, batcher, clock)
    model.is_warm = False
    model.stop_at = "the first passes of a model"
    loop.ask(batcher, Question(model))
    assert model.reached.wait(60)
    health.observe()
    pass_time(clock, health.observe, LOAD_S)
    assert health.faults() == []


def test_a_worker_that_has_died_is_a_stuck_one(model: Model, batcher: Batcher, loop: Loop) -> None:
    clock = Clock()
    health = health_of(model, batcher, clock)
    # Other tests of this process may have workers as well.
    others = set(threading.enumerate())
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        model.wait = lambda where: (_ for _ in ()).throw(SystemExit)  # type: ignore[method-assign, assignment]
        loop.ask(batcher, Question(model))
        wait_until(lambda: len(batcher.beats) == 1 and not batcher.is_waiting)
        wait_until(lambda: sum(thread.name.startswith("worker-") for thread in {*threading.enumerate()} - others) < 2)
    finally:
        threading.excepthook = hook
    health.observe()
    pass_time(clock, health.observe, 11)
    assert health.fatal_faults() == ["a worker has been stuck for 10 s in decoding"]


@dataclass
class Idle:
    """A batcher whose workers never take what waits."""

    beats: Beats = field(default_factory=dict)
    is_waiting: bool = True
    max_delay_s: float = 0.0
    wake: Callable[[], None] = lambda: None


@pytest.mark.parametrize("delay_s", [0.0, 7.0])
def test_a_queue_that_nobody_takes_from_is_a_fault(model: Model, delay_s: float) -> None:
    clock, batcher = Clock(), Idle(max_delay_s=delay_s)
    health = health_of(model, batcher, clock)  # type: ignore[arg-type]
    pass_time(clock, health.observe, 4 + delay_s)
    assert health.faults() == []
    pass_time(clock, health.observe, 1)
    assert health.faults() == ["images have waited for 4 s and no worker takes them"]
    pass_time(clock, health.observe, 6)
    assert health.fatal_faults() == ["images have waited for 10 s and no worker takes them"]
    batcher.is_waiting = False
    assert health.faults() == []


def test_a_server_that_is_stopping_or_lost_or_without_its_model_is_not_ready_and_lives(
    model: Model, batcher: Batcher
) -> None:
    health = health_of(model, batcher, Clock())
    health.is_stopping = True
    assert health.faults() == ["the server is stopping"]
    (fault,) = Health(Served(Models({})), "model", batcher, _STUCK_S).faults()
    assert fault.startswith("the default model model is not loaded")

    class Lost(Model):
        is_lost = True

    lost = health_of(Lost(model), batcher, Clock())
    assert [fault.partition(";")[0] for fault in lost.faults()] == ["the GPU is lost"]
    assert [*health.fatal_faults(), *lost.fatal_faults()] == []


def run_check(health: Health, clock: Clock) -> None:
    """Let a minute pass, and wait for the check."""
    pass_time(clock, health.observe, 60)
    health.check()
    wait_until(lambda: not any(thread.name == "self-check" for thread in threading.enumerate()))


def test_files_that_have_changed_are_a_fault_that_no_restart_cures(
    model: Model, batcher: Batcher, tmp_path: Path
) -> None:
    builders.write(tmp_path, builders.random_groupsort(5))
    served = Model(Classifier.load(tmp_path, "cpu", 1))
    health = health_of(served, batcher, Clock())
    path = tmp_path / "model.onnx"
    content = path.read_bytes()
    for changed in (content[:-1], content[::-1]):
        path.write_bytes(changed)
        served.files.check()
        (fault,) = health.faults()
        assert "have changed" in fault
        assert health.fatal_faults() == []
    path.write_bytes(content)
    served.files.check()
    assert health.faults() == []


def test_an_idle_process_checks_an_answer_of_its_default_model_every_minute(
    model: Model, batcher: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    served = Model(model)
    health = health_of(served, batcher, clock)
    for _ in range(3):
        run_check(health, clock)
        assert health.faults() == []
    served.offset = 1e-15
    # Not before the minute is over.
    pass_time(clock, health.observe, 50)
    health.check()
    assert health.faults() == []
    for _ in range(2):
        run_check(health, clock)
        (fault,) = health.faults()
        assert "with other bits" in fault
    assert health.fatal_faults() == []
    served.offset = 0.0
    run_check(health, clock)
    assert health.faults() == []
    assert [record.levelname for record in caplog.records if "self-check" in record.message] == ["ERROR", "WARNING"]


def test_a_check_that_gets_stuck_is_a_stuck_worker(model: Model, batcher: Batcher) -> None:
    clock = Clock()
    health = health_of(model, batcher, clock)
    model.stop_at = "a forward pass"
    health.check()
    assert model.reached.wait(60)
    health.observe()
    pass_time(clock, health.observe, 11)
    assert health.fatal_faults() == ["a worker has been stuck for 10 s in the self-check"]


def test_a_busy_process_checks_nothing(model: Model, batcher: Batcher, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[SelfCheck] = []
    monkeypatch.setattr(SelfCheck, "start", lambda check: started.append(check))
    clock = Clock()
    health = health_of(model, batcher, clock)
    batcher.beats[1] = clock(), "a batch", 0.0
    health.check()
    assert started == []
    batcher.beats.clear()
    health.check()
    health.check()
    assert len(started) == 1


def test_a_request_does_not_wait_for_a_stuck_worker_beside_an_idle_one(
    model: Model, batcher: Batcher, loop: Loop, network: Classifier
) -> None:
    clock = Clock()
    health = health_of(model, batcher, clock)
    loop.ask(batcher, Question(model)).result(60)
    model.stop_at = "a forward pass"
    loop.ask(batcher, Question(model))
    assert model.reached.wait(60)
    other = loop.ask(batcher, Question(Model(network)))
    wait_until(lambda: batcher.is_waiting)
    pass_time(clock, health.observe, 2)
    other.result(60)


def test_a_batcher_closes_in_time_beside_a_stuck_worker(model: Model, loop: Loop) -> None:
    batcher = Batcher(Limits(workers=1), Metrics())
    model.stop_at = "a forward pass"
    loop.ask(batcher, Question(model))
    assert model.reached.wait(60)
    assert not batcher.close(0.05)
    model.opened.set()
    assert batcher.close(60)
