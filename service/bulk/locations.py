"""Files on this machine and, through fsspec, behind URLs: names, contents and stamps that show a change."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

from service.sheets.files import UnusableFileError, files_below, named_files, read_image
from service.sheets.sources import SourceError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:[/:]")
_GLOB = re.compile(r"[*?\[]")
_CHANGES = ("etag", "ETag", "mtime", "LastModified", "last_modified", "created")
"""Names by which file systems of fsspec tell versions of a file apart."""


def is_url(name: str) -> bool:
    """Return whether a name is a URL, and not a path of this machine."""
    return _URL.match(name) is not None


def files_of(word: str) -> Iterator[tuple[str, str | None]]:
    """Yield the files that a word names, each with its stamp; a word that names nothing is yielded as it is.

    Raises:
        SourceError: there is no library for such URLs.
    """
    if not is_url(word):
        path = Path(word)
        found = files_below(path) if path.is_dir() else iter(named_files([word]))
        for file in found:
            yield str(file), stamp(str(file))
        return
    system, path = _system(word)
    listed: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(Exception):
        if _GLOB.search(path) and not word.startswith(("http:", "https:")):
            listed = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] == "file"}
        elif not word.startswith(("http:", "https:")) and system.isdir(path):
            listed = system.find(path, detail=True)
    if not listed:
        yield word, None
    for name in sorted(listed):
        yield system.unstrip_protocol(name), _stamp(listed[name])


def stamp(name: str) -> str | None:
    """Return size and time of a file, or its tag, as a text that changes with it; null where it cannot be looked at."""
    try:
        if not is_url(name):
            # For each of millions of images: a Path takes longer than the call.
            status = os.stat(name)  # noqa: PTH116
            return f"{status.st_size}:{status.st_mtime_ns}"
        system, path = _system(name)
        return _stamp(system.info(path))
    except SourceError:
        raise
    except Exception:
        # Of any library of fsspec. Reading the file tells why.
        return None


def _stamp(info: dict[str, Any]) -> str:
    change = next((info[name] for name in _CHANGES if info.get(name) is not None), "")
    return f"{info.get('size')}:{change}"


@contextlib.contextmanager
def opened(name: str) -> Generator[IO[bytes]]:
    """Open a file at its first byte; it can be read from any place.

    Raises:
        SourceError: there is no library for such URLs.
        Exception: it cannot be opened; libraries of fsspec have errors without a common type.
    """
    if is_url(name):
        system, path = _system(name)
        with system.open(path, "rb") as file:
            yield file
    elif not Path(name).is_file():
        raise FileNotFoundError("there is no such regular file")
    else:
        with Path(name).open("rb") as file:
            yield file


def content_of(name: str, most_bytes: int) -> bytes:
    """Return the bytes of a file.

    Args:
        name: path or URL.
        most_bytes: of the file.

    Raises:
        UnusableFileError: the file is missing, too large or cannot be read.
        SourceError: there is no library for such URLs.
    """
    if not is_url(name):
        return read_image(Path(name), most_bytes)
    system, path = _system(name)
    try:
        with system.open(path, "rb", block_size=0 if name.startswith("http") else None) as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise UnusableFileError("it cannot be read (there is no such file)") from error
    except Exception as error:
        raise UnreachableError(f"it cannot be read ({type(error).__name__}: {error})") from error
    if len(content) > most_bytes:
        raise UnusableFileError(f"it has more than {most_bytes} bytes")
    return content


class UnreachableError(UnusableFileError):
    """A file that another try may be able to read."""


def _system(name: str) -> tuple[Any, str]:
    try:
        core: Any = importlib.import_module("fsspec.core")
        return core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise SourceError(f"{name} cannot be read: {error}; `pip install 'lipcert[bulk]'` brings fsspec") from error
