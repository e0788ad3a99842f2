"""Processes of this machine that certify parts; where one ends, another one does its part again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from service.bulk.tables import Record
from service.bulk.work import Job, certify_part
from service.sheets.sources import SourceError

_TRIES = 3
"""Processes that a part may end before the run ends, too."""
_GRACE_S = 5.0
_ENVIRONMENT = {
    # A process for each CPU: threads that wait by spinning would take the CPUs from each other.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Every batch has arrays of megabytes: memory that the system takes back in between costs a twentieth of the time.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
}


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    line: str | None = None
    """The part that it certifies."""


def run_locally(job: Job, lines: Iterator[str], processes: int) -> Iterator[Record]:
    """Yield the record of each part when it is complete, in any order.

    Args:
        job: of the run.
        lines: parts.
        processes: that work side by side.

    Raises:
        SourceError: a part cannot be certified, see `certify_part`, or ends every process.
        OSError: a file cannot be written.
    """
    workers: list[_Worker] = []
    again: deque[str] = deque()
    ended: Counter[str] = Counter()

    def assign(worker: _Worker) -> bool:
        worker.line = again.popleft() if again else next(lines, None)
        if worker.line is None:
            return False
        worker.connection.send(worker.line)
        return True

    try:
        while True:
            while len(workers) < processes and (line := again.popleft() if again else next(lines, None)):
                workers.append(_start(job, line))
            busy = {worker.connection: worker for worker in workers}
            if not busy:
                return
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                try:
                    outcome = worker.connection.recv()
                    if isinstance(outcome, Exception):
                        raise outcome
                    yield outcome
                    if assign(worker):
                        continue
                except (EOFError, ConnectionError):
                    if worker.line is not None:
                        _count_end(worker, ended)
                        again.append(worker.line)
                workers.remove(worker)
                _end(worker)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            _end(worker)


def _start(job: Job, line: str) -> _Worker:
    # A fork would take along locks and threads of the libraries that this process has loaded.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(job, theirs), daemon=True)
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT)
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()
    worker = _Worker(process, ours, line)
    ours.send(line)
    return worker


def _count_end(worker: _Worker, ended: Counter[str]) -> None:
    worker.process.join(_GRACE_S)
    assert worker.line is not None
    ended[worker.line] += 1
    if ended[worker.line] == _TRIES:
        status = worker.process.exitcode
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        number = worker.line[1:].partition(",")[0]
        raise SourceError(
            f"part {number} ended {_TRIES} processes, and the last one {how}: most often the memory is too small for "
            "them, so try fewer --processes; line "
            f"{int(number) + 1} of inputs.jsonl names its inputs. The other parts are kept"
        )


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.join(_GRACE_S)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _work(job: Job, connection: Connection) -> None:
    """Certify parts until the connection closes."""
    # Ctrl-C is for the driver, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger().setLevel(logging.ERROR)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            line = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            outcome: Record | Exception = certify_part(job, line)
        except (SourceError, OSError) as error:
            outcome = type(error)(*error.args)
        except Exception:
            outcome = SourceError(f"a part cannot be certified:\n{traceback.format_exc()}")
        connection.send(outcome)


def _end_with_parent() -> None:
    """End this process with the driver, even if that is killed: the next run has the folder to itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
