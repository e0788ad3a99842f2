"""Pool of short-lived processes that verify artefacts beside the server: the server holds neither the libraries nor the
memory of a proof, and loads itself in the meantime.

The processes run `service.artefact.verification`. They end when they are done, when they are told to, or with the
server, even if it is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from service.errors import ArtefactError

if TYPE_CHECKING:
    # At run time this module comes with the first findings: the pool starts before anything large is loaded.
    from service.artefact.findings import Findings

_log = logging.getLogger(__name__)

_MOST_PROCESSES = 4
_ENVIRONMENT = {
    # There is a process for each CPU already, and threads that wait by spinning would take the CPUs from each other.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # A proof allocates and frees matrices all the time; clearing memory that the system has taken back in between would
    # be a fifth of the whole work.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
}
_GRACE_S = 5.0


class VerifierPool:
    """Processes that verify artefacts; leaving the `with` ends those that still run."""

    def __init__(self, cpus: int) -> None:
        """Start a process, which loads its libraries and waits; where no process can start, this one does its work.

        Args:
            cpus: number of CPUs to use.
        """
        self._results: list[BinaryIO] = []
        self._result_of: dict[Path, BinaryIO] = {}
        self._findings: dict[Path, Findings] = {}
        self._ended: set[BinaryIO] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._limits = (0.0, 0, 0.0)
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

    def start(self, folders: Sequence[Path], limits: tuple[float, int, float] = (0.0, 0, 0.0)) -> None:
        """Share the work out: the largest artefact first, each to the process with the least work.

        Args:
            folders: one artefact each; a process verifies those of its share in this order.
            limits: of each proof, seconds, bytes and work: `service.certificate.proof_limits.ProofLimits`.
        """
        self._limits = limits
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
        # A process that has ended is noticed when its results are missing.
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((shares, limits), self._process.stdin)
            self._process.stdin.flush()

    def findings(self, folder: Path) -> Findings:
        """Return the findings about a folder of `start`; waits for them.

        Where a process ends, the model that it was at is to blame: those behind it are verified by other processes.

        Raises:
            ArtefactError: the process ended before it could tell.
        """
        result = self._result_of.get(folder)
        if result is None:
            from service.artefact.verification import verify
            from service.certificate.proof_limits import ProofLimits

            return verify(folder, ProofLimits(*self._limits))
        while folder not in self._findings:
            try:
                about, findings = pickle.load(result)
            except (EOFError, pickle.UnpicklingError):
                if result in self._ended:
                    with VerifierPool(1) as other:
                        other.start([folder], self._limits)
                        return other.findings(folder)
                self._ended.add(result)
                raise ArtefactError(
                    folder,
                    "the process that proves the model ended before it was done; if it wrote nothing above this line, "
                    "it was killed, most often because the memory is too small.",
                ) from None
            self._findings[about] = findings
        return self._findings[folder]

    def close(self) -> None:
        """End all processes and wait until they have ended."""
        if self._process is not None:
            if not self._result_of:
                # A process without work may still be loading, when it would not notice the end of the pipe.
                self._process.kill()
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    # All processes end when this pipe does.
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
    # The same modules as in this process, wherever it found them.
    code = f"import sys; sys.path[:] = {sys.path!r}; from service.artefact.pool import main; main({list(results)})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        # The system closes this pipe when this process ends in any way.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=results,
        # Ctrl-C is meant for the server, which ends these processes.
        process_group=0,
        env={**os.environ, **_ENVIRONMENT},
    )


def _size(folder: Path) -> int:
    """Return the bytes of the model: a proof takes about as long as the model has weights."""
    try:
        return (folder / "model.onnx").stat().st_size
    except OSError:
        return 0


def main(results: Sequence[int]) -> None:
    """Verify the folders that stdin names and write the findings into pipes, one for each share of the work.

    One process loads the libraries and forks into as many as there are shares. All of them end with the process that
    started them, even if that is killed.

    Args:
        results: descriptors of the pipes.
    """
    from service.artefact.verification import verify
    from service.certificate.proof_limits import ProofLimits
    from service.logs import start_logs

    start_logs()
    others: list[int] = []
    status = 1
    try:
        shares, limits = pickle.load(sys.stdin.buffer)
        mine = 0
        # No thread has started yet; a fork would lose it.
        for share in range(1, len(shares)):
            other = os.fork()
            if other == 0:
                mine, others = share, []
                break
            others.append(other)
        threading.Thread(target=_end_with_parent, args=(others,), daemon=True).start()
        # A pipe ends when its writer ends: no other process may hold it open.
        for share, descriptor in enumerate(results):
            if share != mine:
                os.close(descriptor)
        with os.fdopen(results[mine], "wb") as pipe:
            for folder in shares[mine]:
                pickle.dump((folder, verify(folder, ProofLimits(*limits))), pipe)
                pipe.flush()
        status = 0
    except (BrokenPipeError, EOFError):
        # The server has ended already.
        pass
    except Exception:
        _log.exception("a verifier failed")
    finally:
        _end(others, status)


def _end_with_parent(others: Sequence[int]) -> None:
    while os.read(0, 1):
        pass
    _end(others, 1)


def _end(others: Sequence[int], status: int) -> None:
    """End without tearing down libraries, after `others`, so that nobody else has to wait for them."""
    for other in others:
        # Two threads may come here; one of them has waited already.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(other, 0)
    os._exit(status)
