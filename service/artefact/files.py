"""Atomic replacement of files that other processes read."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


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
