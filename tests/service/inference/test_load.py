"""The expected wait: what a server does is simulated on a clock of its own, so that no time is measured."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field

import pytest

from service.inference import admission, load
from service.inference.admission import Limits, retry_after_s
from service.inference.load import Load

BURST = 80


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    monkeypatch.setattr(load, "time", clock)
    return clock


def answer(load: Load, clock: Clock, seconds: float, work_s: float = 0.001, requests: int = 1) -> None:
    """Let some requests begin together and end together."""
    for _ in range(requests):
        load.begin(work_s, clock.now_s)
    clock.now_s += seconds
    for _ in range(requests):
        load.end(work_s)
        load.learn(work_s, clock.now_s, seconds if requests == 1 else 0.0, clock.now_s)


def warm(clock: Clock, seconds: float = 0.002, max_wait_s: float = 30.0) -> Load:
    """Return the load of a server that has answered requests, one after the other."""
    load = Load(BURST, max_wait_s)
    for _ in range(500):
        answer(load, clock, seconds)
    return load


def test_who_finds_nothing_ahead_is_never_refused(clock: Clock) -> None:
    load = Load(BURST, 1e-9)
    assert not load.refuses()
    answer(load, clock, 100.0)
    assert not load.refuses()
    load = warm(clock)
    assert load.refuses(BURST)
    assert not load.refuses()


def test_the_wait_is_the_work_ahead_at_the_speed_that_was_measured(clock: Clock) -> None:
    load = warm(clock, 0.002)
    for _ in range(10):
        load.begin(0.001, clock.now_s)
    assert load.wait_s() == pytest.approx(10 * 0.002, rel=0.01)
    assert load.wait_s(coming=5) == pytest.approx(15 * 0.002, rel=0.01)
    for _ in range(10):
        load.end(0.001)
    # Batches: sixteen answers in the time of two.
    for _ in range(500):
        answer(load, clock, 0.004, requests=16)
    load.begin(0.016, clock.now_s)
    assert load.wait_s() == pytest.approx(0.004, rel=0.02)


def test_the_first_answers_may_take_long_without_a_trace(clock: Clock) -> None:
    load = Load(BURST, 30.0)
    answer(load, clock, 20.0)
    load.begin(0.001, clock.now_s)
    assert load.wait_s() < 0.02


def test_a_server_that_becomes_slow_is_known_to_be_after_some_answers(clock: Clock) -> None:
    load = warm(clock, 0.002)
    for _ in range(20):
        answer(load, clock, 0.2)
    load.begin(0.001, clock.now_s)
    assert load.wait_s() == pytest.approx(0.2, rel=0.1)


def test_a_pause_of_the_machine_sends_nobody_away_for_long(clock: Clock) -> None:
    load = warm(clock, 0.002)
    for _ in range(60):
        load.begin(0.001, clock.now_s)
    # The first request was alone in its batch, and the machine paused.
    clock.now_s += 2.0
    load.end(0.001)
    load.learn(0.001, clock.now_s, 0.0, 1.0)
    assert load.wait_s() <= 4 * 59 * 0.002
    for number in range(32):
        load.end(0.001)
        load.learn(0.001, clock.now_s + 0.02, 0.0, 2.0)
        assert load.wait_s() <= 4 * (58 - number) * 0.002


def test_a_burst_waits_and_one_more_is_an_overload(clock: Clock) -> None:
    load = warm(clock)
    for _ in range(BURST - 1):
        load.begin(0.001, clock.now_s)
        assert not load.refuses()
    load.begin(0.001, clock.now_s)
    assert load.refuses()
    # As many go on waiting as are answered in a few times the time of one.
    while load.refuses():
        load.end(0.001)
    assert 0.002 <= load.wait_s() <= 3 * 0.002


def test_an_overload_ends_some_seconds_after_the_last_refusal(clock: Clock) -> None:
    load = warm(clock)
    assert load.refuses(BURST)
    for _ in range(3):
        clock.now_s += 4.0
        assert load.refuses(BURST // 2)
    clock.now_s += 6.0
    assert not load.refuses(BURST // 2)


def test_dozens_of_clients_that_take_turns_are_refused_for_a_limited_time(clock: Clock) -> None:
    load = warm(clock)
    assert load.refuses(BURST)
    started_s = clock.now_s
    while load.refuses(BURST // 2):
        clock.now_s += 1.0
    assert clock.now_s - started_s <= 15.0
    # If the flood goes on, the next burst waits later.
    assert load.refuses(BURST)
    started_s = clock.now_s
    while load.refuses(BURST // 2):
        clock.now_s += 1.0
    assert 20.0 < clock.now_s - started_s <= 30.0


def test_the_limit_of_the_operator_holds_without_a_burst(clock: Clock) -> None:
    load = Load(BURST, 0.05)
    for _ in range(500):
        answer(load, clock, 0.002)
    assert not load.refuses(24)
    assert load.refuses(26)


def test_retry_after_is_in_whole_seconds() -> None:
    assert [retry_after_s(wait_s) for wait_s in (0.0, 0.2, 1.0, 1.1, 20.0, 1e9)] == [1, 1, 1, 2, 20, 3600]


def test_work_that_is_weighed_counts_for_those_behind(clock: Clock) -> None:
    waits = []
    for images in (1, 256):
        room = admission.Admission(Limits())
        place = room.place(30.0)
        room.enter(place)
        place.begin(100)
        place.weigh(images * 0.001)
        waits.append(room.predictions.wait_s())
        place.search(0.5)
        assert (room.predictions.work_s, room.searches.work_s) == (0.0, 0.5)
        place.weigh(1.0)
    assert waits[1] == pytest.approx(256 * waits[0])


@dataclass
class Simulation:
    """One worker that answers whatever waits in one pass, up to 32 requests; clients that come back when refused."""

    load: Load
    clock: Clock
    fixed_s: float
    image_s: float
    back_s: float
    """From a refusal to the next try."""
    times_s: list[float] = field(default_factory=list)
    refused: int = 0

    def run(self, clients: int, seconds: float) -> None:
        """Let the clients ask one after the other, and again after each answer."""
        end_s = self.clock.now_s + seconds
        order = itertools.count()
        events: list[tuple[float, int, float | None]] = []
        for number in range(clients):
            heapq.heappush(events, (self.clock.now_s + 0.0001 * number, next(order), None))
        waiting: list[float] = []
        computed: list[float] = []
        while events and self.clock.now_s < end_s:
            self.clock.now_s, _, event = heapq.heappop(events)
            if event is None and self.load.refuses():
                self.refused += 1
                heapq.heappush(events, (self.clock.now_s + self.back_s, next(order), None))
            elif event is None:
                self.load.begin(0.001, self.clock.now_s)
                waiting.append(self.clock.now_s)
            else:
                for began_s in computed:
                    self.load.end(0.001)
                    self.load.learn(0.001, self.clock.now_s, 0.0, self.clock.now_s)
                    self.times_s.append(self.clock.now_s - began_s)
                    heapq.heappush(events, (self.clock.now_s + 0.0002, next(order), None))
                computed = []
            if waiting and not computed:
                computed, waiting = waiting[:32], waiting[32:]
                passed_s = self.fixed_s + self.image_s * len(computed)
                heapq.heappush(events, (self.clock.now_s + passed_s, next(order), passed_s))
        for _ in computed + waiting:
            self.load.end(0.001)

    def quantile_s(self, share: float) -> float:
        """Return a quantile of the times of answers."""
        return sorted(self.times_s)[int(share * len(self.times_s))]


@pytest.mark.parametrize(("fixed_s", "image_s"), [(0.002, 0.0003), (0.0002, 0.0004), (0.0, 0.02), (0.4, 0.01)])
@pytest.mark.parametrize("back_s", [0.03, 1.0])
def test_in_a_flood_answers_take_some_times_as_long_and_the_server_stays_busy(
    clock: Clock, fixed_s: float, image_s: float, back_s: float
) -> None:
    alone_s = fixed_s + image_s
    load = warm(clock, alone_s)
    seconds = min(14.0, max(3.0, 500 * alone_s))

    def rate(clients: int) -> float:
        simulation = Simulation(load, clock, fixed_s, image_s, back_s)
        simulation.run(clients, seconds)
        if clients <= 64:
            assert simulation.refused == 0
        else:
            assert simulation.refused > 0
            # The burst with which the flood begins waits.
            late = simulation.times_s[2 * BURST :]
            assert sorted(late)[int(0.99 * len(late))] <= 4.5 * alone_s
        return len(simulation.times_s) / seconds

    capacity = rate(64)
    assert rate(640) >= (0.6 if fixed_s > image_s else 0.8) * capacity
