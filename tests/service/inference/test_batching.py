"""Requests that share passes get the answers they get alone, and each other's trouble never.

Workers are held and let go with events; nothing sleeps to wait for a worker, and no time is asserted.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import builders
import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from service.api.schema import ImageOptions
from service.certificate import Radii
from service.errors import (
    BusyError,
    DeadlineError,
    NotAnImageError,
    PathTooLongError,
    TargetIsPredictedClassError,
)
from service.inference.admission import Limits, Place
from service.inference.batching import Batcher
from service.inference.classifier import Classifier, Prediction, View
from service.inference.outcome import Decoded, Outcome, compute
from service.inference.pace import Pace
from service.inference.strength import GRADIENTS
from service.metrics import Metrics

LONG_S = 60.0
"""Longer than any test takes."""


Said = Outcome[ImageOptions]


@dataclass
class Ask:
    """A question whose steps a test can watch, hold and break."""

    classifier: Classifier
    pixels_NCHW: np.ndarray
    counterfactual: bool = False
    proof: Literal["fast", "best"] = "fast"
    epsilon: float | None = None
    target: int | None = None
    resize: bool = False
    at_once: bool = False
    explanations: dict[str, Any] = field(default_factory=dict)
    """Strength, path and saliency."""
    decoding: Callable[[], None] = lambda: None
    answering: Callable[[], None] = lambda: None

    @property
    def options(self) -> ImageOptions:
        target = None if self.target is None else self.classifier.labels[self.target]
        return ImageOptions(
            resize=self.resize,
            counterfactual=self.counterfactual,
            target=target,
            proof=self.proof,
            epsilon=self.epsilon,
            **self.explanations,
        )

    def decode_at_once(self) -> Decoded[ImageOptions] | None:
        return self.decode() if self.at_once else None

    def decode(self) -> Decoded[ImageOptions]:
        self.decoding()
        return Decoded(self.classifier, self.pixels_NCHW, self.options)

    def answer(self, outcome: Said) -> Said:
        self.answering()
        return outcome


class Watched(Classifier):
    """A classifier whose passes call back, with the images of the pass."""

    def __init__(self, real: Classifier) -> None:
        self.__dict__.update(real.__dict__)
        self.digest = f"sha256:{id(self)}"
        self.on_predict: Callable[[np.ndarray], None] = lambda _: None
        self.on_gradient: Callable[[np.ndarray], None] = lambda _: None
        self.on_classify: Callable[[np.ndarray], None] = lambda _: None
        self._watched: dict[tuple[int, ...], View] = {}

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        if sent_shape not in self._watched:
            self._watched[sent_shape] = WatchedView.of(super().view(sent_shape, resize), self)
        return self._watched[sent_shape]


class WatchedView(View):
    classifier: Watched

    @classmethod
    def of(cls, real: View, classifier: Watched) -> WatchedView:
        view = cls(real.model, real.transport, real.certificate, real.single_output, real.preprocessing)
        object.__setattr__(view, "classifier", classifier)
        return view

    def predict(self, image_NCHW: np.ndarray) -> list[Prediction]:
        self.classifier.on_predict(image_NCHW)
        return super().predict(image_NCHW)

    def classify(self, image_NCHW: np.ndarray) -> tuple[np.ndarray, Radii]:
        self.classifier.on_classify(image_NCHW)
        return super().classify(image_NCHW)

    def margin_gradient(self, image_NCHW: np.ndarray, weights_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.classifier.on_gradient(image_NCHW)
        return super().margin_gradient(image_NCHW, weights_NK)


@dataclass
class Gate:
    """Where a worker stops until it is let through."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *_: Any) -> None:
        self.reached.set()
        assert self.opened.wait(LONG_S)


@pytest.fixture(scope="module")
def network() -> Classifier:
    return builders.load(builders.random_groupsort(3))


@pytest.fixture
def model(network: Classifier) -> Watched:
    return Watched(network)


Making = Callable[..., Batcher]


@pytest.fixture
def making() -> Iterator[Making]:
    """Batchers that are closed in the end."""
    made: list[Batcher] = []

    def make(**limits: Any) -> Batcher:
        made.append(Batcher(Limits(**limits), Metrics()))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A test that hangs is a test that fails."""
    asyncio.run(asyncio.wait_for(test(), LONG_S))


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, LONG_S)


async def answer_to(batcher: Batcher, ask: Ask, n_bytes: int = 100, deadline_s: float = LONG_S) -> Said:
    with batcher.place(deadline_s) as place:
        return await batcher.ask(ask, n_bytes, place)


async def slept(batcher: Batcher, deadline_s: float) -> None:
    """A request whose body does not arrive."""
    with batcher.place(deadline_s):
        await asyncio.sleep(LONG_S)


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = (1, 4, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def assert_is_answer_alone(said: Said, ask: Ask) -> None:
    image_NCHW = ask.pixels_NCHW / 255.0
    assert np.array_equal(said.image_NCHW, image_NCHW)
    assert said.classifier is ask.classifier
    assert said.options == ask.options
    alone = compute(ask.classifier, image_NCHW, ask.options)
    assert len(said.predictions) == len(alone.predictions)
    for one, other in zip(said.predictions, alone.predictions, strict=True):
        assert one.class_id == other.class_id
        assert np.abs(one.logits_K - other.logits_K).max() <= 2 * other.logit_error
        # Rounding in batches of other sizes may choose another reference image.
        assert one.radius == pytest.approx(other.radius, rel=1e-9 if other.proof == "fast" else 0.02)
        assert one.proof == other.proof
        found, expected = one.counterfactual, other.counterfactual
        if not ask.counterfactual:
            assert found is None
            continue
        assert found is not None
        assert expected is not None
        assert (found.class_id, found.reached) == (expected.class_id, expected.reached)
        assert found.distance == pytest.approx(expected.distance, rel=0.05)
        assert np.abs(found.pixels_CHW.astype(int) - expected.pixels_CHW).max() <= 20


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("forward_batch", [1, 5, 64])
def test_many_different_requests_at_once_get_the_answers_they_get_alone(
    making: Making, classifiers: dict[str, Classifier], network: Classifier, workers: int, forward_batch: int
) -> None:
    batcher = making(workers=workers, forward_batch=forward_batch)
    random = np.random.default_rng(workers + forward_batch)
    models = [*classifiers.values(), network]

    def some(number: int) -> Ask:
        classifier = models[number % len(models)]
        channels, height, width = classifier.input_shape
        if number % 3 == 0:
            channels = 4 - channels  # grey for colour, colour for grey
        resize = number % 5 == 0
        if resize:
            height, width = height + 2, width + 1
        count = int(random.choice([1, 1, 1, 2, 7, 23]))
        pixels_NCHW = images(count, number, (channels, height, width))
        ask = Ask(
            classifier,
            pixels_NCHW,
            counterfactual=number % 4 == 1,
            proof="best" if number % 7 == 3 else "fast",
            epsilon=0.1 if number % 5 == 2 else None,
            resize=resize,
            at_once=number % 2 == 0,
        )
        if ask.counterfactual and number % 8 == 1:
            predicted = {one.class_id for one in classifier.predict(pixels_NCHW / 255.0, resize)}
            others = set(range(len(classifier.labels))) - predicted
            return replace(ask, target=min(others, default=None))
        return ask

    asks = [some(number) for number in range(80)]

    async def test() -> None:
        outcomes = await asyncio.gather(*(answer_to(batcher, ask) for ask in asks))
        for ask, said in zip(asks, outcomes, strict=True):
            assert_is_answer_alone(said, ask)

    run(test)


def test_broken_requests_leave_their_neighbours_alone(making: Making, model: Watched) -> None:
    batcher = making(workers=2)
    (alone,) = model.predict(images(1) / 255.0)

    def fail(error: Exception) -> Callable[[], None]:
        def raising() -> None:
            raise error

        return raising

    good = [Ask(model, images(2, seed), counterfactual=seed % 2 == 0) for seed in range(6)]
    bad: list[tuple[Ask, type[Exception]]] = [
        (Ask(model, images(1), decoding=fail(NotAnImageError("no"))), NotAnImageError),
        (Ask(model, images(1), decoding=fail(ZeroDivisionError())), ZeroDivisionError),
        (Ask(model, images(1), answering=fail(KeyError("x"))), KeyError),
        (Ask(model, images(1), counterfactual=True, target=alone.class_id), TargetIsPredictedClassError),
    ]

    async def test() -> None:
        asks = [good[0], bad[0][0], good[1], bad[1][0], good[2], bad[2][0], good[3], bad[3][0], *good[4:]]
        outcomes = await asyncio.gather(*(answer_to(batcher, ask) for ask in asks), return_exceptions=True)
        by_ask = {id(ask): outcome for ask, outcome in zip(asks, outcomes, strict=True)}
        for ask in good:
            said = by_ask[id(ask)]
            assert isinstance(said, Outcome)
            assert_is_answer_alone(said, ask)
        for ask, error in bad:
            assert isinstance(by_ask[id(ask)], error)

    run(test)


def test_a_pass_that_fails_runs_again_one_by_one_and_only_the_culprit_fails(making: Making, model: Watched) -> None:
    batcher = making(workers=1)
    sizes: list[int] = []
    marked = images(1, 5)
    marked[0, 0, 0, 0] = 77

    def refuse(image_NCHW: np.ndarray) -> None:
        sizes.append(len(image_NCHW))
        if (image_NCHW[:, 0, 0, 0] == 77 / 255.0).any():
            raise ArithmeticError("this image")

    model.on_predict = refuse
    good = [Ask(model, np.where(images(1, seed) == 77, 78, images(1, seed)).astype(np.uint8)) for seed in range(3)]
    asks = [good[0], Ask(model, marked), good[1], good[2]]

    async def test() -> None:
        outcomes = await asyncio.gather(*(answer_to(batcher, ask) for ask in asks), return_exceptions=True)
        assert isinstance(outcomes[1], ArithmeticError)
        for ask, said in zip(asks, outcomes, strict=True):
            if not isinstance(said, ArithmeticError):
                assert isinstance(said, Outcome)
                assert_is_answer_alone(said, ask)

    run(test)
    assert sizes[:5] == [4, 1, 1, 1, 1]


def test_a_search_that_fails_for_one_image_runs_again_without_it(making: Making, model: Watched) -> None:
    batcher = making(workers=1)
    asks = [Ask(model, images(1, seed), counterfactual=True) for seed in range(4)]
    first = asks[2].pixels_NCHW / 255.0
    searched: list[int] = []

    def refuse(image_NCHW: np.ndarray) -> None:
        searched.append(len(image_NCHW))
        if any(np.array_equal(image, first[0]) for image in image_NCHW):
            raise ArithmeticError("this image")

    model.on_gradient = refuse

    async def test() -> None:
        outcomes = await asyncio.gather(*(answer_to(batcher, ask) for ask in asks), return_exceptions=True)
        assert isinstance(outcomes[2], ArithmeticError)
        model.on_gradient = lambda _: None
        for ask, said in zip(asks, outcomes, strict=True):
            if not isinstance(said, ArithmeticError):
                assert isinstance(said, Outcome)
                assert_is_answer_alone(said, ask)

    run(test)
    assert searched[0] == 4


def test_a_model_that_cannot_run_ends_no_worker(making: Making, network: Classifier) -> None:
    batcher = making(workers=2)
    broken = Watched(network)

    def refuse(_: np.ndarray) -> None:
        raise OSError("the file has changed")

    broken.on_classify = refuse

    async def test() -> None:
        for seed in range(5):
            with pytest.raises(OSError, match="has changed"):
                await answer_to(batcher, Ask(broken, images(3, seed)))
        ask = Ask(network, images(3))
        assert_is_answer_alone(await answer_to(batcher, ask), ask)

    run(test)


@pytest.mark.parametrize("count", [1, 3, 4, 10, 300])
def test_a_large_batch_is_split_into_passes_and_answered_in_order(making: Making, model: Watched, count: int) -> None:
    batcher = making(workers=3, forward_batch=4)
    sizes: list[int] = []
    model.on_predict = lambda image_NCHW: sizes.append(len(image_NCHW))
    ask = Ask(model, images(count), counterfactual=count <= 10)

    async def test() -> None:
        assert_is_answer_alone(await answer_to(batcher, ask), ask)

    run(test)
    # The last is the comparison's own.
    assert max(sizes[:-1]) <= 4
    assert sum(sizes[:-1]) == count


def test_the_parts_of_a_batch_are_computed_by_several_workers(making: Making, model: Watched) -> None:
    batcher = making(workers=2, forward_batch=4)
    both = threading.Barrier(2)

    def meet(_: np.ndarray) -> None:
        both.wait(LONG_S)

    model.on_predict = meet
    ask = Ask(model, images(8))

    async def test() -> None:
        said = await answer_to(batcher, ask)
        model.on_predict = lambda _: None
        assert_is_answer_alone(said, ask)

    run(test)


def test_searches_of_one_batch_run_side_by_side_and_come_back_in_order(making: Making, network: Classifier) -> None:
    batcher = making(workers=4, forward_batch=8)

    async def test() -> None:
        for seed in range(10):
            ask = Ask(network, images(40, seed), counterfactual=True)
            assert_is_answer_alone(await answer_to(batcher, ask), ask)

    run(test)


EXPLANATIONS: list[dict[str, Any]] = [{}, {"strength": 2.0}, {"path": 16}, {"saliency": True}]


def test_requests_with_different_explanations_share_searches(making: Making, network: Classifier) -> None:
    batcher = making(workers=2, forward_batch=16)

    async def test() -> None:
        asks = [
            Ask(network, images(2 + n % 3, n), counterfactual=True, explanations=EXPLANATIONS[n % 4]) for n in range(16)
        ]
        for ask, said in zip(asks, await asyncio.gather(*(answer_to(batcher, ask) for ask in asks)), strict=True):
            assert_is_answer_alone(said, ask)
            for prediction in said.predictions:
                found = prediction.counterfactual
                assert found is not None
                is_farther = found.nearest_distance is not None and found.distance > found.nearest_distance
                assert is_farther == ("strength" in ask.explanations)
                assert len(prediction.path) == ask.explanations.get("path", 0)
                assert (prediction.saliency is not None) == ("saliency" in ask.explanations)

    run(test)


def test_admission_counts_the_passes_of_strength_path_and_saliency(
    making: Making, network: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_s: list[float] = []
    search = Place.search

    def recorded(place: Place, seconds: float) -> None:
        work_s.append(seconds)
        search(place, seconds)

    monkeypatch.setattr(Place, "search", recorded)
    batcher = making(workers=1)

    async def test() -> None:
        for explanations in EXPLANATIONS:
            await answer_to(batcher, Ask(network, images(10), counterfactual=True, explanations=explanations))
        await answer_to(batcher, Ask(network, images(10), explanations={"saliency": True}))

    run(test)
    (pace,) = batcher._workers._passes._paces.values()
    plain, *others, alone = [seconds - pace.alone_s + pace.image_s for seconds in work_s]
    assert plain == pytest.approx(10 * pace.image_s)
    # A search costs as much as five passes; a gradient as much as two.
    passes = [2 * GRADIENTS + 1, 16, 2]
    assert others == pytest.approx([(10 + 2 * more) * pace.image_s for more in passes])
    assert alone == pytest.approx(others[-1])


def test_paths_with_more_pixels_than_a_request_may_have_are_refused_before_anything_is_computed(
    making: Making, model: Watched
) -> None:
    batcher = making(workers=1, max_pixels=16 * 3 * 5)
    passes: list[int] = []
    model.on_predict = lambda image_NCHW: passes.append(len(image_NCHW))

    async def test() -> None:
        ask = Ask(model, images(3), counterfactual=True, explanations={"path": 5})
        assert len((await answer_to(batcher, ask)).predictions[0].path) == 5
        passes.clear()
        with pytest.raises(PathTooLongError, match="a path of 6 images for each image has 288 pixels in all"):
            await answer_to(batcher, Ask(model, images(3), counterfactual=True, explanations={"path": 6}))
        assert passes == []

    run(test)


def test_who_waits_gets_an_error_at_the_deadline_while_the_worker_is_stuck(making: Making, model: Watched) -> None:
    batcher = making(workers=1)
    gate = model.on_predict = Gate()

    async def test() -> None:
        slow = asyncio.create_task(answer_to(batcher, Ask(model, images(1))))
        await reached(gate.reached)
        patient_ask = Ask(model, images(1, 1))
        patient = asyncio.create_task(answer_to(batcher, patient_ask))
        for deadline_s in (0.02, 0.0):
            with pytest.raises(DeadlineError, match=f"within {deadline_s:g} s"):
                await answer_to(batcher, Ask(model, images(1, 2)), 100, deadline_s)
        gate.opened.set()
        assert_is_answer_alone(await patient, patient_ask)
        await slow

    run(test)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_deadlines_of_all_lengths_at_once_are_kept_on_either_event_loop(
    making: Making, model: Watched, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    batcher = making(workers=1)
    gate = model.on_predict = Gate()

    async def test() -> None:
        asks = [answer_to(batcher, Ask(model, images(1)), 100, k / 10_000) for k in (*range(100), -5)]
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        assert all(isinstance(outcome, DeadlineError) for outcome in outcomes)
        gate.opened.set()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(test(), LONG_S))


def test_the_request_that_is_computed_has_a_deadline_too(making: Making, model: Watched) -> None:
    batcher = making(workers=1)
    gate = model.on_gradient = Gate()

    async def test() -> None:
        with pytest.raises(DeadlineError):
            await answer_to(batcher, Ask(model, images(1), counterfactual=True), 100, 0.05)
        gate.opened.set()
        ask = Ask(model, images(1, 1))
        assert_is_answer_alone(await answer_to(batcher, ask), ask)

    run(test)


def test_what_nobody_waits_for_leaves_the_queue(making: Making, model: Watched) -> None:
    metrics = Metrics()
    batcher = Batcher(Limits(workers=1), metrics)
    gate = model.on_predict = Gate()
    decoded: list[int] = []

    async def test() -> None:
        slow = asyncio.create_task(answer_to(batcher, Ask(model, images(1))))
        await reached(gate.reached)
        for number in range(5):
            ask = Ask(model, images(1), decoding=lambda number=number: decoded.append(number))
            with pytest.raises(DeadlineError):
                await answer_to(batcher, ask, 100, 0.0)
        assert b"lipcert_waiting 0.0" in metrics.exposition()
        gate.opened.set()
        await slow

    run(test)
    batcher.close()
    assert decoded == []


def slow_to_find(network: Classifier) -> np.ndarray:
    """An image whose search takes several gradients."""
    for seed in range(200):
        pixels_NCHW = images(1, seed)
        (found,) = network.counterfactual(pixels_NCHW / 255.0, network.predict(pixels_NCHW / 255.0), [None])
        if found.steps >= 2:
            return pixels_NCHW
    raise AssertionError("every search ends after one gradient")


def test_a_prediction_overtakes_a_running_search_between_its_steps(
    making: Making, model: Watched, network: Classifier
) -> None:
    batcher = making(workers=1)
    asked, answered = threading.Event(), threading.Event()
    searching = threading.Event()
    gradients: list[int] = []

    def step(_: np.ndarray) -> None:
        gradients.append(len(gradients))
        searching.set()
        # The second step does not end before the prediction, asked for during the first, is answered.
        assert (asked if len(gradients) == 1 else answered).wait(LONG_S)

    model.on_gradient = step

    async def test() -> None:
        search_ask = Ask(model, slow_to_find(network), counterfactual=True)
        search = asyncio.create_task(answer_to(batcher, search_ask))
        await reached(searching)
        ask = Ask(model, images(1, 1))
        prediction = asyncio.create_task(answer_to(batcher, ask))
        await asyncio.sleep(0)  # it asks
        await asyncio.sleep(0)  # it is handed over
        asked.set()
        said = await prediction
        assert not search.done()
        answered.set()
        assert_is_answer_alone(said, ask)
        said = await search
        model.on_gradient = lambda _: None
        assert_is_answer_alone(said, search_ask)

    run(test)
    assert len(gradients) >= 2


@pytest.mark.parametrize("long", ["search", "file"])
def test_a_worker_that_is_busy_for_long_is_not_waited_for(making: Making, model: Watched, long: str) -> None:
    batcher = making(workers=2)
    gate = Gate()
    if long == "search":
        model.on_gradient = gate
    busy = Ask(model, images(1), counterfactual=long == "search", decoding=gate if long == "file" else lambda: None)

    async def test() -> None:
        first = asyncio.create_task(answer_to(batcher, busy, 10_000_000, LONG_S))
        await reached(gate.reached)
        ask = Ask(model, images(1, 1))
        said = await answer_to(batcher, ask)
        assert not first.done()
        gate.opened.set()
        assert_is_answer_alone(said, ask)
        await first

    run(test)


def test_a_search_has_its_turn_beside_predictions_that_never_end(making: Making, model: Watched) -> None:
    batcher = making(workers=1, forward_batch=1)
    order: list[str] = []

    async def note(name: str, ask: Ask) -> None:
        await answer_to(batcher, ask)
        order.append(name)

    async def test() -> None:
        asks = [Ask(model, images(1, seed)) for seed in range(150)]
        searched = note("search", Ask(model, images(1), counterfactual=True))
        await asyncio.gather(searched, *(note("prediction", ask) for ask in asks))

    run(test)
    assert order.index("search") < 100


def stopped_at_each_step(model: Watched) -> tuple[Gate, list[int]]:
    """A gate before each gradient of the model, and the numbers of those that were begun."""
    gate = Gate()
    gradients: list[int] = []

    def step(_: np.ndarray) -> None:
        gradients.append(len(gradients))
        gate()

    model.on_gradient = step
    return gate, gradients


def test_a_search_that_nobody_waits_for_ends(making: Making, model: Watched, network: Classifier) -> None:
    batcher = making(workers=1)
    gate, gradients = stopped_at_each_step(model)

    async def test() -> None:
        search = asyncio.create_task(answer_to(batcher, Ask(model, slow_to_find(network), True)))
        await reached(gate.reached)
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        gate.opened.set()
        ask = Ask(model, images(1, 1))
        assert_is_answer_alone(await answer_to(batcher, ask), ask)
        # The only worker is done with the search once it has taken another.
        again = Ask(model, images(1, 2))
        assert_is_answer_alone(await answer_to(batcher, again), again)

    run(test)
    batcher.close()
    assert gradients == [0]


def test_images_that_share_a_pass_or_a_search_are_limited_in_pixels(making: Making, model: Watched) -> None:
    """Memory goes with pixels: 16 per image here, and 3 images may share."""
    batcher = making(workers=1, max_pixels=48)
    predicted: list[int] = []
    searched: list[int] = []
    model.on_predict = lambda image_NCHW: predicted.append(len(image_NCHW))
    model.on_gradient = lambda image_NCHW: searched.append(len(image_NCHW))
    asks = [Ask(model, images(1 + seed % 2, seed), counterfactual=seed % 3 > 0) for seed in range(120)]

    async def test() -> None:
        outcomes = await asyncio.gather(*(answer_to(batcher, ask) for ask in asks))
        model.on_predict = model.on_gradient = lambda _: None
        for ask, said in zip(asks, outcomes, strict=True):
            assert_is_answer_alone(said, ask)

    run(test)
    # The request that reaches the limit is still taken.
    assert max(predicted) <= 4
    assert max(searched) <= 3
    assert sum(predicted) == sum(len(ask.pixels_NCHW) for ask in asks)


def test_a_delay_gathers_requests_until_the_batch_is_full(making: Making, model: Watched) -> None:
    batcher = making(workers=2, forward_batch=3, max_delay_s=10 * LONG_S)
    sizes: list[int] = []
    model.on_predict = lambda image_NCHW: sizes.append(len(image_NCHW))

    async def test() -> None:
        tasks: list[asyncio.Task[Said]] = []
        for seed in range(3):
            tasks.append(asyncio.create_task(answer_to(batcher, Ask(model, images(1, seed)))))
            for _ in range(10):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    run(test)
    assert sizes == [3]


def test_a_delay_ends_and_a_lone_request_is_answered(making: Making, model: Watched) -> None:
    batcher = making(workers=2, max_delay_s=0.01)

    async def test() -> None:
        for seed in range(3):
            ask = Ask(model, images(1, seed), counterfactual=seed == 1)
            assert_is_answer_alone(await answer_to(batcher, ask), ask)

    run(test)


def test_what_waits_while_a_worker_computes_shares_the_next_pass(making: Making, model: Watched) -> None:
    batcher = making(workers=1)
    sizes: list[int] = []
    gate = Gate()

    def hold(image_NCHW: np.ndarray) -> None:
        sizes.append(len(image_NCHW))
        gate()

    model.on_predict = hold

    async def test() -> None:
        tasks = [asyncio.create_task(answer_to(batcher, Ask(model, images(1))))]
        await reached(gate.reached)
        tasks += [asyncio.create_task(answer_to(batcher, Ask(model, images(1, seed)))) for seed in range(9)]
        for _ in range(10):
            await asyncio.sleep(0)
        gate.opened.set()
        await asyncio.gather(*tasks)

    run(test)
    assert sizes == [1, 9]


def test_closing_answers_everybody_and_what_is_computed_by_then_with_its_answer(making: Making, model: Watched) -> None:
    batcher = making(workers=1)
    gate = model.on_predict = Gate()

    async def test() -> None:
        computed_ask = Ask(model, images(1))
        computed = asyncio.create_task(answer_to(batcher, computed_ask))
        await reached(gate.reached)
        waiting = asyncio.create_task(answer_to(batcher, Ask(model, images(1, 1))))
        reading = asyncio.create_task(slept(batcher, LONG_S))
        for _ in range(10):
            await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        while not batcher.is_closed:
            await asyncio.sleep(0)
        gate.opened.set()
        await closing
        assert_is_answer_alone(await computed, computed_ask)
        unanswered: list[Awaitable[Any]] = [waiting, reading, answer_to(batcher, Ask(model, images(1)))]
        for one in unanswered:
            with pytest.raises(BusyError, match="stopping"):
                await one

    run(test)
    batcher.close()


def test_a_batcher_outlives_its_event_loop(making: Making, model: Watched) -> None:
    """A loop that ended with requests under way leaves nothing behind that holds up the next one."""
    batcher = making(workers=1)
    gate = model.on_predict = Gate()

    async def leave() -> None:
        tasks = [asyncio.create_task(answer_to(batcher, Ask(model, images(1, seed)))) for seed in range(3)]
        await reached(gate.reached)
        assert not any(task.done() for task in tasks)

    async def test() -> None:
        gate.opened.set()
        ask = Ask(model, images(1, 7))
        assert_is_answer_alone(await answer_to(batcher, ask), ask)
        with pytest.raises(DeadlineError):
            await slept(batcher, 0.01)

    run(leave)
    run(test)


@given(st.floats(0.0, 1e3), st.floats(-1.0, 1e3).filter(lambda x: abs(x) > 1e-9 or x == 0.0))
def test_the_share_of_a_worker_is_at_least_one_image(fixed_s: float, image_s: float) -> None:
    share = Pace(fixed_s, image_s).share
    assert share >= 1
    if image_s >= 0.003:
        assert share <= 32
    if image_s <= 0.0:
        assert share == 1


@pytest.mark.parametrize("limits", [{"workers": 0}, {"forward_batch": 0}])
def test_a_batcher_without_workers_or_images_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="1 worker"):
        Batcher(Limits(**limits), Metrics())


@pytest.mark.parametrize("trouble", ["none", "deadline", "file", "target", "at once", "cancelled", "search"])
def test_a_request_leaves_memory_at_its_end_and_not_at_the_next_collection_of_garbage(
    making: Making, model: Watched, trouble: str
) -> None:
    """Collections are rare in a server: what an error holds in a cycle, bodies and pixels, would pile up."""
    batcher = making(workers=1)
    gate = Gate()
    (alone,) = model.predict(images(1) / 255.0)

    def refuse() -> None:
        raise NotAnImageError("no")

    async def one() -> weakref.ref[Ask]:
        ask = Ask(model, images(1))
        if trouble == "deadline":
            model.on_predict = gate
        elif trouble == "search":
            model.on_gradient, ask.counterfactual = gate, True
        elif trouble in ("file", "at once"):
            ask.decoding, ask.at_once = refuse, trouble == "at once"
        elif trouble == "target":
            ask.counterfactual, ask.target = True, alone.class_id
        elif trouble == "cancelled":
            model.on_predict = gate
        task = asyncio.create_task(answer_to(batcher, ask, 100, 0.02 if trouble in ("deadline", "search") else LONG_S))
        if trouble == "cancelled":
            await reached(gate.reached)
            task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(outcome, Outcome) is (trouble == "none")
        return weakref.ref(ask)

    async def test() -> None:
        gone = await one()
        gate.opened.set()
        model.on_predict = model.on_gradient = lambda _: None
        # The only worker has let go of it once it is in the middle of the next but one.
        for seed in range(3):
            await answer_to(batcher, Ask(model, images(1, seed)))
        assert gone() is None

    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()


def test_closing_ends_a_search_at_its_next_step(making: Making, model: Watched, network: Classifier) -> None:
    batcher = making(workers=1)
    gate, gradients = stopped_at_each_step(model)

    async def test() -> None:
        search = asyncio.create_task(answer_to(batcher, Ask(model, slow_to_find(network), True)))
        await reached(gate.reached)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        while not batcher.is_closed:
            await asyncio.sleep(0)
        gate.opened.set()
        await closing
        with pytest.raises(BusyError, match="stopping"):
            await search

    run(test)
    assert gradients == [0]
