"""The training loop: one-cycle learning rate, checkpoints, exact resume, and a guard against NaN and infinity.

Randomness is a function of (seed, epoch, step): the order of an epoch and the augmentation of a step come
from generators seeded by those numbers. So a run that is interrupted and resumed, even within an epoch, gives
bit for bit the network of an uninterrupted one on the same machine with the same number of threads.

Axes: N batch, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from models import losses
from models.augmentation import augment
from models.data import LabelledImages
from models.layers import newton_schulz, stiefel_matrices
from models.networks import LipschitzNetwork, both_logits
from models.optimisers import optimisers_of
from models.recipes import Augment, Loss, Schedule

log = logging.getLogger(__name__)

Batch = tuple[Float[Tensor, "N C H W"], Int[Tensor, " N"]]
Objective = Callable[[LipschitzNetwork, Tensor, Tensor], Tensor]
"""`(network, logits_NK, labels_N) -> loss`, of a whole batch."""


class TrainingError(Exception):
    """Training cannot start or go on; the message says what to do."""


class CheckpointError(TrainingError):
    """The disk is full, or the folder of the checkpoints cannot be written to."""


class NonFiniteError(TrainingError):
    """The loss or a weight became NaN or infinite."""


class Interrupted(Exception):
    """Training was stopped by the user; its state is in the checkpoint named in the message."""


class BatchSource(Protocol):
    """Where batches come from: a pure function of epoch and step."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        ...

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of a step; equal arguments give equal batches."""
        ...


def generator_for(seed: int, *stream: int) -> torch.Generator:
    """An independent generator for each `(seed, *stream)`, by mixing the numbers as SplitMix64 does."""
    state = 0
    for number in (seed, *stream):
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state)


class ImageBatches:
    """Shuffled, augmented batches of a data set; an incomplete last batch is dropped.

    Args:
        data: the images.
        batch_size: images in a batch.
        seed: of order and augmentation.
        augmentation: None for the images as they are.
        class_weights: how often an image of each class counts, in the mean over an epoch; None for once each. Counted
            are appearances, not factors of the loss: in the mean that is the same for every loss that is a mean over
            images, it also balances the class means of the KR term, and no single image makes a huge step.
    """

    def __init__(
        self,
        data: LabelledImages,
        batch_size: int,
        seed: int,
        augmentation: Augment | None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        if len(data) < batch_size:
            raise TrainingError(f"{len(data)} images do not fill one batch of {batch_size}: lower schedule.batch_size")
        self._data = data
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation
        self._class_weights = class_weights
        self._order: tuple[int, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches."""
        return len(self._data) // self._batch_size

    def batch(self, epoch: int, step: int) -> Batch:
        """Images as float32 in [0, 1], and their labels."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._new_order(generator_for(self._seed, 0, epoch)))
        chosen = self._order[1][step * self._batch_size : (step + 1) * self._batch_size]
        part = self._data.at(chosen)
        images = part.pixels()
        if self._augmentation is not None:
            images = augment(images, self._augmentation, generator_for(self._seed, 1, epoch, step))
        return images, part.labels_N

    def _new_order(self, generator: torch.Generator) -> Tensor:
        n = len(self._data)
        if self._class_weights is None:
            return torch.randperm(n, generator=generator)
        drawn: list[Tensor] = []
        for label, weight in enumerate(self._class_weights):
            members = (self._data.labels_N == label).nonzero()[:, 0]
            whole, rest = divmod(round(weight * len(members)), len(members))
            some = members[torch.randperm(len(members), generator=generator)[:rest]]
            drawn += [members.repeat(whole), some]
        order = torch.cat(drawn)
        # The rounding of each class may have left a few too many or too few.
        order = order[torch.randperm(len(order), generator=generator)]
        return torch.cat([order, order])[:n]


@dataclass(frozen=True)
class SampledBatches:
    """Batches drawn from a distribution."""

    sample: Callable[[int, torch.Generator], Batch]
    """`(size, generator) -> batch`."""
    batch_size: int
    steps_per_epoch: int
    seed: int

    def batch(self, epoch: int, step: int) -> Batch:
        """A fresh sample for each step."""
        return self.sample(self.batch_size, generator_for(self.seed, 2, epoch, step))


def objective_of(loss: Loss) -> Objective:
    """The function of `models.losses` that a recipe asks for, closed over its parameters."""

    def objective(network: LipschitzNetwork, logits: Tensor, labels: Tensor) -> Tensor:
        match loss.kind:
            case "kr":
                return losses.kr_loss(logits, labels)
            case "hkr":
                return losses.hkr_loss(logits, labels, alpha=loss.alpha, min_margin=loss.min_margin)
            case "hkr_margin":
                return losses.hkr_margin_loss(
                    both_logits(logits),
                    labels,
                    alpha=loss.alpha,
                    min_margin=loss.min_margin,
                    margin_bounds_KK=network.declared_margin_bounds_KK() if loss.per_pair_bound else None,
                    accuracy_alpha=loss.accuracy_alpha,
                    accuracy_margin=loss.accuracy_margin,
                )
            case "soft_hkr" | "lse_hkr":
                smooth = losses.soft_hkr_loss if loss.kind == "soft_hkr" else losses.lse_hkr_loss
                return smooth(
                    both_logits(logits),
                    labels,
                    alpha=loss.alpha,
                    min_margin=loss.min_margin,
                    temperature=loss.temperature,
                )
            case "margin_cross_entropy":
                return losses.margin_cross_entropy_loss(
                    both_logits(logits), labels, min_margin=loss.min_margin, temperature=loss.temperature
                )

    return objective


@dataclass(frozen=True)
class Scores:
    """Accuracy and, for each epsilon, the share of images that are right with a radius above it."""

    accuracy: float
    certified: Mapping[float, float]

    def __str__(self) -> str:
        certified = ", ".join(f"{value:.2%} at {epsilon:g}" for epsilon, value in self.certified.items())
        return f"accuracy {self.accuracy:.2%}, certified {certified}" if certified else f"accuracy {self.accuracy:.2%}"


def correct_within(
    logits_NK: Float[Tensor, "N K"],
    labels_N: Int[Tensor, " N"],
    margin_bounds_KK: Float[Tensor, "K K"],
    epsilon: float,
) -> Bool[Tensor, " N"]:
    """Right with every margin above `epsilon K_ij`: certified in real arithmetic with the declared constants.

    A figure for the progress bar; the card's figures come from the proved bounds of the exported graph.
    """
    both_NK = both_logits(logits_NK)
    margin_NK = both_NK.gather(1, labels_N[:, None]) - both_NK - epsilon * margin_bounds_KK[labels_N]
    return margin_NK.scatter(1, labels_N[:, None], torch.inf).amin(1) > 0


def score(network: LipschitzNetwork, data: LabelledImages, epsilons: Sequence[float], batch_size: int = 4096) -> Scores:
    """Accuracy and certified accuracy (declared constants) over a data set."""
    device = next(network.parameters()).device
    counts = torch.zeros(1 + len(epsilons), dtype=torch.int64)
    with torch.no_grad():
        bounds = network.declared_margin_bounds_KK()
        for start in range(0, len(data), batch_size):
            part = data.at(slice(start, start + batch_size))
            logits, labels = network(part.pixels().to(device)), part.labels_N.to(device)
            counts += torch.stack([correct_within(logits, labels, bounds, e).sum() for e in (0.0, *epsilons)]).cpu()
    accuracy, *certified = (counts / len(data)).tolist()
    return Scores(accuracy, dict(zip(epsilons, certified, strict=True)))


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


@dataclass(frozen=True)
class Trained:
    """The result of a run."""

    network: LipschitzNetwork
    seconds: float
    """Wall time of training, summed over resumed parts."""


def fit(network: LipschitzNetwork, run: Run, *, resume: bool = False) -> Trained:
    """Train the network and return the one to evaluate (averaged weights where the schedule asks for them).

    The last epoch is returned, not the best: the one-cycle schedule ends at its optimum, and choosing the
    best epoch by the figures of a test set would make them too good. `best.pt` is kept for inspection.

    Raises:
        TrainingError: a checkpoint is in the way, is missing, or belongs to another run.
        NonFiniteError: loss or weights are no longer finite; `last.pt` is from before that.
        Interrupted: SIGINT or SIGTERM came; `last.pt` holds the state at the last complete step.
    """
    session = _Session(network.to(run.device), run)
    session.refuse_too_full_a_disk()
    if resume:
        session.load()
    else:
        session.refuse_to_overwrite()
    total_epochs = run.schedule.epochs
    with _stop_requests() as stop_requested:
        while session.epoch < total_epochs:
            with session.progress_bar() as bar:
                while session.step < run.batches.steps_per_epoch:
                    session.train_step(bar)
                    if stop_requested():
                        session.save("last.pt")
                        raise Interrupted(
                            f"stopped in epoch {session.epoch + 1} after step {session.step}; the state is in "
                            f"{run.checkpoints / 'last.pt'}: run the same command with --resume to go on"
                        )
            session.finish_epoch()
    return Trained(session.network_to_evaluate(), session.elapsed())


class _Session:
    """The mutable state of a run: network, optimiser, schedule, average, position."""

    def __init__(self, network: LipschitzNetwork, run: Run) -> None:
        self.run = run
        self.network = network
        self.epoch, self.step = 0, 0
        self.best = -math.inf
        total_steps = run.schedule.epochs * run.batches.steps_per_epoch
        if total_steps < 3:
            raise TrainingError(f"{total_steps} steps are too few for the learning rate to rise and fall: train longer")
        self.optimisers = optimisers_of(network, run.schedule)
        self.schedulers = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser,
                optimiser.defaults["lr"],
                total_steps=total_steps,
                # The rise takes two steps at least: with one torch divides by zero.
                pct_start=max(run.schedule.warm_up, 2 / total_steps),
                cycle_momentum=isinstance(optimiser, torch.optim.Adam),
            )
            for optimiser in self.optimisers
        ]
        self.average = copy.deepcopy(network) if run.schedule.ema_decay is not None else None
        self.seconds = 0.0
        self._resumed_at = time.monotonic()
        self._seen, self._loss_sum = 0, 0.0
        self._counts = torch.zeros(1 + len(run.epsilons), dtype=torch.int64)

    def progress_bar(self) -> tqdm[Any]:
        total = self.run.batches.steps_per_epoch
        self._seen, self._loss_sum = 0, 0.0
        self._counts.zero_()
        description = f"epoch {self.epoch + 1}/{self.run.schedule.epochs}"
        # disable=None: no bar where the output is not a terminal; the log has one line an epoch.
        return tqdm(total=total, initial=self.step, desc=description, unit="step", leave=False, disable=None)

    def train_step(self, bar: tqdm[Any]) -> None:
        images, labels = self.run.batches.batch(self.epoch, self.step)
        images, labels = images.to(self.run.device), labels.to(self.run.device)
        self.network.zero_grad(set_to_none=True)
        logits = self._forward(images)
        loss = self.run.objective(self.network, logits, labels)
        if not bool(torch.isfinite(loss)):
            raise self._non_finite(f"the loss is {loss.item()}")
        torch.autograd.backward(loss)
        for optimiser in self.optimisers:
            optimiser.step()
        for scheduler in self.schedulers:
            scheduler.step()
        self._update_average()
        self.step += 1
        self._count(loss.detach(), logits.detach(), labels)
        bar.update()
        if self.step % 10 == 0:
            bar.set_postfix_str(self._running_text(), refresh=False)

    def _forward(self, images: Tensor) -> Tensor:
        """Logits in float32: a margin is a difference of logits, too small for bfloat16."""
        mixed = self.run.schedule.precision == "bf16-mixed"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=mixed):
            features = self.network.body(images)
        return self.network.head(features.float())

    def finish_epoch(self) -> None:
        evaluated = self.network_to_evaluate()
        if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
            raise self._non_finite("a weight is not finite")
        run = self.run
        log.info("epoch %d/%d: %s", self.epoch + 1, run.schedule.epochs, self._running_text())
        scores = self._running_scores()
        if run.validation is not None:
            scores = score(evaluated, run.validation, run.epsilons)
            log.info("held-out images: %s", scores)
        self.epoch, self.step = self.epoch + 1, 0
        merit = scores.certified[run.epsilons[-1]] if run.epsilons else -self._loss_sum
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
        """Write a checkpoint whole or not at all: to a temporary file, then renamed.

        Raises:
            CheckpointError: see there; the older checkpoint is as it was.
        """
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
        }
        path = self.run.checkpoints / name
        temporary = path.with_suffix(".tmp")
        try:
            _write_whole(state, temporary, path)
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

    def load(self) -> None:
        path = self.run.checkpoints / "last.pt"
        if not path.is_file():
            raise TrainingError(f"nothing to resume: {path} does not exist; run without --resume to start")
        try:
            state = torch.load(path, map_location=self.run.device, weights_only=True)
        except Exception as error:  # torch raises pickle, zip and runtime errors for damaged files
            raise TrainingError(f"{path} cannot be read ({error}): delete it and start again") from error
        differences = _differences(json.loads(state["identity"]), json.loads(json.dumps(self.run.identity)))
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

    def _count(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self._seen += len(labels)
        self._loss_sum += loss.item() * len(labels)
        if not self.run.classifies:
            return
        with torch.no_grad():
            bounds = self.network.declared_margin_bounds_KK()
            within = [correct_within(logits, labels, bounds, e).sum() for e in (0.0, *self.run.epsilons)]
        self._counts += torch.stack(within).cpu()

    def _running_scores(self) -> Scores:
        accuracy, *certified = (self._counts / max(self._seen, 1)).tolist()
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


def _write_whole(state: Mapping[str, Any], temporary: Path, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted({*saved, *wanted}):
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return found


@contextlib.contextmanager
def _stop_requests() -> Generator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag, so that no step is cut in half; a second acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def remember(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell lets its background jobs ignore Ctrl-C, which is meant for the one in the foreground.
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread: signals are somebody else's
        previous.clear()
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
