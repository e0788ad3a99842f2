"""The training loop: one-cycle learning rate, checkpoints, exact resume, and a guard against NaN and infinity.

Randomness is a function of (seed, epoch, step): the order of an epoch and the augmentation of a step come
from generators seeded by those numbers. So a run that is interrupted and resumed, even within an epoch, gives
bit for bit the network of an uninterrupted one on the same machine with the same number of threads and processes.

Lightning Fabric places the network, averages gradients over the processes and rounds to bfloat16 where the schedule
asks for it. Each process computes the logits of its share of a batch; the loss is computed in each from the logits of
the whole batch, since the class means of the KR term are no mean over shares. So the number of processes changes a
result by rounding alone.

Axes: N batch, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from models.data.labelled import LabelledImages
from models.nets.layers.linear import newton_schulz, stiefel_matrices
from models.nets.networks import LipschitzNetwork
from models.recipes import Schedule
from models.training.batches import BatchSource
from models.training.checkpoints import differences_between, write_whole
from models.training.curves import Curves
from models.training.errors import CheckpointError, Interrupted, NonFiniteError, TrainingError
from models.training.objective import Objective
from models.training.optimisers import optimisers_of
from models.training.progress import REPORT_EVERY, in_words
from models.training.scores import Scores, counts_within, score
from models.training.signals import watched_stop_signals

log = logging.getLogger(__name__)
# What Fabric is asked for stands in the card; what it does is said here.
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Run:
    """Everything that `fit` needs besides the network."""

    batches: BatchSource
    objective: Objective
    schedule: Schedule
    checkpoints: Path
    """Folder of `last.pt` and `best.pt`."""
    identity: Mapping[str, Any]
    """JSON-like description of recipe and seed; a checkpoint with another one is not resumed."""
    device: torch.device
    epsilons: tuple[float, ...] = ()
    validation: LabelledImages | None = None
    classifies: bool = True
    """Whether the sign or the largest of the logits is a class: with the KR term alone f has no zero level."""
    curves: Path | None = None
    """Folder of the curves for TensorBoard; None for none."""


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    network: LipschitzNetwork
    seconds: float
    """Wall time of training, summed over resumed parts."""


def fabric_for(run: Run, devices: int = 1) -> Fabric:
    """What carries a run: its device, or so many of them with a process for each, and its precision."""
    return Fabric(
        accelerator=run.device.type,
        devices=devices,
        strategy="auto" if devices == 1 else DDPStrategy(start_method="spawn"),
        precision=run.schedule.precision,
        # Otherwise the variables of a batch system would decide how many processes there are.
        plugins=[LightningEnvironment()],
    )


def fit(
    network: LipschitzNetwork,
    run: Run,
    *,
    resume: bool = False,
    fabric: Fabric | None = None,
    stop_requested: Callable[[], bool] | None = None,
) -> Trained:
    """Train the network and return the one to evaluate (averaged weights where the schedule asks for them).

    The last epoch is returned, not the best: the one-cycle schedule ends at its optimum, and choosing the
    best epoch by the figures of a test set would make them too good. `best.pt` is kept for inspection.

    Args:
        network: with its initial weights, the same in all processes.
        run: the same in all processes.
        resume: go on from `last.pt`.
        fabric: for one of several processes, which all call this function; None for one process.
        stop_requested: whether to stop after the step; None for SIGINT and SIGTERM.

    Raises:
        TrainingError: a checkpoint is in the way, is missing, or belongs to another run.
        NonFiniteError: loss or weights are no longer finite; `last.pt` is from before that.
        Interrupted: SIGINT or SIGTERM came; `last.pt` holds the state at the last complete step.
    """
    if fabric is None:
        fabric = fabric_for(run)
        fabric.launch()
    session = _Session(network.to(fabric.device), run, fabric)
    session.refuse_too_full_a_disk()
    if resume:
        session.load()
    else:
        session.refuse_to_overwrite()
    stop_requests = watched_stop_signals() if stop_requested is None else contextlib.nullcontext(stop_requested)
    with stop_requests as stopping, session.reports():
        while session.epoch < run.schedule.epochs:
            while session.step < run.batches.steps_per_epoch:
                session.train_step()
                # All processes stop after the same step.
                if fabric.strategy.reduce_boolean_decision(stopping(), all=False):
                    session.save("last.pt")
                    raise Interrupted(
                        f"stopped in epoch {session.epoch + 1} after step {session.step}; the state is in "
                        f"{run.checkpoints / 'last.pt'}: run the same command with --resume to go on"
                    )
            session.finish_epoch()
    return Trained(session.network_to_evaluate(), session.elapsed())


class _Logits(nn.Module):
    """The network with its head outside of mixed precision: a margin is a small difference of logits."""

    def __init__(self, network: LipschitzNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.body(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.network.head(features.float())


class _Session:
    """The mutable state of a run: network, optimiser, schedule, average, position."""

    def __init__(self, network: LipschitzNetwork, run: Run, fabric: Fabric) -> None:
        self.run = run
        self.network = network
        self.epoch, self.step = 0, 0
        self.best = -math.inf
        self._fabric = fabric
        self._total_steps = run.schedule.epochs * run.batches.steps_per_epoch
        if self._total_steps < 3:
            raise TrainingError(
                f"{self._total_steps} steps are too few for the learning rate to rise and fall: train longer"
            )
        self.average = copy.deepcopy(network) if run.schedule.ema_decay is not None else None
        self.optimisers = optimisers_of(network, run.schedule)
        self.schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                optimiser.defaults["lr"],
                total_steps=self._total_steps,
                # The rise takes two steps at least: with one torch divides by zero.
                pct_start=max(run.schedule.warm_up, 2 / self._total_steps),
                cycle_momentum=isinstance(optimiser, torch.optim.Adam),
            )
            for optimiser in self.optimisers
        ]
        self._model, *self._steppers = fabric.setup(_Logits(network), *self.optimisers)
        self.seconds = 0.0
        self._resumed_at, self._resumed_from = time.monotonic(), 0
        self._seen, self._loss_sum = 0, 0.0
        self._counts = torch.zeros(1 + len(run.epsilons), dtype=torch.int64, device=fabric.device)
        self._bar: tqdm[Any] | None = None
        self._curves: Curves | None = None
        self._last_point = (0, 0.0)

    @property
    def steps_taken(self) -> int:
        """Of the whole run."""
        return self.epoch * self.run.batches.steps_per_epoch + self.step

    @contextlib.contextmanager
    def reports(self) -> Generator[None]:
        """Bar and curves of the whole run, in the first process alone."""
        self._resumed_at, self._resumed_from = time.monotonic(), self.steps_taken
        self._last_point = (self.steps_taken, time.monotonic())
        if not self._fabric.is_global_zero:
            yield
            return
        if self.run.curves is not None and self.steps_taken < self._total_steps:
            self._curves = Curves(self.run.curves, self.steps_taken)
        # disable=None: no bar where the output is not a terminal; the log has one line an epoch. smoothing=0: the time
        # that is left follows from the mean over all steps, since an epoch ends with more than steps.
        bar = tqdm(
            total=self._total_steps, initial=self.steps_taken, unit="step", leave=False, disable=None, smoothing=0
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

    def train_step(self) -> None:
        images, labels = self.run.batches.batch(self.epoch, self.step, self._fabric.device)
        self.network.zero_grad(set_to_none=True)
        logits = self._logits(images)
        loss = self.run.objective(self.network, logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise self._non_finite(f"the loss is {value}")
        self._fabric.backward(loss)
        rates = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        for stepper in self._steppers:
            stepper.step()
        for scheduler in self.schedulers:
            scheduler.step()
        self._update_average()
        self.step += 1
        counts = self._count(value, logits.detach(), labels)
        self._report_step(value, counts, len(labels), rates)

    def _logits(self, images: Tensor) -> Tensor:
        """Of the whole batch; each process computes its share."""
        processes, rank = self._fabric.world_size, self._fabric.global_rank
        if processes == 1:
            return self._model(images)
        share = math.ceil(len(images) / processes)
        # Shares have one size: the last ones repeat the last image, and what is repeated is dropped.
        chosen = torch.arange(rank * share, (rank + 1) * share, device=images.device).clamp(max=len(images) - 1)
        own = self._model(images[chosen])
        # Every process has the whole loss, so its gradient with respect to its own logits is right; averaging over
        # the processes will divide it by their number.
        own.register_hook(lambda gradient: gradient * processes)
        parts = [torch.empty_like(own) for _ in range(processes)]
        torch.distributed.all_gather(parts, own.detach())
        parts[rank] = own
        return torch.cat(parts)[: len(images)]

    def finish_epoch(self) -> None:
        evaluated = self.network_to_evaluate()
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise self._non_finite("a weight is not finite")
        run = self.run
        scores = self._running_scores()
        figures = {"epoch/loss": self._loss_sum / max(self._seen, 1)}
        if run.classifies:
            figures |= scores.scalars("epoch")
        held_out = ""
        if run.validation is not None:
            scores = score(evaluated, run.validation, run.epsilons, fabric=self._fabric)
            figures |= scores.scalars("held_out")
            held_out = f"; held-out images: {scores}"
        if self._fabric.is_global_zero:
            position, running = f"epoch {self.epoch + 1}/{run.schedule.epochs}", self._running_text()
            log.info("%s: %s%s; %s", position, running, held_out, self._time_left())
        merit = scores.certified[run.epsilons[-1]] if run.epsilons else -self._loss_sum
        self.epoch, self.step = self.epoch + 1, 0
        self._seen, self._loss_sum = 0, 0.0
        self._counts.zero_()
        self._name_epoch()
        if self._curves is not None:
            self._curves.add(self.steps_taken, figures)
            self._curves.flush()
        is_best = merit > self.best
        self.best = max(self.best, merit)
        try:
            self.save("last.pt")
            if is_best:
                self.save("best.pt")
        except CheckpointError as error:
            # What is trained is in memory: going on loses nothing, and the next epoch tries again.
            log.error("%s; training goes on without it", error)

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.monotonic() - self._resumed_at

    def network_to_evaluate(self) -> LipschitzNetwork:
        if self.average is None:
            return self.network
        evaluated = copy.deepcopy(self.average)
        # An average of orthogonal matrices is a contraction; its polar factor is the nearest orthogonal one.
        with torch.no_grad():
            for matrix in stiefel_matrices(evaluated):
                matrix.raw.copy_(newton_schulz(matrix.raw, 8))
        return evaluated

    def save(self, name: str) -> None:
        """Write a checkpoint whole or not at all: to a temporary file, then renamed. The first process alone writes.

        Raises:
            CheckpointError: see there; the older checkpoint is as it was.
        """
        if not self._fabric.is_global_zero:
            return None
        state = {
            "identity": json.dumps(self.run.identity, sort_keys=True),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "seconds": self.elapsed(),
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "random_state": torch.get_rng_state(),
            "running": {"seen": self._seen, "loss_sum": self._loss_sum, "counts": self._counts.cpu()},
        }
        path = self.run.checkpoints / name
        temporary = path.with_suffix(".tmp")
        try:
            write_whole(state, temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer wraps what the file raises
            best = self.run.checkpoints / "best.pt"
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if full and name == "last.pt" and best.exists():
                log.warning("%s cannot be written (%s): best.pt is deleted to make room for it", path, error)
                best.unlink()
                return self.save(name)
            last = self.run.checkpoints / "last.pt"
            kept = f"{last} is the one before" if last.exists() else "none was written before"
            raise CheckpointError(
                f"the checkpoint {path} cannot be written ({error}), {kept}; make room or mend the folder"
            ) from error
        return None

    def load(self) -> None:
        path = self.run.checkpoints / "last.pt"
        if not path.is_file():
            raise TrainingError(f"nothing to resume: {path} does not exist; run without --resume to start")
        try:
            state = torch.load(path, map_location=self._fabric.device, weights_only=True)
        except Exception as error:  # torch raises pickle, zip and runtime errors for damaged files
            raise TrainingError(f"{path} cannot be read ({error}): delete it and start again") from error
        differences = differences_between(json.loads(state["identity"]), json.loads(json.dumps(self.run.identity)))
        if differences:
            raise TrainingError(
                f"{path} belongs to another run ({'; '.join(differences)}): "
                "repeat the settings of that run, or choose another --out"
            )
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        torch.set_rng_state(state["random_state"].cpu())
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.seconds = state["seconds"]
        if "running" in state:
            self._seen, self._loss_sum = state["running"]["seen"], state["running"]["loss_sum"]
            self._counts.copy_(state["running"]["counts"])
        if self._fabric.is_global_zero:
            log.info("resumed at epoch %d, step %d", self.epoch + 1, self.step)

    def refuse_too_full_a_disk(self) -> None:
        folder = self.run.checkpoints
        folder = next(place for place in (folder, *folder.parents) if place.exists())
        # Weights, their average and at most two moments; last, best and the one that is being written.
        needed = 3 * 4 * sum(parameter.nbytes for parameter in self.network.parameters())
        needed -= sum(file.stat().st_size for file in self.run.checkpoints.glob("*.pt"))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {folder} has {free / 1e6:.0f} MB left, checkpoints need {needed / 1e6:.0f} MB: make "
                "room, or name another folder with --out"
            )

    def refuse_to_overwrite(self) -> None:
        path = self.run.checkpoints / "last.pt"
        if path.exists():
            raise TrainingError(
                f"{path} holds an earlier run: add --resume to go on with it, choose another --out, or delete it"
            )

    def _update_average(self) -> None:
        decay = self.run.schedule.ema_decay
        if self.average is None or decay is None:
            return
        with torch.no_grad():
            for mean, current in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(current, 1 - decay)

    def _count(self, loss: float, logits: Tensor, labels: Tensor) -> Tensor | None:
        self._seen += len(labels)
        self._loss_sum += loss * len(labels)
        if not self.run.classifies:
            return None
        with torch.no_grad():
            counts = counts_within(logits, labels, self.network.declared_margin_bounds_KK(), self.run.epsilons)
        self._counts += counts
        return counts

    def _report_step(self, loss: float, counts: Tensor | None, images: int, rates: Sequence[float]) -> None:
        if self._bar is not None:
            self._bar.update()
        if self.steps_taken % REPORT_EVERY:
            return
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix_str(self._running_text(), refresh=False)
        if self._curves is None:
            return
        figures = {"train/loss": loss}
        if counts is not None:
            figures |= self._scores(counts, images).scalars("train")
        for optimiser, rate in zip(self.optimisers, rates, strict=True):
            figures[f"learning_rate/{type(optimiser).__name__}"] = rate
        (steps, at), now = self._last_point, time.monotonic()
        figures["images_per_second"] = (self.steps_taken - steps) * images / max(now - at, 1e-9)
        self._last_point = (self.steps_taken, now)
        self._curves.add(self.steps_taken, figures)

    def _name_epoch(self) -> None:
        if self._bar is not None:
            epochs = self.run.schedule.epochs
            self._bar.set_description(f"epoch {min(self.epoch + 1, epochs)}/{epochs}", refresh=False)

    def _time_left(self) -> str:
        per_step = (time.monotonic() - self._resumed_at) / max(self.steps_taken - self._resumed_from, 1)
        return f"{in_words(per_step * (self._total_steps - self.steps_taken))} left"

    def _running_scores(self) -> Scores:
        return self._scores(self._counts, self._seen)

    def _scores(self, counts: Tensor, images: int) -> Scores:
        accuracy, *certified = (counts.cpu() / max(images, 1)).tolist()
        return Scores(accuracy, dict(zip(self.run.epsilons, certified, strict=True)))

    def _running_text(self) -> str:
        loss = f"loss {self._loss_sum / max(self._seen, 1):.4f}"
        return f"{loss}, {self._running_scores()}" if self.run.classifies else loss

    def _non_finite(self, what: str) -> NonFiniteError:
        last = self.run.checkpoints / "last.pt"
        kept = f"{last} is from before that" if last.exists() else "no checkpoint was written yet"
        return NonFiniteError(
            f"{what} in epoch {self.epoch + 1}, step {self.step + 1}; {kept}. "
            "Lower schedule.learning_rate or check the data"
        )
