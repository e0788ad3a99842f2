"""The folder of models, read again beside a server that serves: one process looks which artefacts are new or have
changed, has them verified (`service.artefact.pool`), and ends.

The process ends with the one that started it, even if that is killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import ArtefactError

if TYPE_CHECKING:
    from service.artefact.findings import Findings

Digests = tuple[str, str]
"""Of `model.onnx` and `card.json`."""
_PIECE = 1 << 16


@dataclass(frozen=True)
class Job:
    """The folder of models, and what is known of it."""

    models: Path
    first: str
    """See `artefact_folders`."""
    known: Mapping[Path, Digests]
    """Digests of the served artefacts, by folder: an artefact that still has them is not verified again."""
    limits: tuple[float, int, float]
    """See `VerifierPool.start`."""
    only: Path | None = None
    """The folder to verify; default: all."""
    skipped: Set[Path] = frozenset()
    """Folders that are passed over."""


@dataclass(frozen=True)
class Survey:
    """Artefacts that were found, and their verification."""

    folders: tuple[Path, ...] = ()
    """Of all artefacts, in the order of `artefact_folders`."""
    findings: Mapping[Path, Findings] = field(default_factory=dict)
    """About those that are new or have changed."""
    fault: str | None = None
    """Why the folder of models cannot be read."""


class Rereading:
    """The process. It belongs to one thread, and no call waits for it."""

    def __init__(self, job: Job) -> None:
        """Start it.

        Raises:
            OSError: no process can be started.
        """
        code = f"import sys; sys.path[:] = {sys.path!r}; from service.artefact.rereading import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            # The system closes this pipe when this process ends in any way.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is meant for the server, which ends this process.
            process_group=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.descriptor = self._process.stdout.fileno()
        """Can be read when there is something to `poll`."""
        os.set_blocking(self.descriptor, False)
        self._read = bytearray()
        # A job has the names of the artefacts, far less than a pipe holds.
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()

    def poll(self) -> Survey | None:
        """Return the survey once it is complete; null until then."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.descriptor, _PIECE):
                self._read += piece
            try:
                return pickle.loads(self._read)
            except (EOFError, pickle.UnpicklingError):
                return Survey(fault="the process that reads the folder of models ended before it was done")
        return None

    def close(self) -> None:
        """End the process and its verifiers."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def survey(job: Job) -> Survey:
    """Read the folder of models, and verify new and changed artefacts."""
    from service.artefact.folders import artefact_folders
    from service.artefact.pool import VerifierPool
    from service.runtime.cpus import usable_cpus

    try:
        folders = [folder for folder in artefact_folders(job.models, job.first) if folder not in job.skipped]
    except ArtefactError as error:
        return Survey(fault=str(error))
    changed = [folder for folder in folders if job.only in (None, folder) and _digests(folder) != job.known.get(folder)]
    if not changed:
        return Survey(tuple(folders))
    findings: dict[Path, Findings] = {}
    with VerifierPool(usable_cpus()) as pool:
        pool.start(changed, job.limits)
        for folder in changed:
            try:
                findings[folder] = pool.findings(folder)
            except ArtefactError as error:
                from service.artefact.findings import Findings

                findings[folder] = Findings(None, None, (error.file, error.reason))
    return Survey(tuple(folders), findings)


def main() -> None:
    """Answer the job in stdin with a survey in stdout."""
    from service.logs import start_logs

    start_logs()
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    found = survey(job)
    with contextlib.suppress(BrokenPipeError):
        pickle.dump(found, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    os._exit(0)


def _digests(folder: Path) -> Digests | None:
    from service.artefact.files import CARD_FILE, MODEL_FILE, file_digest

    try:
        return file_digest(folder / MODEL_FILE), file_digest(folder / CARD_FILE)
    except ArtefactError:
        # Its fault is found again where it is verified.
        return None


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    # The verifiers notice the end of this process.
    os._exit(1)
