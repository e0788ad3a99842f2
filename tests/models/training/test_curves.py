"""Event files hold each point once, in the form that TensorBoard reads, and never stop a training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from curve_files import events_in, points
from tensorboardX import RecordWriter

from models.training.curves import Curves


def test_points_are_read_as_they_were_added(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "new" / "folder", 0)
    curves.add(10, {"loss": 0.5, "rate": 0.25})
    curves.add(20, {"loss": -2.0})
    curves.close()
    assert events_in(tmp_path / "new" / "folder")[0].file_version == "brain.Event:2"
    assert points(tmp_path / "new" / "folder", "loss") == [(10, 0.5), (20, -2.0)]
    assert points(tmp_path / "new" / "folder", "rate") == [(10, 0.25)]


def test_points_beyond_the_checkpoint_of_a_killed_run_are_not_shown_twice(tmp_path: Path) -> None:
    killed = Curves(tmp_path, 0)
    for step in (10, 20, 30):
        killed.add(step, {"loss": step})
    killed.close()
    resumed = Curves(tmp_path, 20)
    for step in (30, 40):
        resumed.add(step, {"loss": -step})
    resumed.close()
    assert points(tmp_path, "loss") == [(10, 10), (20, 20), (30, -30), (40, -40)]


def test_full_disk_ends_the_curves_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    curves = Curves(tmp_path, 0)

    def full(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "flush", full)
    curves.add(10, {"loss": 1.0})
    curves.flush()
    curves.add(20, {"loss": 1.0})
    curves.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"the curves in {tmp_path} cannot be written ([Errno 28] No space left on device): "
        "training goes on without them"
    ]


def test_folder_that_cannot_be_made_ends_the_curves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    curves = Curves(tmp_path / "file", 0)
    curves.add(10, {"loss": 1.0})
    curves.close()
    assert "cannot be written" in caplog.text


def test_missing_package_is_a_warning_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    curves = Curves(tmp_path / "curves", 0)
    curves.add(10, {"loss": 1.0})
    curves.close()
    assert "install tensorboardX, or add --no-tensorboard" in caplog.text
    assert not (tmp_path / "curves").exists()
