"""Several server processes on one port: each has its own interpreter and GIL, and all share the memory that was filled
before the fork, above all the models.

::

    parent: settings, verification, models, sockets ──┬──► process 1: socket 1, event loop, workers
    (then waits, and replaces a process that ends)    ├──► process 2: socket 2, ...
                                                      └──► ...

Each process listens on its own socket; the system gives each new connection to one of them (`SO_REUSEPORT`). The parent
keeps all sockets open, so that a connection in the backlog of a process that ends is accepted by its replacement. The
processes end with the parent, even if it is killed. A process that does not call `beat` for some seconds is killed: its
event loop hangs, or it is stopped (SIGSTOP).

No signal handler of the parent raises, because a signal can arrive anywhere, also while the parent ends the others: a
signal is a byte in a pipe that the parent waits for.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from service.errors import PortError
from service.processes.stopping import HANDSHAKE_S, keep_out, refuse_waiting

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_log = logging.getLogger(__name__)

# A process that ended sooner is not replaced at once: its replacement would most likely end, too.
_SHORT_S = 1.0
_STOPS = (signal.SIGTERM, signal.SIGINT)
_HANDLED = (*_STOPS, signal.SIGHUP)
_LOOK_EVERY_S = 1.0
_HANG_S = 10.0
"""Seconds without a beat after which a process is killed; later than its own watchdog."""
_START_S = 300.0
"""The same before its first beat: it loads the default model in the meantime."""

_beats: mmap.mmap | None = None
"""One byte for each process, shared by all of them, which its process counts up."""
_own = -1


def own_number() -> int:
    """Return the number of this server process, from 0, which its replacement has as well; -1 in the parent."""
    return _own


def beat() -> None:
    """Tell the parent that this process lives; called several times a second."""
    if _beats is not None:
        _beats[_own] = (_beats[_own] % 255) + 1


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and does not listen yet.

    Args:
        host: name or address of an interface.
        port: TCP port; 0 lets the system choose.

    Raises:
        PortError: the address is not available, also where another server listens there and would share it.
    """
    with contextlib.ExitStack() as unless_bound:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = unless_bound.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise PortError(host, port, error) from error
        unless_bound.pop_all()
    return listener


def hold(host: str, port: int) -> socket.socket:
    """Return a socket that holds an address for sockets of this user with SO_REUSEPORT, and takes no connection.

    Args:
        host: name or address of an interface.
        port: TCP port; 0 lets the system choose.

    Raises:
        PortError: see `bind`.
    """
    holder = bind(host, port)
    # As in `listen`, only now that nobody else has the address.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return holder


def listen(first: socket.socket, count: int, backlog: int) -> list[socket.socket]:
    """Return sockets that listen on one address, one for each process.

    Args:
        first: of `bind`; the first of the result. On failure it is still the caller's to close.
        count: number of sockets; at least 1, and more than one needs Linux.
        backlog: pending connections of each socket.

    Raises:
        PortError: another server listens there since `bind`.
    """
    listeners = [first]
    with contextlib.ExitStack() as unless_all_listen:
        try:
            first.listen(backlog)
            if count > 1:
                # Only now that `first` has the address to itself: two servers that start side by side would otherwise
                # share it silently.
                first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for _ in range(count - 1):
                listener = unless_all_listen.enter_context(socket.socket(first.family, first.type, first.proto))
                listeners.append(listener)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                listener.bind(first.getsockname())
                listener.listen(backlog)
        except OSError as error:
            host, port = first.getsockname()[:2]
            raise PortError(host, port, error) from error
        unless_all_listen.pop_all()
    return listeners


def serve_in_processes(
    listeners: Sequence[socket.socket],
    serve: Callable[[socket.socket], int],
    grace_s: float,
    drain_s: float = 0.0,
    look: Callable[[], None] = lambda: None,
    hang_up: Callable[[], None] = lambda: None,
    descriptors: Callable[[], Sequence[int]] = list,
) -> None:
    """Run `serve` in a process for each socket and replace those that end, until SIGTERM or SIGINT; then end them all.

    Called by the main thread. Both signals are ignored afterwards: the caller only has to exit.

    Args:
        listeners: of `listen`; closed at the end.
        serve: serves on one socket until SIGTERM and returns the exit status.
        grace_s: seconds from SIGTERM to SIGKILL of a process, beyond those of the drain.
        drain_s: seconds from SIGTERM until new connections are kept out; not after SIGINT.
        look: called every second, when a descriptor can be read, and before a process starts; it may start no thread.
        hang_up: called after SIGHUP.
        descriptors: wake this process when they can be read.
    """
    global _beats
    # Imported here: a server of one process needs `bind`, and not this.
    import multiprocessing
    from multiprocessing.connection import wait

    # No thread may run here: a fork would lose it, and leave the locks that it held.
    context = multiprocessing.get_context("fork")
    _beats = mmap.mmap(-1, len(listeners))
    watch = Watch(_beats)
    lifeline, held = os.pipe()
    stopping, stop = os.pipe()
    os.set_blocking(stop, False)
    running: dict[int, BaseProcess] = {}
    started_s: dict[int, float] = {}
    due_s = dict.fromkeys(range(len(listeners)), 0.0)
    """Start times of the processes that do not run, on the monotonic clock."""

    def run(number: int) -> None:
        global _own
        _own = number
        signal.set_wakeup_fd(-1)
        for stop_signal in _STOPS:
            signal.signal(stop_signal, _end_once)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        for descriptor in (held, stopping, stop):
            os.close(descriptor)
        for other in range(len(listeners)):
            if other != number:
                listeners[other].close()
        end = threading.Thread(
            target=_end_with_parent, args=(lifeline, listeners[number], drain_s, grace_s), daemon=True
        )
        end.start()
        raise SystemExit(serve(listeners[number]))

    def start(number: int) -> None:
        process = context.Process(target=run, args=(number,), name=f"server-{number}")
        started_s[number] = time.monotonic()
        # Before the new process has its own handlers, a signal to it would reach the pipe of this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            process.start()
        except OSError as error:
            _log.error("no server process can be started (%s); trying again", error.strerror or error)
            due_s[number] = started_s[number] + _SHORT_S
        else:
            running[number] = process
            watch.add(number)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

    def replace(number: int) -> None:
        process = running.pop(number)
        process.join()
        _log.error("server process %s ended with %s; another takes its place", process.pid, _how(process))
        process.close()
        due_s[number] = started_s[number] + _SHORT_S

    signal.set_wakeup_fd(stop, warn_on_full_buffer=False)
    try:
        for handled in _HANDLED:
            signal.signal(handled, _do_nothing)
        while True:
            look()
            now_s = time.monotonic()
            for number in [number for number, at_s in due_s.items() if at_s <= now_s]:
                del due_s[number]
                start(number)
            left_s = max(0.0, min(due_s.values()) - time.monotonic()) if due_s else _LOOK_EVERY_S
            left_s = min(left_s, _LOOK_EVERY_S)
            sentinels = [process.sentinel for process in running.values()]
            ready = wait([stopping, *descriptors(), *sentinels], left_s)
            if stopping in ready:
                signals = os.read(stopping, 1024)
                if any(stop_signal in signals for stop_signal in _STOPS):
                    if signal.SIGTERM not in signals:
                        drain_s = 0.0
                    return
                hang_up()
            for number in watch.hung(running):
                _log.error("server process %s hangs and is killed", running[number].pid)
                running[number].kill()
            for number in [number for number, process in running.items() if process.sentinel in ready]:
                replace(number)
    finally:
        _end_all(list(running.values()), listeners, drain_s, grace_s)
        signal.set_wakeup_fd(-1)
        for descriptor in (lifeline, held, stopping, stop):
            os.close(descriptor)


class Watch:
    """Silence of the processes in observed seconds: a pause of the parent is not the fault of a process."""

    def __init__(self, beats: mmap.mmap) -> None:
        """Watch no process yet; `beats` has a byte for each."""
        self._beats = beats
        self._seen: dict[int, int] = {}
        self._silent_s: dict[int, float] = {}
        self._looked_s = time.monotonic()

    def add(self, number: int) -> None:
        """Watch a process that has just started, and has not beaten yet."""
        # Without a beat of its predecessor.
        self._beats[number] = self._seen[number] = 0
        self._silent_s[number] = 0.0

    def hung(self, running: Iterable[int]) -> list[int]:
        """Return which of the running processes have hung for too long; each is named once."""
        now_s = time.monotonic()
        elapsed_s, self._looked_s = min(now_s - self._looked_s, _LOOK_EVERY_S), now_s
        hung: list[int] = []
        for number in running:
            beats = self._beats[number]
            self._silent_s[number] = 0.0 if beats != self._seen[number] else self._silent_s[number] + elapsed_s
            self._seen[number] = beats
            if self._silent_s[number] > (_HANG_S if beats else _START_S):
                self._silent_s[number] = 0.0
                hung.append(number)
        return hung


def _end_all(
    processes: Sequence[BaseProcess], listeners: Sequence[socket.socket], drain_s: float, grace_s: float
) -> None:
    for process in processes:
        process.terminate()
    until_s = time.monotonic() + drain_s + grace_s
    _join(processes, time.monotonic() + drain_s)
    for listener in listeners:
        keep_out(listener)
    # In the meantime the processes accept the connections in the backlogs.
    _join(processes, time.monotonic() + 2 * HANDSHAKE_S)
    refuse_waiting(listeners)
    _join(processes, until_s)
    for process in processes:
        if process.exitcode is None:
            _log.error("server process %s did not end in %g s and is killed", process.pid, drain_s + grace_s)
            process.kill()
            process.join()


def _join(processes: Sequence[BaseProcess], until_s: float) -> None:
    """Wait for the end of all processes, or for a time."""
    for process in processes:
        process.join(max(0.0, until_s - time.monotonic()))


def _how(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-code}"


def _end_with_parent(lifeline: int, listener: socket.socket, drain_s: float, grace_s: float) -> None:
    # The parent never writes, so reading ends when the parent does.
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(drain_s)
    # Nobody else holds the socket any more.
    with contextlib.suppress(OSError):
        keep_out(listener)
    time.sleep(grace_s)
    os._exit(1)


def _end_once(signal_number: int, frame: FrameType | None) -> None:
    # Ctrl-C reaches this process and the parent, which sends SIGTERM: a second signal would cut the shutdown short.
    del signal_number, frame
    for stop_signal in _STOPS:
        signal.signal(stop_signal, _do_nothing)
    raise SystemExit(0)


def _do_nothing(signal_number: int, frame: FrameType | None) -> None:
    # Instead of SIG_IGN, with which Python would report an error for a signal that is already pending.
    del signal_number, frame
