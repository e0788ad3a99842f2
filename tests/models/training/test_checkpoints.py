"""Checkpoints are whole, belong to one run, and make room for each other on a full disk."""

from __future__ import annotations

import errno
import io
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import EPOCHS, small_network, small_run

from models.training.errors import CheckpointError, TrainingError
from models.training.loop import fit


def test_earlier_checkpoint_is_not_overwritten_without_being_asked(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    fit(small_network(), run)
    with pytest.raises(TrainingError, match="add --resume"):
        fit(small_network(), run)


def test_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    fit(small_network(), run)
    with pytest.raises(TrainingError, match=r"recipe\.epochs was 3, now 5"):
        fit(small_network(), replace(run, identity={"recipe": {"epochs": 5}, "seed": 0}), resume=True)


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        fit(small_network(), small_run(tmp_path), resume=True)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="cannot be read"):
        fit(small_network(), small_run(tmp_path), resume=True)


def test_checkpoints_leave_no_temporary_file_nor_that_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.k1ll3d").write_bytes(b"half of it")
    fit(small_network(), small_run(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}


def test_averaged_weights_are_saved_as_those_of_a_plain_network(tmp_path: Path) -> None:
    # So a run that was begun before torch.optim.swa_utils computed the average can be resumed.
    network = fit(small_network(), small_run(tmp_path, ema_decay=0.9)).network
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["average"].keys() == saved["network"].keys() == network.state_dict().keys()


class FullFile(io.RawIOBase):
    """A file of a disk that is full after some writes."""

    def __init__(self, writes: int) -> None:
        self.writes = writes

    def write(self, content: object) -> int:
        self.writes -= 1
        if self.writes < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(content)  # type: ignore[arg-type]


@pytest.mark.parametrize("writes", [0, 1, 5])
def test_best_checkpoint_makes_room_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, writes: int
) -> None:
    really_save = torch.save

    def save_one_beside_the_last(state: Any, file: Any) -> None:
        really_save(state, FullFile(writes) if (tmp_path / "best.pt").exists() else file)

    # torch raises the error of the first write as it is, of a later one as a RuntimeError.
    monkeypatch.setattr(torch, "save", save_one_beside_the_last)
    fit(small_network(), small_run(tmp_path))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == EPOCHS
    assert "No space left on device): best.pt is deleted to make room for it" in caplog.text


def test_disk_without_room_for_the_checkpoints_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"0 MB left, checkpoints need .* --out"):
        fit(small_network(), small_run(tmp_path / "not" / "yet"))
