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

from service.errors import BusyError, DeadlineError, NotAnImageError, OverloadedError
from service.inference.admission import Admission, Limits

LONG_S = 60.0
"""Longer than any test takes."""


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A test that hangs is a test that fails."""
    asyncio.run(asyncio.wait_for(test(), LONG_S))


async def within(admission: Admission, work: Coroutine[Any, Any, Any], deadline_s: float, n_bytes: int = 0) -> Any:
    with admission.place(n_bytes, deadline_s):
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
    place = Admission(Limits()).place(0, LONG_S)

    async def work() -> None:
        with place:
            await asyncio.sleep(LONG_S)

    async def test() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        place.stop()
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


def test_there_are_places_for_a_limited_number_of_requests_and_bytes() -> None:
    async def test() -> None:
        admission = Admission(Limits(max_requests=3, max_bytes=100))
        # Alone the first is admitted: its body has a limit as well.
        with admission.place(1000, LONG_S), pytest.raises(OverloadedError, match="1 requests"):
            await within(admission, broken(), LONG_S, 1)
        with admission.place(60, LONG_S):
            with pytest.raises(OverloadedError):
                await within(admission, broken(), LONG_S, 41)
            with (
                admission.place(40, LONG_S),
                admission.place(0, LONG_S),
                pytest.raises(OverloadedError, match="3 requests"),
            ):
                await within(admission, broken(), LONG_S)
        assert await within(admission, at_once(), LONG_S, 100) == b"all"

    with pytest.warns(RuntimeWarning, match="never awaited"):
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
        with pytest.raises(BusyError, match="stopping"), admission.place(0, LONG_S):
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
