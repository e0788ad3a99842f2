"""Places are limited, and whoever overstays the deadline loses the place with everything in it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from garbage import count, uncollected

from service.errors import BusyError, DeadlineError, NotAnImageError, OverloadedError, TooSlowError
from service.inference import admission as admission_module
from service.inference.admission import Admission, Limits, Place, stopping

LONG_S = 60.0
"""Longer than any test takes."""


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A test that hangs is a test that fails."""
    asyncio.run(asyncio.wait_for(test(), LONG_S))


async def within(admission: Admission, work: Coroutine[Any, Any, Any], deadline_s: float, n_bytes: int = 0) -> Any:
    with admission.place(deadline_s) as place:
        place.begin(n_bytes)
        return await work


async def at_once() -> bytes:
    return b"all"


async def broken() -> bytes:
    raise NotAnImageError("no")


def test_a_request_is_stopped_at_its_deadline_and_its_task_lives_on() -> None:
    admission = Admission(Limits())

    async def test() -> None:
        with pytest.raises(DeadlineError, match=r"within 0\.02 s"):
            await within(admission, asyncio.sleep(LONG_S), 0.02)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        assert await within(admission, at_once(), 0.0) == b"all"
        with pytest.raises(NotAnImageError):
            await within(admission, broken(), LONG_S)
        cancelled = asyncio.create_task(within(admission, asyncio.sleep(LONG_S), LONG_S))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    run(test)


def test_a_cancellation_from_outside_is_no_deadline() -> None:
    place = Admission(Limits()).place(LONG_S)

    async def work() -> None:
        with place:
            await asyncio.sleep(LONG_S)

    async def test() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        place.stop(stopping)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(test)


def test_an_error_of_time_inside_is_no_deadline() -> None:
    async def slow_disk() -> None:
        raise TimeoutError("disk")

    async def test() -> None:
        with pytest.raises(TimeoutError, match="disk"):
            await within(Admission(Limits()), slow_disk(), LONG_S)

    run(test)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_deadlines_of_all_lengths_at_once_are_kept_on_either_event_loop(
    loop_factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    admission = Admission(Limits())

    async def test() -> None:
        asks = [within(admission, asyncio.sleep(LONG_S), k / 10_000) for k in (*range(100), -5)]
        outcomes = await asyncio.gather(*asks, return_exceptions=True)
        assert all(isinstance(outcome, DeadlineError) for outcome in outcomes)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(test(), LONG_S))


def test_there_are_places_for_a_limited_number_of_requests() -> None:
    async def test() -> None:
        admission = Admission(Limits(max_requests=2))
        with admission.place(LONG_S), admission.place(LONG_S), pytest.raises(OverloadedError), admission.place(LONG_S):
            pass
        assert await within(admission, at_once(), LONG_S) == b"all"

    run(test)


def test_bytes_take_their_room_as_they_arrive() -> None:
    async def test() -> None:
        admission = Admission(Limits(max_bytes=100))
        # Alone a request is admitted: its body has a limit as well.
        with admission.place(LONG_S) as first:
            first.receive(1000, 1000)
            with pytest.raises(OverloadedError), admission.place(LONG_S):
                pass
            first.receive(1000, 60)
            with admission.place(LONG_S) as second:
                second.receive(40, 40)
                with pytest.raises(OverloadedError):
                    second.receive(41, 41)
                # What is discarded needs none.
                second.receive(2000, 0)
                second.begin(40)
        with admission.place(LONG_S) as first, admission.place(LONG_S) as second:
            first.receive(50, 50)
            second.receive(50, 50)

    run(test)


def test_one_address_holds_its_share_and_leaves_the_rest_to_others() -> None:
    async def test() -> None:
        admission = Admission(Limits(max_requests=4, max_bytes=100, client_share=0.5))
        with admission.place(LONG_S, "192.0.2.1") as one, admission.place(LONG_S, "192.0.2.1") as two:
            with pytest.raises(OverloadedError, match="LIPCERT_CLIENT_SHARE"), admission.place(LONG_S, "192.0.2.1"):
                pass
            one.receive(20, 20)
            with pytest.raises(OverloadedError, match="LIPCERT_CLIENT_SHARE"):
                two.receive(31, 31)
            with admission.place(LONG_S, "192.0.2.2") as other, admission.place(LONG_S) as unknown:
                other.receive(50, 50)
                unknown.receive(30, 30)
        assert admission.refusal("192.0.2.1") is None

    run(test)


def test_a_body_that_arrives_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_GRACE_S", 0.01)

    async def reading(received: int, begins: bool) -> None:
        with Admission(Limits(min_rate=1e6)).place(0.3) as place:
            place.receive(received, 0)
            if begins:
                place.begin(received)
            await asyncio.sleep(LONG_S)

    async def test() -> None:
        with pytest.raises(TooSlowError, match="less than 1e\\+06 bytes per second"):
            await reading(100, begins=False)
        # The wait for an answer has the deadline alone, and so has a fast body.
        for received, begins in ((100, True), (10**9, False)):
            with pytest.raises(DeadlineError):
                await reading(received, begins)

    run(test)


def test_requests_that_come_together_are_counted_before_their_tasks_run() -> None:
    async def test() -> None:
        admission = Admission(Limits(max_requests=3))
        loop = asyncio.get_running_loop()
        for _ in range(3):
            assert admission.refusal("") is None
            admission.expect(loop)
        assert admission.refusal("") is not None
        await asyncio.sleep(0)
        assert admission.refusal("") is None

    run(test)


def test_refused_clients_are_told_to_come_back_one_after_the_other() -> None:
    async def test() -> None:
        admission = Admission(Limits(max_requests=1))
        with admission.place(LONG_S):
            seconds = []
            for _ in range(2000):
                refusal = admission.refusal("")
                assert refusal is not None
                seconds.append(refusal[1])
        assert seconds[0] == 1
        assert seconds == sorted(seconds)
        assert 3 <= seconds[-1] <= 6

    run(test)


@pytest.mark.parametrize("end", ["deadline", "error", "cancelled"])
def test_the_place_of_an_abandoned_request_is_free(end: str) -> None:
    async def test() -> None:
        admission = Admission(Limits(max_requests=1, max_bytes=1))
        work = broken() if end == "error" else asyncio.sleep(LONG_S)
        task = asyncio.create_task(within(admission, work, 0.01 if end == "deadline" else LONG_S, 1))
        await asyncio.sleep(0)
        if end == "cancelled":
            task.cancel()
        with pytest.raises((DeadlineError, NotAnImageError, asyncio.CancelledError)):
            await task
        assert await within(admission, at_once(), LONG_S, 1) == b"all"

    run(test)


def test_closing_ends_requests_in_progress_and_refuses_further_ones() -> None:
    async def test() -> None:
        admission = Admission(Limits())
        reading = asyncio.create_task(within(admission, asyncio.sleep(LONG_S), LONG_S))
        ending = asyncio.create_task(within(admission, asyncio.sleep(0), LONG_S))
        late = asyncio.create_task(within(admission, asyncio.sleep(LONG_S), 0.0))
        await asyncio.sleep(0)
        await asyncio.to_thread(admission.close)
        await ending
        for task in (reading, late):
            with pytest.raises(BusyError):
                await task
        with pytest.raises(BusyError, match="stopping"), admission.place(LONG_S):
            pass

    run(test)


def test_a_body_given_up_leaves_memory() -> None:
    class Body(bytearray):
        """Bytes that can be watched."""

    async def read() -> Body:
        body = Body(b"part of it")
        bodies.append(weakref.ref(body))
        await asyncio.Event().wait()
        return body

    bodies: list[weakref.ref[Body]] = []

    async def test() -> None:
        with contextlib.suppress(DeadlineError):
            await within(Admission(Limits()), read(), 0.01)
        await asyncio.sleep(0)  # asyncio itself lets go of it
        assert bodies[0]() is None

    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()


@pytest.mark.parametrize("deadline_s", [0.0, 0.01, LONG_S])
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_place_that_was_left_is_no_garbage(factory: Callable[[], Any], deadline_s: float) -> None:
    async def late() -> None:
        with contextlib.suppress(DeadlineError):
            await within(Admission(Limits()), asyncio.sleep(0.05), deadline_s)

    with uncollected(), asyncio.Runner(loop_factory=factory) as runner:
        before = count(Place)
        runner.run(late())
        assert count(Place) == before
