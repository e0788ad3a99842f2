"""Which files the words of a command line name, in order, and their bytes."""

from __future__ import annotations

import contextlib
import glob
import heapq
import itertools
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from service.pixels.folders import is_clutter

_SORTED_AT_ONCE = 50_000


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
            found += list(files_below(path)) or [path]
        elif glob.has_magic(word) and not os.path.lexists(word):
            found += _matching(word) or [path]
        else:
            found.append(path)
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, sorted, and folders that cannot be listed; links to folders are left alone."""
    folders: list[str] = []

    def names() -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_clutter(entry.name):
                    continue
                if not entry.is_dir():
                    yield entry.name
                elif not entry.is_symlink():
                    folders.append(entry.name)

    try:
        yield from (folder / name for name in _in_order(names()))
    except OSError:
        yield folder
    for name in sorted(folders):
        yield from files_below(folder / name)


def _in_order(names: Iterable[str]) -> Iterator[str]:
    """Yield names sorted; of a large folder, most of them wait in temporary files and not in memory."""
    with contextlib.ExitStack() as stack:
        runs: list[Iterable[str]] = []
        remaining = iter(names)
        while run := sorted(itertools.islice(remaining, _SORTED_AT_ONCE)):
            if len(run) == _SORTED_AT_ONCE:
                file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))
                # JSON, because a name may hold a newline and bytes that are not UTF-8.
                file.writelines(f"{json.dumps(name)}\n" for name in run)
                file.seek(0)
                runs.append(map(json.loads, file))
            else:
                runs.append(run)
        yield from heapq.merge(*runs)


def _matching(pattern: str) -> list[Path]:
    own = set(Path(pattern).parts)
    found: dict[Path, None] = {}
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
        path = Path(match)
        if not any(is_clutter(part) for part in path.parts if part not in own):
            found |= dict.fromkeys(files_below(path) if path.is_dir() else [path])
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
