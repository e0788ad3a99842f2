"""Proofs made in short-lived processes beside the server: it never holds what a proof takes, neither the libraries nor
the memory, and loads itself in the meantime.

The processes run `service.prover` and end when they are done, when they are told to, or with this process, whatever
becomes of it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from service.errors import ArtefactError

if TYPE_CHECKING:
    # At run time these come with what was found: this module is there before anything large is loaded.
    from service.engine import Provider
    from service.graphs import Findings

_MOST_PROVERS = 4
_ENVIRONMENT = {
    # The processes are as many as the CPUs already, and threads that wait by spinning would take them from each other.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    # Proofs allocate and free matrices all the time; memory that went back to the system each time would have to be
    # cleared each time, a fifth of the whole work.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
}


class Provers:
    """Processes that find out about graphs; leaving the `with` ends those that are left."""

    def __init__(self, cpus: int) -> None:
        """Start the processes, which load what they need and wait.

        Args:
            cpus: how many CPUs there are to use.
        """
        self._processes: list[subprocess.Popen[bytes]] = []
        self._prover_of: dict[Path, subprocess.Popen[bytes]] = {}
        self._found: dict[Path, Findings] = {}
        self._provider: Provider = "cpu"
        try:
            for _ in range(min(cpus, _MOST_PROVERS)):
                self._processes.append(_start())
        except OSError:
            # Where there can be no processes, the work is done in this one.
            self.close()
        except BaseException:
            self.close()
            raise

    def start(self, folders: Sequence[Path], provider: Provider) -> None:
        """Share the work out: the largest first, each to whoever has the least; processes without any end."""
        self._provider = provider
        shares: list[list[Path]] = [[] for _ in self._processes]
        sizes = [0] * len(shares)
        for folder in sorted(folders, key=_size, reverse=True):
            if shares:
                least = sizes.index(min(sizes))
                shares[least].append(folder)
                sizes[least] += _size(folder)
        for process, share in zip(self._processes, shares, strict=True):
            self._prover_of |= dict.fromkeys(share, process)
            assert process.stdin is not None
            # One that ended already is noticed when its results are missed.
            with contextlib.suppress(BrokenPipeError):
                pickle.dump((provider, share), process.stdin)
                process.stdin.flush()

    def findings(self, folder: Path) -> Findings:
        """What was found out about a folder of `start`; waits for it.

        Raises:
            ArtefactError: the process ended before it could tell.
        """
        process = self._prover_of.get(folder)
        if process is None:
            from service.prover import find_out

            return find_out(folder, self._provider)
        while folder not in self._found:
            assert process.stdout is not None
            try:
                about, findings = pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                status = process.wait()
                raise ArtefactError(
                    folder,
                    f"the process that proves the model ended early, with status {status}"
                    + (" (killed: most often the memory is too small)" if status == -9 else "")
                    + "; see what it wrote above.",
                ) from None
            self._found[about] = findings
        return self._found[folder]

    def close(self) -> None:
        """End all processes and wait until they have ended."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # The modules of this process, however it came by them.
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from service.prover import main; main()"],
        # It ends when this pipe is closed, which the system does when this process ends in any way.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **_ENVIRONMENT},
    )


def _size(folder: Path) -> int:
    """Bytes of the model: proofs take about as long as the weights are many."""
    try:
        return (folder / "model.onnx").stat().st_size
    except OSError:
        return 0
