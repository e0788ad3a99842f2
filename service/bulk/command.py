"""The command: sources in, a folder of Parquet files out, exit status."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service import __version__
from service.artefact.card import read_card
from service.artefact.files import CARD_FILE, MODEL_FILE, file_digest
from service.bulk.arguments import ROWS, SEARCHED_ROWS
from service.bulk.locations import is_url
from service.errors import LipcertError
from service.runtime.cpus import usable_cpus
from service.settings import read_settings
from service.sheets.command import UsageError, check_libraries, checked_options
from service.sheets.sources import SourceError
from service.sheets.writers import printable

COMPLETE, WITH_ERRORS, NOT_COMPLETE, INTERRUPTED = 0, 1, 2, 130
_OPTIONS = ("counterfactual", "novelty", "proof", "epsilon", "resize", "background", "coverage", "max_error")
_SHOWN_S = 0.5
_LOGGED_S = 30.0


def certify_images(chosen: argparse.Namespace) -> int:
    """Run the command and return its exit status.

    Args:
        chosen: the options of `service.bulk.arguments`.
    """
    # The parts are the news: no lines about the proof of the model and its provider.
    logging.getLogger().setLevel(logging.ERROR)
    try:
        needed = [("onnxruntime", "this", "cpu"), ("pyarrow", "this", "bulk")]
        if any(map(is_url, chosen.sources)):
            needed.append(("fsspec", "a URL", "bulk"))
        if chosen.ray is not None:
            needed.append(("ray", "--ray", "ray"))
        check_libraries(needed)
        return _run(chosen)
    except (UsageError, SourceError, LipcertError) as error:
        sys.stderr.write(f"error: {_lines(str(error))}\n")
    except OSError as error:
        reason = f"the results cannot be written: {error}; the same command goes on where it ended"
        sys.stderr.write(f"error: {printable(reason)}\n")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it ended\n")
        return INTERRUPTED
    return NOT_COMPLETE


def _run(chosen: argparse.Namespace) -> int:
    # Imported here: pyarrow may be missing.
    from service.bulk.containers import Reading
    from service.bulk.listing import write_listing
    from service.bulk.results import locked
    from service.bulk.summary import counted, in_words, summarise
    from service.bulk.work import Job
    from service.sheets.in_process import folder_of

    given = {name: getattr(chosen, name) for name in _OPTIONS}
    options = checked_options({name: value for name, value in given.items() if value is not None})
    settings = read_settings()
    model = folder_of(settings, None if chosen.model is None else Path(chosen.model)).absolute()
    card = read_card(model)
    reading = Reading(card.input.shape, chosen.column, settings.max_body_bytes)
    sources = [source if is_url(source) else os.path.abspath(source) for source in chosen.sources]  # noqa: PTH100
    out = Path(os.path.abspath(chosen.out))  # noqa: PTH100
    within = [source for source in sources if not is_url(source) and Path(source) in (out, *out.parents)]
    if within:
        raise UsageError(f"{out} lies in {within[0]}, and its files would be inputs; choose another --out")
    part_rows = chosen.part_rows or (SEARCHED_ROWS if chosen.counterfactual else ROWS)
    digests = file_digest(model / MODEL_FILE), file_digest(model / CARD_FILE)
    runtime: Any = importlib.import_module("onnxruntime")
    asked = {
        "versions": {"lipcert": __version__, "onnxruntime": runtime.__version__},
        "model": card.name,
        "digest": digests[0],
        "card_digest": digests[1],
        "options": options.model_dump(mode="json", exclude={"model"}, exclude_defaults=True),
        "sources": sources,
        "column": chosen.column,
        "part_rows": part_rows,
        "limits": {"bytes": settings.max_body_bytes, "pixels": settings.max_pixels},
    }
    with locked(out) as results:
        sys.stderr.write("listing the inputs\n")
        results.begin(asked, lambda file: write_listing(file, sources, reading, part_rows))
        complete, done = set[int](), 0
        for record in results.records():
            complete.add(record.part)
            done += record.answered + record.errors
        progress = _Progress(results.manifest["inputs"], done)
        job = Job(results.run, model, digests, options, reading, out)
        if len(complete) < results.manifest["parts"]:
            for record in _records(chosen, job, results.missing(complete), results.manifest["parts"] - len(complete)):
                progress.add(record.answered + record.errors)
            progress.end()
        summary = summarise(results.manifest, results.records())
        if summary["answered"] + summary["errors"] != summary["inputs"]:
            raise SourceError("a part was damaged or removed while the others were certified; give the command again")
        results.write("summary.json", json.dumps(summary, indent=1) + "\n")
        results.write("summary.txt", in_words(summary))
    sys.stdout.write(f"{counted(summary)}\n")
    return WITH_ERRORS if summary["errors"] else COMPLETE


def _records(chosen: argparse.Namespace, job: Any, lines: Iterator[str], parts: int) -> Iterator[Any]:
    if chosen.ray is not None:
        from service.bulk.cluster import run_on_ray

        return run_on_ray(job, lines, chosen.ray)
    from service.bulk.local import run_locally

    return run_locally(job, lines, min(parts, chosen.processes or usable_cpus()))


class _Progress:
    """A line on stderr that says how many inputs are done, and when all are."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before, self._done = total, done, done
        self._started_s = self._written_s = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        if done:
            sys.stderr.write(f"{done} of {total} inputs are done already\n")

    def add(self, rows: int) -> None:
        """Count inputs; write the line now and then."""
        self._done += rows
        now_s = time.monotonic()
        if now_s - self._written_s >= (_SHOWN_S if self._is_terminal else _LOGGED_S):
            self._written_s = now_s
            rate = (self._done - self._before) / (now_s - self._started_s)
            left_s = round((self._total - self._done) / rate)
            line = f"{self._done} of {self._total} inputs, {rate:.0f} per second, {_duration(left_s)} left"
            sys.stderr.write(f"\r\x1b[K{line}" if self._is_terminal else f"{line}\n")
            sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.splitlines()))
