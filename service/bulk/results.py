"""The folder of a run: its lock, its manifest, its listing, and the parts that are complete.

```
DEST/manifest.json               model, options, sources, number of inputs and parts, digest of the listing
DEST/inputs.jsonl                one line for each part: which inputs it covers
DEST/answers/part-NNNNNN.parquet one for each complete part
DEST/errors/part-NNNNNN.parquet  where inputs of the part have no answer
DEST/summary.json, summary.txt   of a complete run
```

Every file replaces its predecessor at once, and the file of answers, the last of a part, makes it complete: a run may
be killed at any instant. The lock is the system's and ends with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any

from service.artefact.files import write_atomically
from service.bulk.listing import Part
from service.bulk.tables import Record, answers_path, errors_path, read_record
from service.sheets.command import UsageError

_MANIFEST, _LISTING, _NEW, _LOCK = "manifest.json", "inputs.jsonl", "inputs.new", ".lock"
_FILES = {_MANIFEST, _LISTING, _NEW, _LOCK, "answers", "errors", "summary.json", "summary.txt"}
_ADVICE = "give the command that began it, or choose another --out"


@contextlib.contextmanager
def locked(folder: Path) -> Generator[Results]:
    """Give the results in a folder to this process alone; a missing folder is made.

    Raises:
        UsageError: another process has it, or it holds files of something else.
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder with --out")
    foreign = [path.name for path in folder.iterdir() if not _is_ours(path.name)] if folder.exists() else []
    if foreign:
        raise UsageError(f"{folder} holds {sorted(foreign)[0]!r}, which is not of such a run; choose another --out")
    for name in ("answers", "errors"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run writes {folder}; wait until it ends, or choose another --out") from None
        _remove_unfinished(folder)
        try:
            yield Results(folder)
        finally:
            _remove_unfinished(folder)


def _remove_unfinished(folder: Path) -> None:
    """Remove the files that a process wrote when it was killed."""
    for left in itertools.chain(folder.glob(".*.*"), folder.glob("*/.part-*")):
        left.unlink(missing_ok=True)


def _is_ours(name: str) -> bool:
    return name in _FILES or name.startswith(tuple(f".{own}." for own in _FILES))


class Results:
    """The results of one run, complete or not."""

    run: str
    """Digest of the manifest."""
    manifest: dict[str, Any]

    def __init__(self, folder: Path) -> None:
        """Use `locked`."""
        self._folder = folder

    def begin(self, asked: dict[str, Any], write_listing: Callable[[IO[bytes]], int]) -> None:
        """List the sources; begin a run, or go on with the one that is here.

        Args:
            asked: arguments of the command, in JSON.
            write_listing: writes one line for each part and returns the number of inputs.

        Raises:
            UsageError: the run that is here is another one, or its sources have changed.
            SourceError: a source cannot be listed.
            OSError: a file cannot be written.
        """
        listing, manifest = self._folder / _LISTING, self._folder / _MANIFEST
        begun = json.loads(manifest.read_bytes()) if manifest.exists() else None
        if begun is not None and not any(self._folder.glob("answers/part-*.parquet")):
            # Nothing is lost: it ended before its first part was complete.
            begun = None
        differences = [] if begun is None else [name for name in asked if asked[name] != begun.get(name)]
        if begun is not None and differences:
            name = differences[0]
            raise UsageError(
                f"{self._folder} holds a run with another {name}: {begun.get(name)!r}, not {asked[name]!r}; {_ADVICE}"
            )
        new, rows = self._folder / _NEW, [0]
        write_atomically(new, lambda file: rows.append(write_listing(file)))
        try:
            with new.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if begun is None:
                new.replace(listing)
                with listing.open("rb") as file:
                    parts = sum(1 for _ in file)
                begun = {**asked, "inputs": rows[-1], "parts": parts, "listing": f"sha256:{digest}"}
                text = json.dumps(begun, indent=1)
                write_atomically(manifest, lambda file: file.write(text.encode()))
            elif begun["listing"] != f"sha256:{digest}":
                raise UsageError(f"the sources have changed: {_difference(listing, new)}; put them back, or {_ADVICE}")
        finally:
            new.unlink(missing_ok=True)
        self.manifest = begun
        self.run = f"sha256:{hashlib.sha256(manifest.read_bytes()).hexdigest()}"

    def records(self) -> Iterator[Record]:
        """Yield the records of all complete parts, in order; a damaged part counts as missing.

        Raises:
            UsageError: a part is of another run.
        """
        for path in sorted(self._folder.glob("answers/part-*.parquet")):
            try:
                record = read_record(path)
            except (OSError, ValueError, TypeError):
                continue
            if record.run != self.run:
                raise UsageError(f"{path} is of another run; {_ADVICE}")
            if answers_path(self._folder, record.part) != path:
                raise UsageError(f"{path} is a copy of part {record.part}; remove it")
            if record.errors == 0 or errors_path(self._folder, record.part).exists():
                yield record

    def missing(self, complete: set[int]) -> Iterator[str]:
        """Yield the lines of the parts that are not complete."""
        with (self._folder / _LISTING).open(encoding="ascii") as file:
            for number, line in enumerate(file):
                if number not in complete:
                    yield line

    def write(self, name: str, text: str) -> None:
        """Write a file beside the parts; raises `OSError`."""
        write_atomically(self._folder / name, lambda file: file.write(text.encode()))


def _difference(old: Path, new: Path) -> str:
    """Return the first file that two listings disagree about."""
    with old.open(encoding="ascii") as left, new.open(encoding="ascii") as right:
        for before, after in itertools.zip_longest(left, right):
            if before == after:
                continue
            pieces = [Part.of(line).pieces if line else () for line in (before, after)]
            for was, now in itertools.zip_longest(*pieces):
                if was == now:
                    continue
                if was is not None and now is not None and was.name == now.name:
                    return f"{now.name} is not what it was"
                return f"{now.name if now else 'nothing'} is where {was.name if was else 'nothing'} was"
    return "their order is another one"
