"""Health of one process: which faults it has, and whether a restart cures them.

Faults are found by observation and never by waiting for a worker: silence of the workers, a queue that nobody takes
from, a lost device, and, while nothing is in progress, a self-check of the default model every minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from service.inference.batching import Batcher
from service.inference.catalogue import Catalogue
from service.inference.classifier import Classifier
from service.inference.heartbeats import LOAD_S, Beats, Pulse

_log = logging.getLogger(__name__)

LEAST_STUCK_S = 5.0
"""Least default of the time after which a worker is stuck, in seconds."""
# Share of the time after which a worker is stuck.
_NOT_READY = 0.4
_CHECK_EVERY_S = 60.0
# Silence of a worker for which the others wait no longer.
_SLOW_S = 0.5


class Health:
    """Faults of one process. It belongs to the event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        default_model: str,
        batcher: Batcher,
        stuck_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Find no fault yet.

        Args:
            catalogue: served models.
            default_model: name of the model whose self-check runs.
            batcher: whose workers are observed.
            stuck_s: seconds of silence after which a worker is stuck; it has faults after two fifths of them.
            clock: in seconds.
        """
        self.is_stopping = False
        self._catalogue = catalogue
        self._default_model = default_model
        self._batcher = batcher
        self._stuck_s = stuck_s
        self._pulse = Pulse(batcher.beats, clock)
        self._untaken_s = 0.0
        """Seconds for which images have waited beside idle workers."""
        self._check: SelfCheck | None = None
        self._check_due_s = 0.0
        """Seconds until the next self-check."""

    def observe(self) -> None:
        """Observe the workers and the queue, several times a second."""
        elapsed_s = self._pulse.observe()
        is_waiting = self._batcher.is_waiting
        self._untaken_s = self._untaken_s + elapsed_s if is_waiting and not self._batcher.beats else 0.0
        if is_waiting and self._pulse.silent(_SLOW_S):
            self._batcher.wake()
        self._check_due_s -= elapsed_s

    def check(self) -> None:
        """Start the self-check of the default model if it is due and nothing is in progress."""
        default = self._catalogue.models.find(self._default_model)
        if self._check is None or self._check.classifier is not default:
            # Of another version.
            self._check = None if default is None else SelfCheck(default, self._batcher.beats)
            self._check_due_s = 0.0
        if self._check is not None and self._check_due_s <= 0.0 and not self._batcher.beats:
            self._check_due_s = _CHECK_EVERY_S
            self._check.start()

    def faults(self) -> list[str]:
        """Return why the process is not ready, one sentence each; empty if it is."""
        faults, models = self.fatal_faults(), self._catalogue.models
        if self.is_stopping:
            faults.append("the server is stopping")
        if models.find(self._default_model) is None:
            faults.append(f"the default model {self._default_model} is not loaded; see the log of the start")
        if any(classifier.is_lost for classifier in models.values()):
            faults.append("the GPU is lost; the server ends and has to be started again")
        faults += [
            f"the files of model {name} have changed since they were verified; put them back, or send "
            "SIGHUP to serve the new ones"
            for name, classifier in models.items()
            if classifier.files.have_changed
        ]
        slow_s = _NOT_READY * self._stuck_s
        if not faults:
            faults += [f"a worker has been silent for {slow_s:g} s in {doing}" for doing in self._pulse.silent(slow_s)]
        if self._untaken_s > slow_s + self._batcher.max_delay_s:
            faults.append(f"images have waited for {slow_s:g} s and no worker takes them")
        if self._check is not None and self._check.fault is not None:
            faults.append(self._check.fault)
        return faults

    def fatal_faults(self) -> list[str]:
        """Return the faults that a restart of the process cures; observe first."""
        self.observe()
        faults = [
            f"a worker has been stuck for {self._stuck_s:g} s in {doing}" for doing in self._pulse.silent(self._stuck_s)
        ]
        if self._untaken_s > self._stuck_s + self._batcher.max_delay_s:
            faults.append(f"images have waited for {self._stuck_s:g} s and no worker takes them")
        return faults


class SelfCheck:
    """Compares one answer of a model, bit for bit, with the one that was kept."""

    def __init__(self, classifier: Classifier, beats: Beats) -> None:
        """Keep no answer yet.

        Args:
            classifier: model to check.
            beats: receives the step of the check that can get stuck as a worker can.
        """
        self.classifier = classifier
        self._beats = beats
        size = int(np.prod(classifier.input_shape))
        self._image_NCHW = np.linspace(0.0, 1.0, size).reshape(1, *classifier.input_shape)
        self._kept: tuple[object, ...] | None = None
        self._thread: threading.Thread | None = None
        self.fault: str | None = None
        """Why the last check failed."""

    def start(self) -> None:
        """Run the check on a thread: the event loop waits neither for a disk nor for a device."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="self-check", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        before, self.fault = self.fault, self._find_fault()
        if self.fault is not None and self.fault != before:
            _log.error("self-check: %s", self.fault)
        elif self.fault is None and before is not None:
            _log.warning("self-check: passed again")

    def _find_fault(self) -> str | None:
        classifier = self.classifier
        try:
            answer = self._answer()
            self._kept = self._kept or answer
            if answer != self._kept:
                return (
                    f"model {classifier.name} answers the same image with other bits than before; check the "
                    "memory and the processor of this machine, and start the server again"
                )
        except Exception as error:
            return f"model {classifier.name} does not answer: {error}"
        return None

    def _answer(self) -> tuple[object, ...]:
        """Return all that is certified about one image, with the bits of the logits."""
        thread = threading.get_ident()
        self._beats[thread] = time.monotonic(), "the self-check", 0.0 if self.classifier.is_warm else LOAD_S
        try:
            (prediction,) = self.classifier.predict(self._image_NCHW)
        finally:
            self._beats.pop(thread, None)
        return prediction.logits_K.tobytes(), *(value for value in prediction if not isinstance(value, np.ndarray))
