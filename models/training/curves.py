"""Curves of a training as TensorBoard event files: one folder, with one file for each part of a run."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FLUSH_EVERY_S = 5.0
"""Seconds from one flush to the next, while points are added."""


class Curves:
    """Scalars over the number of steps taken.

    The calling thread writes the records with tensorboardX's `RecordWriter`; a file that cannot be written ends the
    curves with a warning, not the training. Its `SummaryWriter` queues points for a thread that a full disk ends, and
    eleven points later the full queue stops the training. That of torch raises the error, but needs seven packages more
    (55 MB) and 2.3 ms for a point of eight scalars, against 0.06 ms here.

    Args:
        folder: of the event files; created if missing.
        steps_taken: TensorBoard hides points of earlier parts of the run beyond this step (a run that was killed has
            curves beyond its last checkpoint).
    """

    def __init__(self, folder: Path, steps_taken: int) -> None:
        self._folder = folder
        self._writer: Any = None
        self._flushed = time.monotonic()
        try:
            # A training without curves needs no tensorboardX.
            tensorboard: Any = importlib.import_module("tensorboardX")
            self._event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
            self._summary_pb2: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
        except ImportError as error:
            log.warning("no curves for TensorBoard (%s): install tensorboardX, or add --no-tensorboard", error)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            self._writer = tensorboard.RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        except OSError as error:
            self._give_up(error)
            return
        self._write(file_version="brain.Event:2")
        session_log = self._event_pb2.SessionLog
        self._write(step=steps_taken + 1, session_log=session_log(status=session_log.START))

    def add(self, steps_taken: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each curve; every `FLUSH_EVERY_S` the points so far go to the disk."""
        if self._writer is None:
            return
        summary = self._summary_pb2.Summary
        values = [summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=steps_taken, summary=summary(value=values))
        if time.monotonic() - self._flushed > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write all points to the disk now."""
        if self._writer is not None:
            self._flushed = time.monotonic()
            try:
                self._writer.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flush and close; later points are dropped."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, **content: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(self._event_pb2.Event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
        log.warning("the curves in %s cannot be written (%s): training goes on without them", self._folder, error)
