"""Several server processes on one port: each has an interpreter of its own, and the memory that was filled before they
started - the models above all - is there once for all of them.

::

    parent: settings, proofs, models, sockets ──┬──► process 1: socket 1, event loop, workers
    (then waits, and replaces what ends)        ├──► process 2: socket 2, ...
                                                └──► ...

Each process has a listening socket of its own; the system gives each new connection to one of them (`SO_REUSEPORT`).
The parent keeps all sockets open, so that a connection that waits for a process which ends is taken by the one that
replaces it. The processes end when the parent does, whatever becomes of it.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_log = logging.getLogger(__name__)

# A process that ended sooner is not replaced at once: what ended it would most likely end the next one, too.
_SHORT_S = 1.0


def bind(host: str, port: int, count: int) -> list[socket.socket]:
    """Sockets of one address, one for each process, that are bound and do not listen yet.

    Args:
        host: name or address of an interface.
        port: TCP port; 0 lets the system choose one for all.
        count: at least 1; more than one needs Linux.

    Raises:
        OSError: the address cannot be had; another server holds it, even if that would share it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound: list[socket.socket] = []
    try:
        for number in range(count):
            listener = socket.socket(family, kind, protocol)
            bound.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if number > 0:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address if number == 0 else bound[0].getsockname())
            if number == 0 and count > 1:
                # Only now, when nobody else has the address: before, two servers would share it without a word.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        for listener in bound:
            listener.close()
        raise
    return bound


def serve_in_processes(
    listeners: Sequence[socket.socket],
    serve: Callable[[socket.socket], int],
    ended: Callable[[int], None],
    grace_s: float,
) -> None:
    """Run `serve` in a process for each socket, replace those that end, until a signal handler raises.

    Args:
        listeners: of `bind`, listening. They are closed at the end.
        serve: serves one of them until SIGTERM and gives the exit status.
        ended: told the process id of each that ended.
        grace_s: seconds that the processes have to end, once they are told to.

    Raises:
        BaseException: whatever a signal handler of this process raises; all processes have ended by then.
    """
    # Not for the sake of `bind`, which a server of one process needs, too.
    import multiprocessing
    from multiprocessing.connection import wait

    # No thread may run here: it would be missing in the processes, with the locks it held.
    context = multiprocessing.get_context("fork")
    lifeline, held = os.pipe()
    running: dict[int, BaseProcess] = {}
    started_s: dict[int, float] = {}

    def run(number: int) -> None:
        os.close(held)
        for other in range(len(listeners)):
            if other != number:
                listeners[other].close()
        threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
        raise SystemExit(serve(listeners[number]))

    def start(number: int) -> None:
        process = context.Process(target=run, args=(number,), name=f"server-{number}")
        process.start()
        running[number] = process
        started_s[number] = time.monotonic()

    try:
        for number in range(len(listeners)):
            start(number)
        while True:
            wait([process.sentinel for process in running.values()])
            for number, process in list(running.items()):
                if process.exitcode is None:
                    continue
                _log.error("server process %s ended with %s; another takes its place", process.pid, _how(process))
                ended(process.pid or 0)
                time.sleep(max(0.0, started_s[number] + _SHORT_S - time.monotonic()))
                start(number)
    finally:
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, signal.SIG_IGN)
        _end_all(list(running.values()), listeners, grace_s)
        os.close(held)
        os.close(lifeline)


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
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _end_with_parent(lifeline: int) -> None:
    # The parent never writes: reading ends when it does.
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
