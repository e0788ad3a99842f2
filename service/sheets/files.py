"""Which files the words of a command line name, in order, and their bytes."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from service.pixels.folders import is_clutter


class UnusableFileError(Exception):
    """A file that cannot be read."""


def named_files(words: Iterable[str]) -> list[Path]:
    """Return the files that the words name: files as they are, folders and patterns sorted and without clutter.

    A word that names nothing is returned as it is, and reading it says so.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found += list(_below(path)) or [path]
        elif glob.has_magic(word) and not os.path.lexists(word):
            found += _matching(word) or [path]
        else:
            found.append(path)
    return found


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, and folders that cannot be listed; links to folders are left alone."""
    unlisted: list[Path] = []
    for directory, folders, names in os.walk(folder, onerror=lambda error: unlisted.append(Path(error.filename))):
        folders[:] = sorted(name for name in folders if not is_clutter(name))
        yield from (Path(directory, name) for name in sorted(names) if not is_clutter(name))
    yield from unlisted


def _matching(pattern: str) -> list[Path]:
    own = set(Path(pattern).parts)
    found: dict[Path, None] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        path = Path(match)
        if not any(is_clutter(part) for part in path.parts if part not in own):
            found |= dict.fromkeys(_below(path) if path.is_dir() else [path])
    return list(found)


def read_image(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a file.

    Args:
        path: of a regular file.
        most_bytes: of the file.

    Raises:
        UnusableFileError: the file is missing, of another kind or too large, or cannot be read.
    """
    try:
        # A pipe that nobody writes into would block without O_NONBLOCK.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnusableFileError("it is not a regular file")
            if status.st_size > most_bytes:
                raise UnusableFileError(f"it has {status.st_size} bytes, and at most {most_bytes} are read")
            return file.read(most_bytes)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnusableFileError(f"it cannot be read ({reason or error})") from error
