"""Progress of a run: position, running figures, time left, progress bar and curves."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models.training.curves import Curves
from models.training.history import EpochFigures
from models.training.scores import RunningScores, Scores, scores_from

log = logging.getLogger(__name__)

REPORT_EVERY = 10
"""Steps between two updates of the bar's figures, and between two points of the curves."""


class Progress:
    """Position and figures of a run; the first process shows them.

    Args:
        epochs: length of the run.
        steps_per_epoch: number of batches of an epoch.
        running: figures of the current epoch.
        first_process: whether this process logs, and shows the bar and the curves.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, running: RunningScores, *, first_process: bool) -> None:
        self.epoch, self.step = 0, 0
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.running = running
        self.history: list[EpochFigures] = []
        """Figures of the finished epochs; those of an older checkpoint may begin later than with the first."""
        self._first_process = first_process
        self._seconds_before = 0.0
        self._started_at, self._started_from = time.monotonic(), 0
        self._last_point = (0, 0.0)
        self._bar: tqdm[Any] | None = None
        self._curves: Curves | None = None

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def steps_taken(self) -> int:
        """Number of steps since the run began."""
        return self.epoch * self.steps_per_epoch + self.step

    def seconds(self) -> float:
        """Return the wall time of training, summed over resumed parts."""
        return self._seconds_before + time.monotonic() - self._started_at

    def state_dict(self) -> dict[str, Any]:
        """Return the content for a checkpoint."""
        return {
            "epoch": self.epoch,
            "epochs": self.epochs,
            "step": self.step,
            "seconds": self.seconds(),
            "running": self.running.state_dict(),
            "history": [figures.as_json() for figures in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the content of a checkpoint."""
        self.epoch, self.step, self._seconds_before = state["epoch"], state["step"], state["seconds"]
        self.epochs = state.get("epochs", self.epochs)
        if "running" in state:
            self.running.load_state_dict(state["running"])
        self.history = [EpochFigures.from_json(figures) for figures in state.get("history", [])]

    @contextlib.contextmanager
    def shown(self, curves: Path | None) -> Generator[None]:
        """Measure time from here on; show the bar on a terminal, and write curves to a folder if one is given."""
        self._started_at, self._started_from = time.monotonic(), self.steps_taken
        self._last_point = (self.steps_taken, time.monotonic())
        if not self._first_process:
            yield
            return
        if curves is not None and self.steps_taken < self.total_steps:
            self._curves = Curves(curves, self.steps_taken)
        # tqdm itself disables the bar where the output is not a terminal; the log has one line an epoch. Without
        # smoothing the time left follows from the mean over all steps: the end of an epoch takes time beside its steps.
        bar = tqdm(
            total=self.total_steps, initial=self.steps_taken, unit="step", leave=False, disable=None, smoothing=0
        )
        redirected = contextlib.nullcontext() if bar.disable else logging_redirect_tqdm()
        with bar, redirected:
            self._bar = bar
            self._name_epoch()
            try:
                yield
            finally:
                if self._curves is not None:
                    self._curves.close()

    def finish_step(
        self, loss: float, counts: Int[Tensor, " E1"] | None, images: int, rates: Mapping[str, float]
    ) -> None:
        """Count one step, and report every `REPORT_EVERY` steps.

        Args:
            loss: mean over the batch.
            counts: of `count_correct_within`; absent where the network does not classify.
            images: number of images of the batch.
            rates: learning rate of each optimiser by name.
        """
        self.step += 1
        self.running.add(loss, counts, images)
        if self._bar is not None:
            self._bar.update()
        if self.steps_taken % REPORT_EVERY:
            return
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(str(self.running), refresh=False)
        if self._curves is None:
            return
        figures = {"train/loss": loss}
        if counts is not None:
            figures |= scores_from(counts, images, self.running.epsilons).scalars("train")
        figures |= {f"learning_rate/{name}": rate for name, rate in rates.items()}
        (steps, at), now = self._last_point, time.monotonic()
        figures["images_per_second"] = (self.steps_taken - steps) * images / max(now - at, 1e-9)
        self._last_point = (self.steps_taken, now)
        self._curves.add(self.steps_taken, figures)

    def finish_epoch(self, held_out: Scores | None) -> None:
        """Report the epoch and start the next one.

        Args:
            held_out: scores of held-out images; optional.
        """
        figures = {"epoch/loss": self.running.loss}
        training = self.running.scores() if self.running.classifies else None
        if training is not None:
            figures |= training.scalars("epoch")
        self.history.append(EpochFigures(self.epoch + 1, self.running.loss, training, held_out))
        held_out_text = ""
        if held_out is not None:
            figures |= held_out.scalars("held_out")
            held_out_text = f"; held-out images: {held_out}"
        if self._first_process:
            position, running = f"epoch {self.epoch + 1}/{self.epochs}", str(self.running)
            log.info("%s: %s%s; %s left", position, running, held_out_text, format_duration(self._seconds_left()))
        self.epoch, self.step = self.epoch + 1, 0
        self.running.reset()
        self._name_epoch()
        if self._curves is not None:
            self._curves.add(self.steps_taken, figures)
            self._curves.flush()

    def _name_epoch(self) -> None:
        if self._bar is not None:
            self._bar.set_description(f"epoch {min(self.epoch + 1, self.epochs)}/{self.epochs}", refresh=False)

    def _seconds_left(self) -> float:
        per_step = (time.monotonic() - self._started_at) / max(self.steps_taken - self._started_from, 1)
        return per_step * (self.total_steps - self.steps_taken)


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, or hours and minutes, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
