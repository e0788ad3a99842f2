"""Proofs made in short-lived processes beside the server: it never holds what a proof takes, neither the libraries nor
the memory, and loads itself in the meantime.

The processes run `service.artefact.verification` and end when they are done, when they are told to, or with this
process, whatever becomes of it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from service.errors import ArtefactError

if TYPE_CHECKING:
    # At run time these come with what was found: this module is there before anything large is loaded.
    from service.artefact.graphs import Findings
    from service.runtime.provider import Provider

_MOST_PROCESSES = 4
_ENVIRONMENT = {
    # The processes are as many as the CPUs already, and threads that wait by spinning would take them from each other.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Proofs allocate and free matrices all the time; memory that went back to the system each time would have to be
    # cleared each time, a fifth of the whole work.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
}
_GRACE_S = 5.0


class Provers:
    """Processes that find out about graphs; leaving the `with` ends those that are left."""

    def __init__(self, cpus: int) -> None:
        """Start a process, which loads what it needs and waits; where there can be none, this one does its work.

        Args:
            cpus: how many CPUs there are to use.
        """
        self._results: list[BinaryIO] = []
        self._result_of: dict[Path, BinaryIO] = {}
        self._found: dict[Path, Findings] = {}
        self._provider: Provider = "cpu"
        self._process: subprocess.Popen[bytes] | None = None
        descriptors: list[int] = []
        try:
            for _ in range(min(cpus, _MOST_PROCESSES)):
                reading, writing = os.pipe()
                self._results.append(os.fdopen(reading, "rb"))
                descriptors.append(writing)
            self._process = _start(descriptors)
        except OSError:
            self.close()
        except BaseException:
            self.close()
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def start(self, folders: Sequence[Path], provider: Provider) -> None:
        """Share the work out: the largest goes first, each to whoever has the least.

        Args:
            folders: with the graphs of an artefact each; of its share, each process takes them in this order.
            provider: what the server is asked for.
        """
        self._provider = provider
        if self._process is None or self._process.stdin is None:
            return
        shares: list[list[Path]] = [[] for _ in self._results[: len(folders)]]
        sizes = [0] * len(shares)
        for folder in sorted(folders, key=_size, reverse=True):
            least = sizes.index(min(sizes))
            sizes[least] += _size(folder)
            self._result_of[folder] = self._results[least]
        for folder in folders:
            shares[self._results.index(self._result_of[folder])].append(folder)
        # One that ended already is noticed when its results are missed.
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((provider, shares), self._process.stdin)
            self._process.stdin.flush()

    def findings(self, folder: Path) -> Findings:
        """What was found out about a folder of `start`; waits for it.

        Raises:
            ArtefactError: the process ended before it could tell.
        """
        result = self._result_of.get(folder)
        if result is None:
            from service.artefact.verification import find_out

            return find_out(folder, self._provider)
        while folder not in self._found:
            try:
                about, findings = pickle.load(result)
            except (EOFError, pickle.UnpicklingError):
                raise ArtefactError(
                    folder,
                    "the process that proves the model ended before it was done; if it wrote nothing above this line, "
                    "it was killed, most often because the memory is too small.",
                ) from None
            self._found[about] = findings
        return self._found[folder]

    def close(self) -> None:
        """End all processes and wait until they have ended."""
        if self._process is not None:
            if not self._result_of:
                # Alone, and perhaps still loading, when it would not notice anything else.
                self._process.kill()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    # All of them end when this pipe does.
                    self._process.stdin.close()
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for result in self._results:
            result.close()
        self._results.clear()
        self._result_of.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start(results: Sequence[int]) -> subprocess.Popen[bytes]:
    # The modules of this process, however it came by them.
    code = f"import sys; sys.path[:] = {sys.path!r}; from service.artefact.proving import main; main({list(results)})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        # The system closes this pipe when this process ends in any way.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=results,
        # Whoever presses Ctrl-C means the server, which ends these processes.
        process_group=0,
        env={**os.environ, **_ENVIRONMENT},
    )


def _size(folder: Path) -> int:
    """Bytes of the model: proofs take about as long as the weights are many."""
    try:
        return (folder / "model.onnx").stat().st_size
    except OSError:
        return 0


def main(results: Sequence[int]) -> None:
    """Find out about the folders that stdin names and write what was found into pipes, one for each share of the work.

    One process loads what is needed and becomes as many as there are shares. All of them end with the process that
    started them, whatever becomes of that.

    Args:
        results: descriptors of the pipes.
    """
    from service.artefact.verification import find_out

    others: list[int] = []
    status = 1
    try:
        provider, shares = pickle.load(sys.stdin.buffer)
        mine = 0
        # Nothing here has started a thread yet, which a fork would lose.
        for share in range(1, len(shares)):
            other = os.fork()
            if other == 0:
                mine, others = share, []
                break
            others.append(other)
        threading.Thread(target=_end_with_parent, args=(others,), daemon=True).start()
        # A pipe ends when its writer ends: nobody else may hold it open.
        for share, descriptor in enumerate(results):
            if share != mine:
                os.close(descriptor)
        with os.fdopen(results[mine], "wb") as pipe:
            for folder in shares[mine]:
                pickle.dump((folder, find_out(folder, provider)), pipe)
                pipe.flush()
        status = 0
    except (BrokenPipeError, EOFError):
        # The server has ended already.
        pass
    except Exception:
        traceback.print_exc()
    finally:
        _end(others, status)


def _end_with_parent(others: Sequence[int]) -> None:
    while os.read(0, 1):
        pass
    _end(others, 1)


def _end(others: Sequence[int], status: int) -> None:
    """Ends without taking everything down piece by piece, after `others`, so that nobody else has to look for them."""
    for other in others:
        # Whichever of two threads comes first.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(other, 0)
    os._exit(status)
