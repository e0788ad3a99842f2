"""The files of an artefact after its verification: whether they have changed since.

The status of a file (inode, size, times) says cheaply that nothing has happened; where it has changed, the digest
decides. A change that a file system does not record, such as two writes within one tick of its clock, is found
by a second reading: a status is trusted when it is met again.

While the folder of models is read again, and where a newer version could not be verified, a model is retained: it goes
on answering, whatever is in its folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from service.artefact.files import MODEL_FILE, check_digest, digest, file_digest, read_verified
from service.errors import ArtefactChangedError, ArtefactError

_log = logging.getLogger(__name__)

_EVERY_S = 1.0

FileName = Literal["model.onnx", "card.json"]


class _Seen(NamedTuple):
    """A file as it was checked."""

    status: tuple[int, ...] | None
    fault: str | None
    times: int
    """Readings with this status."""


class VerifiedFiles:
    """The verified files of one artefact. All methods may be called from several threads at once."""

    folder: Path
    name: str
    digests: Mapping[FileName, str]
    """As verified."""
    have_changed: bool
    """As far as `check` and `read_model` have seen."""

    def __init__(self, folder: Path, name: str, digests: Mapping[FileName, str]) -> None:
        """Store the verified digests.

        Args:
            folder: of the artefact.
            name: of the model, for messages.
            digests: of the files.
        """
        self.folder = folder
        self.digests = digests
        self.have_changed = False
        self.name = name
        self._seen: dict[FileName, _Seen] = {}
        self._lock = threading.Lock()
        self._is_retained = self._is_suspect = False
        self._model: int | None = None
        """Descriptor of `model.onnx`: a file that is replaced can still be read."""
        with contextlib.suppress(OSError):
            self._model = os.open(folder / MODEL_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            weakref.finalize(self, os.close, self._model)

    def retain(self) -> None:
        """Let the model answer, whatever becomes of its files; a graph that is not loaded needs `model.onnx` as it was,
        also where another file has its name now."""
        with self._lock:
            self._is_retained = True
            self.have_changed = False

    def release(self) -> None:
        """Compare the files again."""
        with self._lock:
            self._is_retained = self._is_suspect = False

    def check(self, *, is_patient: bool = False) -> None:
        """Update `have_changed`; a change, and its end, is one line in the log.

        `is_patient` lets a change pass that the last call did not find: the folder may be about to be read again.
        """
        with self._lock:
            if self._is_retained:
                return
            faults = [fault for name in self.digests if (fault := self._fault(name)) is not None]
            is_new = bool(faults) and not (self._is_suspect or self.have_changed)
            self._is_suspect = bool(faults)
            if not (is_new and is_patient):
                self._note(faults[0] if faults else None)

    def refuse_changed(self) -> None:
        """Check the files again, after a change.

        Raises:
            ArtefactChangedError: they have not been put back.
        """
        self.check()
        if self.have_changed:
            raise ArtefactChangedError(self.name)

    def read_model(self) -> bytes:
        """Return the verified bytes of `model.onnx`.

        Raises:
            ArtefactChangedError: the file does not have them any more.
        """
        try:
            return read_verified(self.folder / MODEL_FILE, self.digests[MODEL_FILE])
        except ArtefactError as error:
            with self._lock:
                if self._is_retained:
                    if (content := self._replaced_model()) is not None:
                        return content
                else:
                    self._note(str(error))
            raise ArtefactChangedError(self.name) from error

    def _replaced_model(self) -> bytes | None:
        """Return the verified bytes of the file that had the name `model.onnx`, if it still has them."""
        if self._model is None:
            return None
        with contextlib.suppress(OSError), open(self._model, "rb", closefd=False) as file:
            file.seek(0)
            content = file.read(os.fstat(self._model).st_size)
            return content if digest(content) == self.digests[MODEL_FILE] else None
        return None

    def _fault(self, name: FileName) -> str | None:
        path, seen = self.folder / name, self._seen.get(name)
        status = _status(path)
        if seen is not None and seen.status == status and seen.times > 1:
            return seen.fault
        fault = None
        try:
            check_digest(path, file_digest(path), self.digests[name])
        except ArtefactError as error:
            fault = str(error)
        same = seen is not None and seen.status == status == _status(path)
        self._seen[name] = _Seen(status, fault, 2 if same else 1)
        return fault

    def _note(self, fault: str | None) -> None:
        if fault is not None and not self.have_changed:
            _log.error(
                "model %s: %s Until then its requests get 503 artefact-changed, and /health/ready is 503.",
                self.name,
                fault,
            )
        if fault is None and self.have_changed:
            _log.warning("model %s: its files are again those that were verified", self.name)
        self.have_changed = fault is not None


def _status(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextlib.contextmanager
def watched(artefacts: Callable[[], Iterable[VerifiedFiles]]) -> Generator[None]:
    """Check files every second from a thread, as long as the context lasts; a change counts when it is met again."""
    end = threading.Event()

    def watch() -> None:
        # At once, too: this process may take the place of another one.
        is_first = True
        while not end.is_set():
            for files in artefacts():
                files.check(is_patient=not is_first)
            is_first = False
            end.wait(_EVERY_S)

    # Not joined: a file system that does not answer must not hold up the end of the server.
    threading.Thread(target=watch, name="artefacts", daemon=True).start()
    try:
        yield
    finally:
        end.set()
