"""Reloads: the process that leads reads the folder of models again, and sends every process the models to serve.

::

    SIGHUP, POST /v2/repository/models/NAME/load ──► Leader ──► a process reads and verifies (artefact.rereading)
                                                        │ State
                                                        └──► Board (several processes) ──► Follower of each process

The leader is the parent of several processes, or the only one. One order runs at a time; a reload that waits already is
not queued twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from service.artefact.folders import artefact_folders, names_of, split_name, version_of
from service.artefact.rereading import Job, Rereading, Survey
from service.errors import ArtefactError
from service.inference.catalogue import UNKNOWN, Catalogue, Order, State, planned
from service.inference.served import resolved
from service.settings import Settings, aliases_of, default_of

if TYPE_CHECKING:
    from service.artefact.signature import Signers

_log = logging.getLogger(__name__)

MOST_ORDERS = 16
_MOST_RESULTS = 64
_HEAD = struct.Struct("<QQ")
_LARGEST_ORDER = 4096
"""Bytes that a pipe takes at once or not at all: PIPE_BUF of Linux."""


class Leader:
    """Carries out orders. It belongs to one thread and starts no other, and no call waits."""

    def __init__(
        self,
        catalogue: Catalogue,
        settings: Settings,
        publish: Callable[[State], None],
        is_settled: Callable[[], bool] = lambda: True,
    ) -> None:
        """Wait for orders.

        Args:
            catalogue: of the leading process.
            settings: folder of models, default model, signatures, limits of a proof.
            publish: called with each state.
            is_settled: whether the catalogue follows the last state.
        """
        models = catalogue.models
        broken = {name: (error.file, error.reason) for name, error in models.broken.items()}
        self.state = State(dict.fromkeys(models), broken)
        self._catalogue = catalogue
        self._settings = settings
        self._publish = publish
        self._is_settled = is_settled
        self._orders: deque[Order] = deque()
        self._running: tuple[Order, Path | None, Rereading] | None = None
        self._unloaded: dict[str, Path] = {}

    @property
    def descriptors(self) -> list[int]:
        """File descriptors that become readable when `step` has something to do."""
        return [] if self._running is None else [self._running[2].descriptor]

    def ask(self, order: Order) -> None:
        """Queue an order."""
        if order.kind == "reload" and any(waiting.kind == "reload" for waiting in self._orders):
            return
        if len(self._orders) >= MOST_ORDERS:
            self._end(order, f"{MOST_ORDERS} orders wait already; try again later")
        else:
            self._orders.append(order)

    def step(self) -> None:
        """Go on with the order that runs, or begin the next."""
        if self._running is not None:
            order, only, rereading = self._running
            survey = rereading.poll()
            if survey is None:
                return
            self._running = None
            rereading.close()
            self._attempt(order, lambda: self._finish(order, only, survey))
        elif self._orders and self._is_settled():
            order = self._orders.popleft()
            self._attempt(order, lambda: self._begin(order))

    def close(self) -> None:
        """End the running order; the models stay as they are."""
        self._orders.clear()
        if self._running is not None:
            self._running[2].close()
            self._running = None

    def _attempt(self, order: Order, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:
            _log.exception("an order to change the models failed")
            self._end(order, "the order failed; see the log of the server")

    def _begin(self, order: Order) -> None:
        if order.kind == "unload":
            self._unload(order)
            return
        only = None
        if order.kind == "load":
            only = self._folder_of(order.name)
            if only is None:
                self._end(order, UNKNOWN)
                return
            self._unloaded = {name: folder for name, folder in self._unloaded.items() if folder != only}
        settings, models = self._settings, self._catalogue.models
        job = Job(
            settings.models,
            default_of(settings),
            {found.files.folder: (found.digest, found.card_digest) for found in models.values()},
            (settings.proof_seconds, settings.proof_bytes, settings.proof_work),
            only,
            frozenset(self._unloaded.values()),
        )
        try:
            self._running = order, only, Rereading(job)
        except OSError as error:
            _log.error("the models stay as they are: no process can be started (%s)", error.strerror or error)
            self._end(order, "no process can be started to verify models; try again later")
            return
        _log.warning("reading %s again", only or settings.models)
        self._publish_state(replace(self.state, is_reading=True))

    def _finish(self, order: Order, only: Path | None, survey: Survey) -> None:
        if survey.fault is not None:
            _log.error("the models stay as they are: %s", survey.fault)
            self._end(order, survey.fault)
            return
        settings = self._settings
        state = planned(self.state, survey, self._catalogue.models, settings, _signers_of(settings), only=only)
        fault = None
        if only is not None:
            name = next((name for name, entry in state.entries.items() if entry and entry.folder == only), order.name)
            if version_of(only, settings.models) is not None:
                name = names_of(only, settings.models)[0]
            fault = state.rejected.get(name)
            if name in state.broken:
                fault = " ".join(state.broken[name][1].split())[:500]
        self.state = state
        self._end(order, fault)

    def _unload(self, order: Order) -> None:
        models, name = self._catalogue.models, self._meant(order.name)
        leaving = [one for one in models.values() if name in (one.name, one.card.name)]
        entries = {other: entry for other, entry in self.state.entries.items() if models.get(other) not in leaving}
        if not leaving:
            self._end(order, None if any(name in (one, split_name(one)[0]) for one in self._unloaded) else UNKNOWN)
        elif resolved(default_of(self._settings), entries) is None:
            self._end(order, f"{order.name!r} is the default model, which is served as long as the server runs")
        else:
            self._unloaded |= {one.name: one.files.folder for one in leaving}
            rejected = {other: reason for other, reason in self.state.rejected.items() if other in entries}
            self.state = replace(self.state, entries=entries, rejected=rejected)
            _log.warning("unloaded: %s", ", ".join(one.name for one in leaving))
            self._end(order, None)

    def _meant(self, name: str) -> str:
        """Return the name of a model or of a version, also for an alias."""
        return aliases_of(self._settings.aliases).get(name, name)

    def _folder_of(self, name: str) -> Path | None:
        """Return the folder of an artefact that is or can be served; of several versions that of the highest."""
        name = self._meant(name)
        classifier = self._catalogue.models.get(name)
        if classifier is not None:
            return classifier.files.folder
        if name in self._unloaded:
            return self._unloaded[name]
        # One of the folder, not a path that leads elsewhere.
        with contextlib.suppress(ArtefactError):
            models = self._settings.models
            folders = artefact_folders(models, default_of(self._settings))
            return next((folder for folder in folders if name in names_of(folder, models)), None)
        return None

    def _end(self, order: Order, fault: str | None) -> None:
        results = dict(self.state.results)
        if order.id:
            results[order.id] = fault
        kept = dict(list(results.items())[-_MOST_RESULTS:])
        self._publish_state(replace(self.state, results=kept, is_reading=self._running is not None))

    def _publish_state(self, state: State) -> None:
        self.state = state
        self._publish(state)


class Board:
    """The last state, in memory that the forks of a process share."""

    def __init__(self) -> None:
        """Show nothing."""
        # Not a file, whose disk may be full.
        self._descriptor = os.memfd_create("lipcert-models")
        self._seen = 0
        os.pwrite(self._descriptor, _HEAD.pack(0, 0), 0)

    def write(self, state: State) -> None:
        """Show a state; one process writes."""
        content = pickle.dumps(state)
        # An odd version tells readers that the content is being written.
        os.pwrite(self._descriptor, _HEAD.pack(self._seen + 1, 0), 0)
        written = 0
        while written < len(content):
            written += os.pwrite(self._descriptor, content[written:], _HEAD.size + written)
        self._seen += 2
        os.pwrite(self._descriptor, _HEAD.pack(self._seen, len(content)), 0)

    def read(self) -> State | None:
        """Return the state if it is another one than the last time, in this process or before its fork."""
        head = os.pread(self._descriptor, _HEAD.size, 0)
        version, size = _HEAD.unpack(head)
        if version == self._seen or version % 2:
            return None
        content = os.pread(self._descriptor, size, _HEAD.size)
        if os.pread(self._descriptor, _HEAD.size, 0) != head:
            return None
        self._seen = version
        return pickle.loads(content)


class Orders:
    """A pipe for orders, from the forks of a process to it."""

    def __init__(self) -> None:
        """Open it."""
        self.descriptor, self._write = os.pipe()
        for end in (self.descriptor, self._write):
            os.set_blocking(end, False)

    def send(self, order: Order) -> bool:
        """Send an order; return whether the pipe took it."""
        content = json.dumps(order).encode() + b"\n"
        if len(content) > _LARGEST_ORDER:
            return False
        try:
            os.write(self._write, content)
        except BlockingIOError:
            return False
        return True

    def received(self) -> list[Order]:
        """Return the orders that have come."""
        content = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.descriptor, 1 << 16):
                content += piece
        return [Order(*json.loads(line)) for line in content.splitlines()]


def _signers_of(settings: Settings) -> Signers | None:
    if not settings.require_signature:
        return None
    from service.artefact.signature import Signers

    return Signers.of(settings.require_signature)
