"""A training that takes a second: a tiny network that learns bright bars, and ways to cut it short."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bright_bars import bars

from models.nets.networks import LipschitzNetwork, dense_network
from models.recipes import Augment, Loss, Schedule
from models.training.batches import ImageBatches
from models.training.loop import Run
from models.training.objective import objective_of

EPOCHS, BATCH = 3, 16
STEPS = 4
"""Steps of an epoch: 70 images in batches of 16, the incomplete one dropped."""
AUGMENT = Augment(rotation_degrees=10, scale=0.1, shear=0.1, shift_pixels=1.5, flip=True, crop_padding=1)
LOSS = Loss(kind="hkr_margin", alpha=5.0, min_margin=0.5, per_pair_bound=True)


class StopHere(Exception):
    """Stands for a killed process."""


def small_network(parametrisation: Any = "cayley") -> LipschitzNetwork:
    torch.manual_seed(1)
    return dense_network((1, 6, 6), (12, 8), 3, parametrisation=parametrisation)


def small_run(folder: Path, *, ema_decay: float | None = None, precision: Any = "32-true") -> Run:
    return Run(
        batches=ImageBatches(bars(), BATCH, seed=0, augmentation=AUGMENT),
        objective=objective_of(LOSS),
        schedule=Schedule(epochs=EPOCHS, batch_size=BATCH, ema_decay=ema_decay, precision=precision),
        checkpoints=folder,
        identity={"recipe": {"epochs": EPOCHS}, "seed": 0},
        device=torch.device("cpu"),
        epsilons=(0.1, 0.5),
    )


def interrupt_after(run: Run, steps: int, how: str) -> Run:
    """Return the same run, ended at a step by an exception or by a signal."""
    taken = 0

    def objective(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        if taken == steps and how == "crash":
            raise StopHere
        taken += 1
        if taken == steps and how == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        return run.objective(network, logits, labels)

    return replace(run, objective=objective)


def signal_caller(number: signal.Signals) -> None:
    """Send a signal to the process that has called this one."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    assert caller.pid is not None
    os.kill(caller.pid, number)


def assert_equal_networks(one: LipschitzNetwork, other: LipschitzNetwork) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name
