"""Child processes: their limits, their ends, and those of the process that started them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_table import children_of, is_running, wait_until

from service import children as module
from service.children import Children, Limits
from service.errors import BusyError, TooCostlyError

MIB = 2**20
ENOUGH = Limits(5.0, 64 * MIB)


@pytest.fixture
def children() -> Iterator[Children]:
    children = Children("child_jobs:work", 2)
    yield children
    children.close()


def run(
    children: Children, name: str, amount: int = 0, content: bytes = b"", limits: Limits = ENOUGH
) -> tuple[int, bytes]:
    head, body = asyncio.run(children.run((name, amount), content, limits))
    return int(head), bytes(body)


@pytest.mark.parametrize("size", [0, 1, 20_000, 16 * MIB])
def test_bytes_go_to_a_child_and_come_back(children: Children, size: int) -> None:
    content = os.urandom(size)
    pid, body = run(children, "echo", content=content)
    assert body == content
    assert pid != os.getpid()
    # The child stays for the next job.
    assert run(children, "echo")[0] == pid


def test_a_child_that_takes_too_much_processor_time_is_ended_and_replaced(children: Children) -> None:
    first, _ = run(children, "echo")
    with pytest.raises(TooCostlyError, match="limits of this server"):
        run(children, "burn", 60, limits=Limits(0.2, 64 * MIB))
    second, _ = run(children, "echo")
    assert second != first
    assert not is_running(first)
    # The time of one job does not count for the next.
    for _ in range(2):
        assert run(children, "burn", 1, limits=Limits(1.9, 64 * MIB))[0] == second


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_child_that_takes_too_much_memory_fails_and_is_replaced(children: Children) -> None:
    assert run(children, "allocate", 8 * MIB)
    with pytest.raises(TooCostlyError):
        run(children, "allocate", 600 * MIB)
    assert run(children, "echo", content=b"x")[1] == b"x"


def test_a_child_that_has_become_large_is_not_used_again(children: Children) -> None:
    first, body = run(children, "keep", 120 * MIB, limits=Limits(5.0, 256 * MIB))
    assert body == b"kept"
    assert run(children, "echo")[0] != first
    wait_until(lambda: not is_running(first))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_crash_is_the_answer_to_its_job_alone(children: Children, number: int) -> None:
    with pytest.raises(TooCostlyError, match="crashes its decoder"):
        run(children, "signal", number)
    assert run(children, "echo", content=b"x")[1] == b"x"


def test_a_child_that_says_nothing_is_killed(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    pid, _ = run(children, "echo")
    monkeypatch.setattr(module, "_SILENT_S", 0.3)
    with pytest.raises(TooCostlyError):
        run(children, "stop", limits=Limits(0.0001, 64 * MIB))
    wait_until(lambda: not is_running(pid))


def test_the_end_does_not_wait_for_a_child_that_hangs(children: Children) -> None:
    async def close_while_it_hangs() -> None:
        job = asyncio.ensure_future(children.run(("stop", 0), b"", ENOUGH))
        while not is_stopped(pid):
            await asyncio.sleep(0.01)
        children.close()
        # The system continues stopped processes without a parent in their session: this one may answer first.
        with contextlib.suppress(TooCostlyError):
            await job

    pid, _ = run(children, "echo")
    begin_s = time.monotonic()
    asyncio.run(close_while_it_hangs())
    wait_until(lambda: not is_running(pid))
    # A silent child has 44 s.
    assert time.monotonic() - begin_s < 30.0
    # Nothing starts afterwards.
    with pytest.raises(BusyError):
        run(children, "echo")


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_server_fails_no_job(children: Children, number: int) -> None:
    pid, _ = run(children, "echo")
    (nursery,) = [child for child in children_of(os.getpid()) if pid in children_of(child)]
    for process in (nursery, pid):
        os.kill(process, number)
    assert run(children, "signal", number) == (pid, b"")
    assert is_running(nursery)


def test_an_idle_child_or_a_nursery_that_was_killed_is_replaced(children: Children) -> None:
    pid, _ = run(children, "echo")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    pid, _ = run(children, "echo")
    (nursery,) = [child for child in children_of(os.getpid()) if pid in children_of(child)]
    for victim in (nursery, pid):
        os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not is_running(nursery) and not is_running(pid))
    assert run(children, "echo", content=b"x")[1] == b"x"


def test_without_a_process_the_request_can_be_sent_again(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    with pytest.raises(BusyError, match="send it again after a pause"):
        run(children, "echo")
    monkeypatch.undo()
    assert run(children, "echo", content=b"x")[1] == b"x"


def test_jobs_run_side_by_side_up_to_the_limit(children: Children) -> None:
    async def several() -> list[tuple[bytes, memoryview]]:
        return await asyncio.gather(*(children.run(("echo", 0), bytes([n]), ENOUGH) for n in range(40)))

    answers = asyncio.run(several())
    assert [body for _, body in answers] == [bytes([n]) for n in range(40)]
    assert 1 <= len({head for head, _ in answers}) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_child_inherits_no_listener(children: Children) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(listener.fileno(), True)
        inode = str(Path(f"/proc/self/fd/{listener.fileno()}").readlink())
        _, body = run(children, "descriptors")
        assert "socket:" in body.decode()
        assert inode not in body.decode()


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_all_processes_end_with_the_one_that_started_them(how: str) -> None:
    code = (
        f"import asyncio, os, sys; sys.path[:] = {sys.path!r}\n"
        "from service.children import Children, Limits\n"
        "children = Children('child_jobs:work', 1)\n"
        "print(int(asyncio.run(children.run(('echo', 0), b'', Limits(5.0, 2**26)))[0]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline())
        (nursery,) = children_of(process.pid)
        if how == "kill":
            process.kill()
        process.stdin.close()
    wait_until(lambda: not is_running(nursery) and not is_running(child))
