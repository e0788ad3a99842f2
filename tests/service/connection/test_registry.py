"""How many connections there are, and which give way."""

from __future__ import annotations

import asyncio
import resource

import pytest
from fake_connection import Held, Wire, scenario

from service.connection import limits as limits_module
from service.connection.limits import ConnectionLimits, limits_of
from service.connection.protocol import connection_class
from service.connection.registry import SPARE, TICK_S
from service.settings import Settings

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def served(connections: int, per_address: int = 0, **more: float) -> ConnectionLimits:
    """Limits with these numbers of connections."""
    return ConnectionLimits(connections=connections, connections_per_address=per_address, **more)  # type: ignore[arg-type]


@scenario
async def test_the_connection_that_is_silent_for_longest_gives_way() -> None:
    cls = connection_class(served(20))
    wires = [Wire(connections=cls) for _ in range(20)]
    for number, wire in enumerate(wires):
        await wire.wait(10 - 0.5 * number if number < 10 else 0)
    new = Wire(connections=cls)
    await new.send(GET)
    assert new.statuses == [200]
    assert [number for number, wire in enumerate(wires) if wire.transport.end] == [0, 1]


@scenario
async def test_connections_with_a_request_do_not_give_way_and_health_has_spare_ones() -> None:
    cls = connection_class(served(8))
    app = Held()
    busy = [Wire(connections=cls, app=app) for _ in range(8)]
    for wire in busy:
        await wire.send(GET)
        await wire.wait(20)
    spare = [Wire(connections=cls) for _ in range(SPARE)]
    await spare[0].send(GET)
    assert spare[0].statuses == [503]
    assert "LIPCERT_MAX_CONNECTIONS" in spare[0].answers[0].problem
    assert spare[0].answers[0].headers["retry-after"] == "1"
    await spare[1].send(GET.replace(b"/ ", b"/health/ready "), GET.replace(b"/ ", b"/v2/health/live "))
    assert spare[1].statuses == [200, 200]
    refused = Wire(connections=cls)
    assert refused.statuses == [503]
    app.may_answer.set()
    await refused.settle()
    assert [wire.statuses for wire in busy] == [[200]] * 8


@scenario
async def test_a_body_that_does_not_come_gives_way() -> None:
    cls = connection_class(served(2))
    app = Held()
    slow, busy = Wire(connections=cls, app=app), Wire(connections=cls, app=app)
    await slow.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\na")
    await busy.send(GET)
    for wire in (slow, busy):
        await wire.wait(1)
    new = Wire(connections=cls)
    await new.send(GET)
    assert new.statuses == [200]
    assert slow.transport.end == "aborted"
    assert busy.transport.end is None


@scenario
async def test_connections_of_an_address_are_limited() -> None:
    cls = connection_class(served(100, 3))
    first = [Wire(connections=cls) for _ in range(3)]
    fourth = Wire(connections=cls)
    assert fourth.statuses == [503]
    assert "LIPCERT_MAX_CONNECTIONS_PER_ADDRESS" in fourth.answers[0].problem
    other = Wire(connections=cls, address="2001:db8::1")
    await other.send(GET)
    assert other.statuses == [200]
    for wire in (first[0], fourth):
        wire.transport.close()
        await wire.settle()
    again = Wire(connections=cls)
    await again.send(GET)
    assert again.statuses == [200]


@scenario
async def test_far_above_the_limit_connections_are_closed_at_once() -> None:
    cls = connection_class(served(1))
    busy = Wire(connections=cls, app=Held())
    await busy.send(GET)
    for _ in range(200):
        last = Wire(connections=cls)
    assert last.transport.end == "closed"
    assert last.statuses == [503]


@scenario
async def test_every_connection_is_looked_at_once_in_a_tick_and_the_clock_stops_without_any() -> None:
    cls = connection_class(served(1000))
    wires = [Wire(connections=cls, has_clock=True) for _ in range(50)]
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 20
    while min(wire.protocol.ticks for wire in wires) < 2:
        assert loop.time() < until_s
        await asyncio.sleep(TICK_S / 10)
    counts = {wire.protocol.ticks for wire in wires}
    assert max(counts) - min(counts) <= 1
    for wire in wires:
        wire.transport.close()
    await wires[0].settle()
    assert len(cls.registry) == 0
    while cls.registry._timer is not None:
        assert loop.time() < until_s
        await asyncio.sleep(TICK_S / 10)


@scenario
async def test_a_connection_that_fails_is_closed_and_stops_no_other() -> None:
    cls = connection_class(served(100))
    wires = [Wire(connections=cls, has_clock=True) for _ in range(17)]
    wires[0].transport.get_write_buffer_size = lambda: 1 // 0  # type: ignore[method-assign]
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 20
    while min(wire.protocol.ticks for wire in wires[1:]) < 2:
        assert loop.time() < until_s
        await asyncio.sleep(TICK_S / 10)
    assert wires[0].transport.end == "aborted"
    for wire in wires[1:]:
        wire.transport.close()
    await wires[0].settle()


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised"),
    [
        (1024, 1024, 768, 1024),
        (1024, 4096, 3840, 4096),
        (1024, 1_048_576, 16_384, 16_640),
        (65_536, 65_536, 16_384, None),
        (100, 100, 1, 100),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 16_384, None),
        (1024, resource.RLIM_INFINITY, 16_384, 16_640),
    ],
)
def test_as_many_connections_as_files_may_be_open(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, connections: int, raised: int | None
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(limits_module.resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(limits_module.resource, "setrlimit", lambda _, both: calls.append(both))
    assert limits_of(Settings()).connections == connections
    assert calls == ([] if raised is None else [(raised, hard)])


def test_the_limits_are_those_of_the_settings() -> None:
    chosen = Settings(
        max_head_bytes=2048,
        max_headers=20,
        max_target_bytes=128,
        max_pipelined=3,
        head_s=4,
        body_s=5,
        idle_s=6,
        write_s=7,
        max_connections=80,
        max_connections_per_address=9,
    )
    assert limits_of(chosen) == ConnectionLimits(2048, 20, 128, 3, 4, 5, 6, 7, 80, 9)
    assert ConnectionLimits() == limits_of(Settings(max_connections=16_384))
