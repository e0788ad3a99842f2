"""Several processes train the network that one would have trained, and stop, fail and resume as one."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bright_bars import bars
from small_runs import signal_caller

from models.nets.networks import LipschitzNetwork, dense_network
from models.recipes import Augment, Schedule
from models.training import losses
from models.training.batches import ImageBatches
from models.training.errors import Interrupted, TrainingError
from models.training.loop import Run, fit
from models.training.processes import fit_on

BATCH = 15
"""Odd, so that two processes have unequal shares."""
STEPS = 4
"""Steps of an epoch of 70 images."""


def bar_network() -> LipschitzNetwork:
    torch.manual_seed(1)
    return dense_network((1, 6, 6), (12, 8), 3, parametrisation="stiefel")


def bar_run(folder: Path, objective: Any) -> Run:
    return Run(
        batches=ImageBatches(bars(), BATCH, seed=0, augmentation=Augment(rotation_degrees=10)),
        objective=objective,
        schedule=Schedule(epochs=3, batch_size=BATCH, ema_decay=0.8),
        checkpoints=folder,
        identity={"seed": 0},
        device=torch.device("cpu"),
        epsilons=(0.1,),
        validation=bars(),
        curves=folder / "curves",
    )


# Other processes import these functions by name.
def all_at_once(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A loss that is not a mean over shares (class means), and that uses the network (constants of the pairs)."""
    radius = losses.hkr_margin_loss(
        logits, labels, alpha=5.0, min_margin=0.5, margin_bounds_KK=network.declared_margin_bounds_KK()
    )
    return radius + losses.hkr_loss(logits, labels, alpha=2.0, min_margin=5.0)


steps_begun = 0


def interrupted(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    global steps_begun
    steps_begun += 1
    if steps_begun == STEPS + 2 and torch.distributed.get_rank() == 0:
        # Ctrl-C signals the whole process group.
        os.kill(os.getpid(), signal.SIGINT)
        signal_caller(signal.SIGINT)
        time.sleep(0.5)
    return all_at_once(network, logits, labels)


def failing(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    raise ValueError("out of the blue")


def dying(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return logits.sum()


def by_two(run: Run, *, resume: bool = False) -> LipschitzNetwork:
    return fit_on(bar_network(), run, devices=2, threads=1, resume=resume).network


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LipschitzNetwork, Path]:
    """Return the network of an uninterrupted run in two processes, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    return by_two(bar_run(folder, all_at_once)), folder


def test_two_processes_train_the_network_of_one(trained: tuple[LipschitzNetwork, Path], tmp_path: Path) -> None:
    network, folder = trained
    expected = fit(bar_network(), bar_run(tmp_path, all_at_once)).network.state_dict()
    found, start = network.state_dict(), bar_network().state_dict()
    for name, value in expected.items():
        assert (value - found[name]).abs().max() < 1e-5, name
        assert (value - start[name]).abs().max() > 1e-3, name
    # Both processes together counted the same images and scored the same held-out images.
    for file in ("last.pt", "best.pt"):
        one, two = (torch.load(place / file, weights_only=True) for place in (tmp_path, folder))
        assert (one["epoch"], one["best"]) == (two["epoch"], two["best"])
    assert len(list((folder / "curves").iterdir())) == 1


def test_signal_stops_all_processes_after_one_step_and_resuming_is_exact(
    trained: tuple[LipschitzNetwork, Path], tmp_path: Path
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"stopped in epoch 2 after step 2; .*--resume"):
        by_two(bar_run(tmp_path, interrupted))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = by_two(bar_run(tmp_path, all_at_once), resume=True).state_dict()
    for name, value in trained[0].state_dict().items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("objective", "reason"), [(failing, "ValueError: out of the blue"), (dying, "SIGKILL|Connection closed")]
)
def test_process_that_fails_or_dies_is_one_error_that_names_the_checkpoint(
    tmp_path: Path, objective: Any, reason: str
) -> None:
    with pytest.raises(TrainingError, match=rf"a process of the training ended \(.*({reason}).*\); nothing was saved"):
        by_two(bar_run(tmp_path, objective))
    assert not list(tmp_path.glob("*.pt"))


def test_more_gpus_than_there_are_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = replace(bar_run(tmp_path, all_at_once), device=torch.device("cuda"))
    with pytest.raises(TrainingError, match="--devices 2: torch sees 1 CUDA device"):
        by_two(run)
