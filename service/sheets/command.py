"""The command: files in, rows out, exit status."""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.api.schema import Options
from service.artefact.files import write_atomically
from service.sheets.files import UnusableFileError, named_files, read_image
from service.sheets.rows import Row
from service.sheets.sources import About, RefusedError, Source, SourceError
from service.sheets.writers import WRITERS, Table, printable

ANSWERED, BELOW, NOT_ANSWERED, INTERRUPTED = 0, 1, 2, 130
_PROGRESS_S = 0.2
_MOST_STEM_BYTES = 150
"""Bytes of a file's name in the name of its counterfactual; file systems allow 255 in all."""


class UsageError(Exception):
    """A command that cannot be run as it is."""


@dataclass
class Count:
    """Rows by their result."""

    certified: int = 0
    abstained: int = 0
    below: int = 0
    """Certified, with a radius below `--min-radius`."""
    failed: int = 0

    def add(self, row: Row, min_radius: float) -> None:
        """Count a row."""
        if row.answer is None or row.error is not None:
            self.failed += 1
        elif not row.answer.certificate.certified:
            self.abstained += 1
        else:
            self.certified += 1
            self.below += row.answer.certificate.radius < min_radius

    @property
    def total(self) -> int:
        """All rows."""
        return self.certified + self.abstained + self.failed

    @property
    def status(self) -> int:
        """Exit status."""
        return NOT_ANSWERED if self.failed else BELOW if self.abstained or self.below else ANSWERED


def predict(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    Args:
        chosen: the options of `service.sheets.arguments`.
    """
    # The rows are the news: no lines about the proof of the model and its provider.
    logging.getLogger().setLevel(logging.ERROR)
    try:
        _check(chosen)
        files = named_files(chosen.paths)
        with _source(chosen) as source:
            return _run(chosen, files, source)
    except (UsageError, SourceError) as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
    except OSError as error:
        # Of the output: files that cannot be read have a row.
        sys.stderr.write(f"error: the output cannot be written: {printable(str(error))}\n")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; no output file was written\n")
        return INTERRUPTED
    return NOT_ANSWERED


def _check(chosen: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and libraries that are missing; raises `UsageError`."""
    if chosen.save is not None and not chosen.counterfactual:
        raise UsageError("--save writes counterfactuals: add --counterfactual")
    checked_options(_options(chosen))
    if chosen.server is None and (chosen.api_key_file is not None or chosen.ca_file is not None):
        raise UsageError("--api-key-file and --ca-file are for --server: add it, or leave them out")
    needed = [("httpx", "--server", "client")] if chosen.server is not None else [("onnxruntime", "this", "cpu")]
    if chosen.parquet is not None:
        needed.append(("pyarrow", "--parquet", ""))
    check_libraries(needed)
    out = _output(chosen)[1]
    if out is not None and (out.is_dir() or (out.exists() and not out.is_file())):
        raise UsageError(f"{out} is not a regular file: name another one")
    if chosen.save is not None:
        chosen.save.mkdir(parents=True, exist_ok=True)


def checked_options(values: dict[str, Any]) -> Options:
    """Return the options of requests; raises `UsageError` where they are not valid or contradict each other."""
    try:
        return Options(**values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = f"--{str(fault['loc'][0]).replace('_', '-')}: " if fault["loc"] else ""
        raise UsageError(f"{place}{fault['msg'].removeprefix('Value error, ')}") from None


def check_libraries(needed: Iterable[tuple[str, str, str]]) -> None:
    """Refuse a missing library, with the command that installs it; raises `UsageError`.

    Args:
        needed: library, its purpose, and the extra that brings it or an empty text.
    """
    for library, purpose, extra in needed:
        if importlib.util.find_spec(library) is None:
            advice = f"lipcert[{extra}]" if extra else library
            raise UsageError(f"{purpose} needs {library}, which is not installed: `pip install '{advice}'`")


def _output(chosen: argparse.Namespace) -> tuple[str, Path | None]:
    given = [(name, getattr(chosen, name)) for name in WRITERS if getattr(chosen, name) is not None]
    return given[0] if given else ("", None)


_EXTRAS = ("saliency", "novelty")
"""Options that are sent where they are asked for: an older server does not know them."""


def _options(chosen: argparse.Namespace) -> dict[str, Any]:
    named = ("counterfactual", "resize", "proof", "epsilon", "strength", "path", "saliency", "novelty", "background")
    given = {name: getattr(chosen, name) for name in named}
    return {name: value for name, value in given.items() if value is not None and (name not in _EXTRAS or value)}


@contextlib.contextmanager
def _source(chosen: argparse.Namespace) -> Generator[Source]:
    options = _options(chosen)
    # Imported here: a source needs no library of the other.
    if chosen.server is None:
        from service.sheets.in_process import InProcess

        yield InProcess(None if chosen.model is None else Path(chosen.model), Options(**options))
        return
    from service.client import Client
    from service.sheets.remote import Remote

    try:
        key = None if chosen.api_key_file is None else chosen.api_key_file.read_text(encoding="utf-8").strip()
        client = Client(chosen.server, api_key=key, verify=True if chosen.ca_file is None else chosen.ca_file)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    with client:
        yield Remote(client, chosen.model, options)


def _run(chosen: argparse.Namespace, files: Sequence[Path], source: Source) -> int:
    count = Count()
    min_radius = chosen.min_radius or 0.0
    kind, out = _output(chosen)

    def rows() -> Generator[Row]:
        shown = sys.stderr.isatty() and (out is not None or not sys.stdout.isatty())
        with _progress(len(files), count, shown=shown), contextlib.closing(_rows(files, source, chosen.save)) as found:
            for row in found:
                count.add(row, min_radius)
                yield row

    # Closed where writing fails: no request may be under way when the client is closed.
    with contextlib.closing(rows()) as answered:
        if out is not None:
            write_atomically(out, lambda file: WRITERS[kind](file, answered))
        else:
            names, shown = (
                [str(file) for file in files],
                (chosen.epsilon is not None, chosen.counterfactual, chosen.novelty),
            )
            table = Table(sys.stdout, names, source.about.labels, *shown)
            for row in answered:
                table.add(row)
    sys.stdout.write(f"{_summary(count, chosen.min_radius)}\n{_caution(source.about)}\n")
    return count.status


def _rows(files: Sequence[Path], source: Source, save: Path | None) -> Generator[Row]:
    """Yield a row for each file, in order; some files ahead are worked on at the same time."""
    pool, interrupted = ThreadPoolExecutor(source.workers), False
    pending: deque[Future[Row]] = deque()
    try:
        for number, path in enumerate(files):
            pending.append(pool.submit(_row, number, path, source, save))
            if len(pending) >= 2 * source.workers:
                yield _reported(pending.popleft().result())
        while pending:
            yield _reported(pending.popleft().result())
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        # A thread that reads from a connection does not notice that it is closed, and waits until its timeout.
        pool.shutdown(wait=not interrupted, cancel_futures=True)


def _row(number: int, path: Path, source: Source, save: Path | None) -> Row:
    try:
        answer = source.answer(read_image(path, source.most_bytes))
    except (RefusedError, UnusableFileError) as error:
        return Row(path, None, str(error))
    except Exception as error:
        # The rows of the other files must not be lost.
        return Row(path, None, f"unexpected {type(error).__name__}: {error}")
    if save is None or answer.counterfactual is None:
        return Row(path, answer, None)
    suffix = "png" if answer.counterfactual.media_type == "image/png" else "npy"
    target = save / f"{number:06d}-{os.fsdecode(os.fsencode(path.stem)[:_MOST_STEM_BYTES])}.{suffix}"
    try:
        image = base64.b64decode(answer.counterfactual.image, validate=True)
        write_atomically(target, lambda file: file.write(image))
    except (OSError, ValueError) as error:
        return Row(path, answer, f"its counterfactual cannot be written to {target}: {error}")
    return Row(path, answer, None, target)


def _reported(row: Row) -> Row:
    if row.error is not None:
        sys.stderr.write(f"error: {printable(row.file)}: {printable(row.error)}\n")
    return row


@contextlib.contextmanager
def _progress(total: int, count: Count, *, shown: bool) -> Generator[None]:
    """Show a line on a terminal that says how many files are done."""
    if not shown:
        yield
        return
    from threading import Event, Thread

    done, started = Event(), time.monotonic()

    def show() -> None:
        while not done.wait(_PROGRESS_S):
            rate = count.total / (time.monotonic() - started)
            sys.stderr.write(f"\r\x1b[K{count.total} of {total} files, {count.failed} not answered, {rate:.0f}/s")
            sys.stderr.flush()

    thread = Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.stderr.write("\r\x1b[K")


def _summary(count: Count, min_radius: float | None) -> str:
    below = "" if min_radius is None else f", {count.below} of them below {min_radius:g}"
    return (
        f"{count.total} files: {count.certified} certified{below}, {count.abstained} abstained, "
        f"{count.failed} not answered"
    )


def _caution(about: About) -> str:
    stated = "its card states no accuracy"
    right = stated if about.accuracy is None else f"it is right on {about.accuracy:.2%} of its test images"
    return f"A certified answer of {about.name} is stable, not necessarily right: {right}."
