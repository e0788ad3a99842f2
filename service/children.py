"""Child processes that run one function on bytes of clients, with limits on processor time and memory.

::

    this process ──starts──► nursery: imports the function once ──forks──► child: one job at a time
         └──────────────────────── job and result, over a socket ────────────┘

Decoders of images are large C libraries: only the system bounds their time and memory, and survives their crashes.
The nursery starts with the first job and inherits no descriptor but its own socket, so it holds no listener and no
model. It ends when its socket closes, and so does each child: both end with this process, even if it is killed.

The system ends a child that exceeds its processor time (`ITIMER_PROF`, in microseconds); another child is forked for
the next job. Results are bytes, never pickles: a child that was taken over by a file must not take this process over.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import BusyError, TooCostlyError

Result = tuple[bytes, Any]
"""Result of a function: a head, and a buffer."""

# A child that has needed more is replaced, since Python and the decoders keep memory for later.
_KEPT_BYTES = 96 * 1024 * 1024
# Longest time until a child answers: far above its processor time, also where many share a processor.
_SILENT_S = 4.0
_SILENT_PER_CPU_S = 8.0
_FRAME = struct.Struct("<QQ?")
_JOINED_BYTES = 64 * 1024


class Limits(NamedTuple):
    """Limits of one job."""

    cpu_s: float
    """Processor time, in seconds."""
    memory_bytes: int
    """Memory beyond that of an idle child."""


class Children:
    """A pool of child processes; all methods may be called from any thread."""

    def __init__(self, function: str, most: int) -> None:
        """Start no process.

        Args:
            function: `module:name`; takes an object and bytes, returns a `Result`.
            most: jobs that run at the same time.
        """
        self._function = function
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="child")
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._is_closed = False
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    async def run(self, order: object, content: bytes, limits: Limits) -> tuple[bytes, memoryview]:
        """Return the head and the buffer that the function returns for an order and bytes.

        Args:
            order: argument of the function; it is pickled.
            content: bytes of a client.
            limits: of this job.

        Raises:
            TooCostlyError: the job exceeded its limits, or its process crashed.
            BusyError: no child can be started.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._run, order, content, limits)

    def close(self) -> None:
        """End all processes for good; running jobs fail, also those of a child that hangs."""
        self._is_closed = True
        # Whoever holds the lock may wait for it.
        if (nursery := self._nursery) is not None:
            nursery.kill()
        with self._lock:
            for child in self._idle:
                child.link.close()
            for child in self._busy:
                # Its thread reads the end, and closes it.
                with contextlib.suppress(OSError):
                    child.link.shutdown(socket.SHUT_RDWR)
            self._idle.clear()
            self._end_nursery()

    def _run(self, order: object, content: bytes, limits: Limits) -> tuple[bytes, memoryview]:
        child = self._child()
        stays = False
        try:
            _set_silence(child.link, _SILENT_S + _SILENT_PER_CPU_S * limits.cpu_s)
            _send(child.link, pickle.dumps((order, limits)), content)
            head, body, stays = _receive(child.link)
        except (EOFError, OSError):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            raise TooCostlyError from None
        finally:
            with self._lock:
                self._busy.discard(child)
                if stays and not self._is_closed:
                    self._idle.append(child)
                else:
                    child.link.close()
        return bytes(head), body

    def _child(self) -> _Child:
        with self._lock:
            child = self._idle_or_new()
            self._busy.add(child)
        return child

    def _idle_or_new(self) -> _Child:
        while self._idle:
            child = self._idle.pop()
            try:
                # Something to read before any job: its end, by whoever killed it.
                child.link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return child
            except OSError:
                pass
            child.link.close()
        try:
            return self._fork()
        except (EOFError, OSError):
            # It was killed, or cannot fork.
            self._end_nursery()
        try:
            return self._fork()
        except (EOFError, OSError) as error:
            raise BusyError(
                f"the server cannot start a process that reads this body ({error}); send it again after a pause"
            ) from error

    def _fork(self) -> _Child:
        if self._is_closed:
            raise EOFError
        if self._control is None:
            self._start_nursery()
        assert self._control is not None
        link, other = socket.socketpair()
        with other, contextlib.ExitStack() as unless_started:
            unless_started.enter_context(link)
            _set_silence(link, _SILENT_S + _SILENT_PER_CPU_S)
            socket.send_fds(self._control, [b"\0"], [other.fileno()])
            other.close()
            pid, _, _ = _receive(link)
            unless_started.pop_all()
        return _Child(link, int(bytes(pid)))

    def _start_nursery(self) -> None:
        # The same modules as in this process, wherever it found them.
        code = f"import sys; sys.path[:] = {sys.path!r}; from service.children import main; main({self._function!r})"
        with contextlib.ExitStack() as unless_started:
            mine, other = socket.socketpair()
            unless_started.enter_context(mine)
            with other:
                self._nursery = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=other.fileno(),
                    stdout=subprocess.DEVNULL,
                    # Ctrl-C is meant for the server.
                    process_group=0,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                )
            unless_started.pop_all()
        self._control = mine

    def _end_nursery(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._nursery is not None:
            self._nursery.kill()
            self._nursery.wait()
            self._nursery = None


class _Child(NamedTuple):
    link: socket.socket
    pid: int


def _set_silence(link: socket.socket, seconds: float) -> None:
    """Limit each wait for the other side; by the system: Python would wait in the look at an idle child, too."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1.0 * 1e6))
    for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        link.setsockopt(socket.SOL_SOCKET, direction, limit)


def _send(link: socket.socket, head: bytes, body: Any, flag: bool = False) -> None:
    frame = _FRAME.pack(len(head), len(body), flag) + head
    if len(body) <= _JOINED_BYTES:
        link.sendall(frame + bytes(body))
    else:
        link.sendall(frame)
        link.sendall(body)


def _receive(link: socket.socket) -> tuple[memoryview, memoryview, bool]:
    n_head, n_body, flag = _FRAME.unpack(_exactly(link, _FRAME.size))
    parts = _exactly(link, n_head + n_body)
    return parts[:n_head], parts[n_head:], flag


def _exactly(link: socket.socket, count: int) -> memoryview:
    view = memoryview(bytearray(count))
    found = 0
    while found < count:
        more = link.recv_into(view[found:])
        if not more:
            raise EOFError
        found += more
    return view


def main(function: str) -> None:
    """Fork a child for each socket that arrives over stdin, until stdin closes.

    Args:
        function: see `Children`.
    """
    module, name = function.split(":")
    work = getattr(importlib.import_module(module), name)
    # Decoders warn about files in as many lines as the files want.
    warnings.simplefilter("ignore")
    logging.disable()
    # A signal to all processes of the server (systemd, a terminal) does not end the requests that it still answers.
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    # Children that end are forgotten at once.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as control:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                os._exit(0)
            with contextlib.suppress(OSError):
                if os.fork() == 0:
                    control.close()
                    _work(socket.socket(fileno=descriptors[0]), work)
            os.close(descriptors[0])


def _work(link: socket.socket, work: Callable[[Any, bytes], Result]) -> None:
    """Do jobs, one after the other; never return."""
    status = 1
    try:
        with contextlib.suppress(EOFError, BrokenPipeError):
            _send(link, str(os.getpid()).encode(), b"")
            is_small = True
            while is_small:
                job, content, _ = _receive(link)
                order, limits = pickle.loads(job)
                _set_memory(limits.memory_bytes)
                signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
                head, body = work(order, bytes(content))
                signal.setitimer(signal.ITIMER_PROF, 0.0)
                is_small = _bytes_of_this_process()[1] < _KEPT_BYTES
                _send(link, head, body, is_small)
                del content, body
            status = 0
    finally:
        os._exit(status)


def _set_memory(limit_bytes: int) -> None:
    """Limit the memory that this process may take beyond its present size."""
    virtual, _ = _bytes_of_this_process()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if virtual:
        resource.setrlimit(resource.RLIMIT_AS, (virtual + limit_bytes, hard))


def _bytes_of_this_process() -> tuple[int, int]:
    """Return the virtual and the resident bytes; both 0 where the system does not tell."""
    try:
        virtual, resident, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0, 0
    return int(virtual) * resource.getpagesize(), int(resident) * resource.getpagesize()
