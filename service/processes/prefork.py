"""Several server processes on one port: each has an interpreter of its own, and the memory that was filled before they
started - the models above all - is there once for all of them.

::

    parent: settings, proofs, models, sockets ──┬──► process 1: socket 1, event loop, workers
    (then waits, and replaces what ends)        ├──► process 2: socket 2, ...
                                                └──► ...

Each process has a listening socket of its own; the system gives each new connection to one of them (`SO_REUSEPORT`).
The parent keeps all sockets open, so that a connection that waits for a process which ends is taken by the one that
replaces it. The processes end when the parent does, whatever becomes of it.

No signal handler of the parent raises, since that could happen anywhere, in the middle of ending the others as well:
a signal is a byte in a pipe that the parent waits for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from service.errors import PortError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_log = logging.getLogger(__name__)

# A process that ended sooner is not replaced at once: what ended it would most likely end the next one, too.
_SHORT_S = 1.0
_STOPS = (signal.SIGTERM, signal.SIGINT)


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, which does not listen yet.

    Args:
        host: name or address of an interface.
        port: TCP port; 0 lets the system choose.

    Raises:
        PortError: the address cannot be had; another server listens there, even if that would share it.
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


def listen(first: socket.socket, count: int, backlog: int) -> list[socket.socket]:
    """Sockets that listen on one address, one for each process.

    Args:
        first: of `bind`; it is one of them, and stays the caller's to close where this fails.
        count: at least 1; more than one needs Linux.
        backlog: connections of each that wait.

    Raises:
        PortError: another server has come to listen there since `bind`.
    """
    listeners = [first]
    with contextlib.ExitStack() as unless_all_listen:
        try:
            first.listen(backlog)
            if count > 1:
                # Only now, when `first` has the address to itself: two servers that start side by side would otherwise
                # share it without a word.
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
    ended: Callable[[int], None],
    grace_s: float,
) -> None:
    """Run `serve` in a process for each socket and replace those that end, until SIGTERM or SIGINT; then end them all.

    Called by the main thread. Those signals do nothing any more afterwards: what is left to do is to leave.

    Args:
        listeners: of `listen`. They are closed at the end.
        serve: serves one of them until SIGTERM and gives the exit status.
        ended: told the process id of each that ended.
        grace_s: seconds that the processes have to end, once they are told to.
    """
    # Not for the sake of `bind`, which a server of one process needs, too.
    import multiprocessing
    from multiprocessing.connection import wait

    # No thread may run here: it would be missing in the processes, with the locks it held.
    context = multiprocessing.get_context("fork")
    lifeline, held = os.pipe()
    stopping, stop = os.pipe()
    os.set_blocking(stop, False)
    running: dict[int, BaseProcess] = {}
    started_s: dict[int, float] = {}
    due_s = dict.fromkeys(range(len(listeners)), 0.0)
    """When the processes shall start that do not run."""

    def run(number: int) -> None:
        signal.set_wakeup_fd(-1)
        for stop_signal in _STOPS:
            signal.signal(stop_signal, _end_once)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        for descriptor in (held, stopping, stop):
            os.close(descriptor)
        for other in range(len(listeners)):
            if other != number:
                listeners[other].close()
        threading.Thread(target=_end_with_parent, args=(lifeline, grace_s), daemon=True).start()
        raise SystemExit(serve(listeners[number]))

    def start(number: int) -> None:
        process = context.Process(target=run, args=(number,), name=f"server-{number}")
        started_s[number] = time.monotonic()
        # Until the new process has handlers of its own, a signal to it would be taken for one to this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            process.start()
        except OSError as error:
            _log.error("no server process can be started (%s); trying again", error.strerror or error)
            due_s[number] = started_s[number] + _SHORT_S
        else:
            running[number] = process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)

    def replace(number: int) -> None:
        process = running.pop(number)
        process.join()
        _log.error("server process %s ended with %s; another takes its place", process.pid, _how(process))
        ended(process.pid or 0)
        process.close()
        due_s[number] = started_s[number] + _SHORT_S

    signal.set_wakeup_fd(stop, warn_on_full_buffer=False)
    try:
        for stop_signal in _STOPS:
            signal.signal(stop_signal, _do_nothing)
        while True:
            now_s = time.monotonic()
            for number in [number for number, at_s in due_s.items() if at_s <= now_s]:
                del due_s[number]
                start(number)
            left_s = max(0.0, min(due_s.values()) - time.monotonic()) if due_s else None
            ready = wait([stopping, *(process.sentinel for process in running.values())], left_s)
            if stopping in ready:
                return
            for number in [number for number, process in running.items() if process.sentinel in ready]:
                replace(number)
    finally:
        _end_all(list(running.values()), listeners, grace_s)
        signal.set_wakeup_fd(-1)
        for descriptor in (lifeline, held, stopping, stop):
            os.close(descriptor)


def _end_all(processes: Sequence[BaseProcess], listeners: Sequence[socket.socket], grace_s: float) -> None:
    # First of all: what nobody will take is refused and does not wait.
    for listener in listeners:
        listener.close()
    for process in processes:
        process.terminate()
    until_s = time.monotonic() + grace_s
    for process in processes:
        process.join(max(0.0, until_s - time.monotonic()))
        if process.exitcode is None:
            _log.error("server process %s did not end in %g s and is killed", process.pid, grace_s)
            process.kill()
            process.join()


def _how(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-code}"


def _end_with_parent(lifeline: int, grace_s: float) -> None:
    # The parent never writes: reading ends when it does.
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)


def _end_once(signal_number: int, frame: FrameType | None) -> None:
    # Ctrl-C reaches this process and the parent, which then tells it again: that would cut short what it does to end.
    del signal_number, frame
    for stop_signal in _STOPS:
        signal.signal(stop_signal, _do_nothing)
    raise SystemExit(0)


def _do_nothing(signal_number: int, frame: FrameType | None) -> None:
    # In place of SIG_IGN: of a signal that has come already, Python would complain.
    del signal_number, frame
