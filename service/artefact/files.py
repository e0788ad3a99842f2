"""Files of an artefact: names, digests, reading, and replacement while other processes read them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

from service.errors import ArtefactError

MODEL_FILE: Literal["model.onnx"] = "model.onnx"
CARD_FILE = "card.json"


def digest(content: bytes) -> str:
    """Return `sha256:<hex>` of `content`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def read_file(path: Path) -> bytes:
    """Return the bytes of a file of an artefact; raises `ArtefactError` where they cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtefactError(
            path,
            f"the file is missing. An artefact is a folder with {MODEL_FILE} and {CARD_FILE}; copy it whole, or "
            "export it again.",
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArtefactError(path, f"the file cannot be read ({reason}). Check its permissions.") from error


def read_verified(path: Path, verified: str) -> bytes:
    """Return the bytes of a file that was verified before, if they still have that digest.

    Args:
        path: of the file.
        verified: digest of the bytes that were verified.

    Raises:
        ArtefactError: the file has changed, or cannot be read.
    """
    content = read_file(path)
    found = digest(content)
    if found != verified:
        raise ArtefactError(
            path,
            f"the file has the digest {found}; when the server started, it was {verified}, and only that was "
            "proved. Put the file back, or start the server again.",
        )
    return content


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
