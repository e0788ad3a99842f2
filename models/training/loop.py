"""The training loop: one-cycle learning rate, exact resume, and a guard against NaN and infinity.

Randomness is a function of (seed, epoch, step): the order of an epoch and the augmentation of a step come
from generators seeded by those numbers. So a run that is interrupted and resumed, even within an epoch, gives
bit for bit the network of an uninterrupted one on the same machine with the same number of threads and processes.

Lightning Fabric places the network, averages gradients over the processes and rounds to bfloat16 where the schedule
asks for it. Each process computes the logits of its share of a batch; the loss is computed in each from those of
the whole batch, since the class means of the KR term are not a mean over shares. So the number of processes changes a
result by rounding alone. The same holds on several nodes: only the first process reads and writes checkpoints, and the
others get from it what they need.

Axes: N batch, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.data.labelled import LabelledImages
from models.memory import keep_freed_memory
from models.nets.layers.linear import newton_schulz, stiefel_matrices
from models.nets.networks import LipschitzNetwork
from models.recipes import Schedule
from models.training.batches import BatchSource
from models.training.checkpoints import Checkpoints
from models.training.choice import BestEpoch
from models.training.errors import CheckpointError, Interrupted, NonFiniteError, TrainingError
from models.training.history import EpochFigures
from models.training.negatives import NegativeImages
from models.training.nodes import ALONE, Nodes
from models.training.objective import Objective
from models.training.optimisers import optimisers_of
from models.training.outputs import Outputs, logits_at_images
from models.training.progress import Progress
from models.training.scores import RunningScores, count_correct_within, score
from models.training.signals import deferred_stop_signals

log = logging.getLogger(__name__)
T = TypeVar("T")
# Fabric logs the settings it was given, which the card states.
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
    reference_radius: float | None = None
    """Radius at which the objective wants margins at reference images, too; default: at the images alone."""
    epsilons: tuple[float, ...] = ()
    """Radii of the certified accuracy in the log and the curves (L2, pixels in [0, 1]); the last decides `best.pt`."""
    validation: LabelledImages | None = None
    classifies: bool = True
    """Whether the sign or the largest of the logits is a class: with the KR term alone f has no zero level."""
    negatives: NegativeImages | None = None
    """Images that each step adds to its batch, as the class 1; default: the images of the batch alone."""
    curves: Path | None = None
    """Folder of the curves for TensorBoard; default: no curves."""
    version: str = ""
    """Of the code; nodes with another one are refused."""


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    network: LipschitzNetwork
    seconds: float
    """Wall time of training, summed over resumed parts."""
    history: tuple[EpochFigures, ...] = ()
    """Figures of each epoch, those of resumed parts too."""


def fabric_for(run: Run, devices: int = 1, nodes: Nodes = ALONE) -> Fabric:
    """Return the Fabric of a run: its device and precision, and its processes.

    Args:
        run: the run.
        devices: number of processes on each node.
        nodes: that train together.
    """
    alone = devices == nodes.count == 1
    timeout = timedelta(seconds=nodes.timeout_s)
    return Fabric(
        accelerator=run.device.type,
        devices=devices,
        num_nodes=nodes.count,
        strategy="auto" if alone else DDPStrategy(start_method="forkserver", timeout=timeout),
        precision=run.schedule.precision,
        # Otherwise the variables of a batch system would decide the number of processes.
        plugins=[_Place(nodes)],
    )


class _Place(LightningEnvironment):
    def __init__(self, nodes: Nodes) -> None:
        super().__init__()
        self._nodes = nodes

    @property
    def main_address(self) -> str:
        return self._nodes.address

    @property
    def main_port(self) -> int:
        return self._nodes.port or super().main_port

    def node_rank(self) -> int:
        return self._nodes.rank


def fit(
    network: LipschitzNetwork,
    run: Run,
    *,
    resume: bool = False,
    fabric: Fabric | None = None,
    stop_requested: Callable[[], bool] | None = None,
) -> Trained:
    """Train the network and return the one to evaluate (averaged weights where the schedule asks for them).

    The last epoch is returned, since the one-cycle schedule ends at its optimum, or with `schedule.keep=best` the one
    that certifies most of the held-out images.

    Args:
        network: with its initial weights, the same in all processes.
        run: the same in all processes.
        resume: continue from `last.pt`.
        fabric: of several processes, which all call this function; default: one process.
        stop_requested: whether to stop after the step; default: SIGINT or SIGTERM came.

    Raises:
        TrainingError: a checkpoint is in the way, is missing, or belongs to another run.
        NonFiniteError: loss or weights are no longer finite; `last.pt` is from before that.
        Interrupted: a stop was requested; `last.pt` holds the state at the last complete step.
    """
    if fabric is None:
        fabric = fabric_for(run)
        fabric.launch()
    session = _Session(network.to(fabric.device), run, fabric)
    session.start(resume=resume)
    keep_freed_memory()
    progress = session.progress
    stop_requests = deferred_stop_signals() if stop_requested is None else contextlib.nullcontext(stop_requested)
    with stop_requests as stopping, progress.shown(run.curves):
        while progress.epoch < progress.epochs:
            while progress.step < progress.steps_per_epoch:
                session.train_step()
                # All processes stop after the same step.
                if fabric.strategy.reduce_boolean_decision(stopping(), all=False):
                    session.interrupt()
            session.finish_epoch()
    return Trained(session.kept_network(), progress.seconds(), tuple(progress.history))


class _Session:
    """The mutable state of a run: network, optimisers, learning rates, averaged weights."""

    def __init__(self, network: LipschitzNetwork, run: Run, fabric: Fabric) -> None:
        self._network, self._run, self._fabric = network, run, fabric
        self._checkpoints = Checkpoints(run.checkpoints, run.identity)
        running = RunningScores(run.epsilons, fabric.device, classifies=run.classifies)
        self.progress = Progress(
            run.schedule.epochs, run.batches.steps_per_epoch, running, first_process=fabric.is_global_zero
        )
        total_steps = self.progress.total_steps
        if total_steps < 3:
            raise TrainingError(f"{total_steps} steps are too few for the learning rate to rise and fall: train longer")
        keeps_best = run.schedule.keep == "best" and run.validation is not None
        # While the learning rate is near its peak, figures say little.
        self._best = BestEpoch(run.epsilons, run.schedule.epochs // 3 if keeps_best else None)
        self._keeps_best = keeps_best
        self._average: AveragedModel | None = None
        if run.schedule.ema_decay is not None:
            self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(run.schedule.ema_decay))
            # The first update copies: the average starts at the initial weights.
            self._average.update_parameters(network)
        self._optimisers = optimisers_of(network, run.schedule)
        self._schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                optimiser.defaults["lr"],
                total_steps=total_steps,
                # The rise takes two steps at least: with one torch divides by zero.
                pct_start=max(run.schedule.warm_up, 2 / total_steps),
                cycle_momentum=isinstance(optimiser, torch.optim.Adam),
            )
            for optimiser in self._optimisers
        ]
        self._model, *self._steppers = fabric.setup(Outputs(network, run.reference_radius), *self._optimisers)

    def start(self, *, resume: bool) -> None:
        """Begin, or continue from `last.pt`."""

        def earlier() -> dict[str, Any] | None:
            self._checkpoints.refuse_too_full_a_disk(self._network)
            if resume:
                return self._checkpoints.load(torch.device("cpu"))
            self._checkpoints.refuse_earlier_run()
            return None

        state = _by_first(self._fabric, earlier)
        if state is None:
            return
        self._load_state_dict(state)
        if self._fabric.is_global_zero:
            log.info("resumed at epoch %d, step %d", self.progress.epoch + 1, self.progress.step)

    def train_step(self) -> None:
        epoch, step = self.progress.epoch, self.progress.step
        images, labels = self._run.batches.batch(epoch, step, self._fabric.device)
        if self._run.negatives is not None:
            images, labels = self._run.negatives.joined(self._network, images, epoch, step)
        self._network.zero_grad(set_to_none=True)
        outputs = self._outputs(images, labels)
        loss = self._run.objective(self._network, outputs, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise self._non_finite(f"the loss is {value}")
        self._fabric.backward(loss)
        rates = {type(optimiser).__name__: optimiser.param_groups[0]["lr"] for optimiser in self._optimisers}
        for stepper in self._steppers:
            stepper.step()
        for scheduler in self._schedulers:
            scheduler.step()
        if self._average is not None:
            self._average.update_parameters(self._network)
        logits = logits_at_images(outputs.detach(), self._run.reference_radius)
        self.progress.finish_step(value, self._count(logits, labels), len(labels), rates)

    def finish_epoch(self) -> None:
        """Score the epoch and write its checkpoints; a full disk does not end the training.

        Raises:
            NonFiniteError: a weight is not finite; no checkpoint is written.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self._network.parameters()):
            raise self._non_finite("a weight is not finite")
        if self._fabric.world_size > 1:
            # Processors of other kinds round otherwise: all go on with the weights and the loss of the first.
            for parameter in self._network.parameters():
                torch.distributed.broadcast(parameter.data, src=0)
        loss = self._fabric.broadcast(self.progress.running.loss)
        run, held_out = self._run, None
        if run.validation is not None:
            held_out = score(self.network_to_evaluate(), run.validation, run.epsilons, fabric=self._fabric)
        scores = self.progress.running.scores() if held_out is None else held_out
        is_best = self._best.is_best(self.progress.epoch, scores, loss)
        self.progress.finish_epoch(held_out)
        if self._keeps_best and run.schedule.patience is not None:
            self._skip_if_stale(run.schedule.patience)
        try:
            self._save(self._checkpoints.last)
            if is_best:
                self._save(self._checkpoints.best)
        except CheckpointError as error:
            # The weights are in memory: continuing loses nothing, and the next epoch tries again.
            log.error("%s; training goes on without it", error)

    def interrupt(self) -> NoReturn:
        """Write `last.pt` and stop.

        Raises:
            Interrupted: always, once the checkpoint is written.
        """
        _by_first(self._fabric, lambda: self._save(self._checkpoints.last))
        where = self._checkpoints.last if self._fabric.node_rank == 0 else f"{self._checkpoints.last.name} of node 0"
        raise Interrupted(
            f"stopped in epoch {self.progress.epoch + 1} after step {self.progress.step}; the state is in {where}: "
            "run the same command with --resume to continue"
        )

    def _skip_if_stale(self, patience: int) -> None:
        """Skip half of the epochs that are left where the last `patience` ones brought nothing: the rates fall on."""
        left = self.progress.epochs - self.progress.epoch
        if left < 2 or not self._best.due(self.progress.epoch - 1, patience):
            return
        skipped = left // 2
        log.info("no better epoch among the last %d: half of those that are left (%d) are skipped", patience, skipped)
        self.progress.epochs -= skipped
        for scheduler in self._schedulers:
            for _ in range(skipped * self.progress.steps_per_epoch):
                scheduler.step()

    def kept_network(self) -> LipschitzNetwork:
        """Return the network of the best epoch where the schedule keeps it, else that of the last one."""
        best = self._checkpoints.best

        def saved() -> dict[str, Any] | None:
            return self._checkpoints.load(torch.device("cpu"), best) if best.exists() else None

        state = _by_first(self._fabric, saved) if self._keeps_best else None
        if state is not None:
            self._network.load_state_dict(state["network"])
            if self._average is not None:
                self._average.module.load_state_dict(state["average"])
        return self.network_to_evaluate()

    def network_to_evaluate(self) -> LipschitzNetwork:
        """Return the network, or its averaged weights pulled back to orthogonal matrices."""
        if self._average is None:
            return self._network
        evaluated = cast(LipschitzNetwork, copy.deepcopy(self._average.module))
        # An average of orthogonal matrices is a contraction; its polar factor is the nearest orthogonal one.
        with torch.no_grad():
            for matrix in stiefel_matrices(evaluated):
                matrix.raw.copy_(newton_schulz(matrix.raw, 8))
        return evaluated

    def _outputs(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the outputs of the whole batch; each process computes its share."""
        processes, rank = self._fabric.world_size, self._fabric.global_rank
        if processes == 1:
            return self._model(images, labels)
        share = math.ceil(len(images) / processes)
        # Shares have one size: the last ones repeat the last image, and the repetitions are dropped.
        chosen = torch.arange(rank * share, (rank + 1) * share, device=images.device).clamp(max=len(images) - 1)
        own = self._model(images[chosen], labels[chosen])
        # Every process has the whole loss, so its gradient with respect to its own outputs is right; averaging over
        # the processes will divide it by their number.
        own.register_hook(lambda gradient: gradient * processes)
        parts = [torch.empty_like(own) for _ in range(processes)]
        torch.distributed.all_gather(parts, own.detach())
        parts[rank] = own
        return torch.cat(parts)[: len(images)]

    def _count(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        if not self._run.classifies:
            return None
        with torch.no_grad():
            return count_correct_within(logits, labels, self._network.declared_margin_bounds_KK(), self._run.epsilons)

    def _save(self, path: Path) -> None:
        """Write a checkpoint, in the first process alone."""
        if self._fabric.is_global_zero:
            self._checkpoints.save(path, self._state_dict())

    def _state_dict(self) -> dict[str, Any]:
        return {
            **self.progress.state_dict(),
            "best": self._best.state_dict(),
            "network": self._network.state_dict(),
            "average": self._average.module.state_dict() if self._average is not None else None,
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
            "random_state": torch.get_rng_state(),
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.progress.load_state_dict(state)
        self._best.load_state_dict(state["best"])
        self._network.load_state_dict(state["network"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])
        for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        torch.set_rng_state(state["random_state"].cpu())

    def _non_finite(self, fault: str) -> NonFiniteError:
        last = self._checkpoints.last
        saved = f"{last} is from before that" if last.exists() else "no checkpoint was written yet"
        return NonFiniteError(
            f"{fault} in epoch {self.progress.epoch + 1}, step {self.progress.step + 1}; {saved}. "
            "Lower schedule.learning_rate or check the data"
        )


def _by_first(fabric: Fabric, action: Callable[[], T]) -> T:
    """Return in all processes the result of an action that the first one takes.

    Raises:
        TrainingError: of the action, in all processes.
    """
    outcome: T | TrainingError | None = None
    if fabric.is_global_zero:
        try:
            outcome = action()
        except TrainingError as error:
            outcome = error
    outcome = fabric.broadcast(outcome)
    if isinstance(outcome, TrainingError):
        raise outcome
    return cast(T, outcome)
