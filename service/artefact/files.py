"""Files of an artefact: names, digests, reading, and replacement while other processes read them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Literal

from service.errors import ArtefactError

MODEL_FILE: Literal["model.onnx"] = "model.onnx"
CARD_FILE: Literal["card.json"] = "card.json"
_LARGEST = {MODEL_FILE: 2**31 - 1, CARD_FILE: 16 * 2**20}
"""Bytes that a file may have; protobuf reads no larger model."""


def digest(content: bytes) -> str:
    """Return `sha256:<hex>` of `content`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextlib.contextmanager
def open_file(path: Path) -> Generator[io.BufferedReader]:
    """Open a file of an artefact, through links as well; a pipe, a device or a file beyond any artefact is not read.

    Raises:
        ArtefactError: the file is missing, of another kind or too large, or cannot be read, also while it is open.
    """
    largest = _LARGEST.get(path.name, _LARGEST[CARD_FILE])
    try:
        # A pipe that nobody writes into would block without O_NONBLOCK.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtefactError(path, "it is a pipe or a device. Put a regular file there.")
            if status.st_size > largest:
                raise ArtefactError(path, f"it has {status.st_size} bytes, and at most {largest} are read.")
            yield file
    except FileNotFoundError as error:
        raise ArtefactError(
            path,
            f"the file is missing. An artefact is a folder with {MODEL_FILE} and {CARD_FILE}; copy it whole, or "
            "export it again.",
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArtefactError(path, f"the file cannot be read ({reason}). Check kind and permissions.") from error


def read_file(path: Path) -> bytes:
    """Return the bytes of a file of an artefact; raises `ArtefactError` as `open_file` does."""
    with open_file(path) as file:
        # Not one byte more than it had: a file that grows is not read to its end.
        return file.read(os.fstat(file.fileno()).st_size)


def file_digest(path: Path) -> str:
    """Return `sha256:<hex>` of a file of an artefact; raises `ArtefactError` as `open_file` does."""
    with open_file(path) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def read_verified(path: Path, verified: str) -> bytes:
    """Return the bytes of a file that was verified before, if they still have that digest.

    Args:
        path: of the file.
        verified: digest of the bytes that were verified.

    Raises:
        ArtefactError: the file has changed, or cannot be read.
    """
    content = read_file(path)
    check_digest(path, digest(content), verified)
    return content


def check_digest(path: Path, found: str, verified: str) -> None:
    """Refuse a file that has changed.

    Args:
        path: of the file.
        found: its digest.
        verified: the digest that it had.

    Raises:
        ArtefactError: the two differ.
    """
    if found != verified:
        raise ArtefactError(
            path,
            f"the file has the digest {found}; when it was verified, it was {verified}, and only that was "
            "proved. Put the file back, or send SIGHUP to the server, which verifies and serves the new one.",
        )


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file: every reader sees the old content or the new one, even after a crash.

    Args:
        path: of the file, in an existing folder.
        write: writes the content to an open binary file.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private; an artefact is read by the server's own user.
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
