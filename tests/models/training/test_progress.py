"""The log of a training says where it is, how good, and how long it will take."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bright_bars import bars
from small_runs import EPOCHS, STEPS, interrupt_after, small_network, small_run

from models.nets.networks import LipschitzNetwork
from models.training.errors import Interrupted
from models.training.history import EpochFigures
from models.training.loop import fit
from models.training.progress import format_duration


def test_each_epoch_says_how_much_time_the_run_still_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0

    def objective(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 600.0
        return small.objective(network, logits, labels)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    small = small_run(tmp_path)
    fit(small_network(), replace(small, objective=objective))
    lines = [record.getMessage() for record in caplog.records]
    # Four steps of ten minutes each in an epoch.
    assert [line.rpartition("; ")[2] for line in lines] == ["80 min left", "40 min left", "0 s left"]
    assert lines[0].startswith("epoch 1/3: loss ")


def test_first_figures_after_resuming_within_an_epoch_are_those_of_the_whole_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fit(small_network(), small_run(tmp_path / "whole"))
    whole = [record.getMessage().rpartition("; ")[0] for record in caplog.records]
    caplog.clear()
    run = small_run(tmp_path / "cut")
    with pytest.raises(Interrupted):
        fit(small_network(), interrupt_after(run, STEPS + 2, "signal"))
    fit(small_network(), run, resume=True)
    cut = [record.getMessage().rpartition("; ")[0] for record in caplog.records if "resumed" not in record.getMessage()]
    assert whole == cut
    assert len(whole) == EPOCHS


def test_history_has_each_epoch_also_after_resuming(tmp_path: Path) -> None:
    held_out = replace(small_run(tmp_path / "whole"), validation=bars())
    whole = fit(small_network(), held_out).history
    run = replace(held_out, checkpoints=tmp_path / "cut")
    with pytest.raises(Interrupted):
        fit(small_network(), interrupt_after(run, 2 * STEPS + 1, "signal"))
    assert fit(small_network(), run, resume=True).history == whole
    assert [figures.epoch for figures in whole] == [1, 2, 3]
    assert all(figures.training is not None and set(figures.training.certified) == {0.1, 0.5} for figures in whole)
    assert all(figures.validation is not None for figures in whole)
    assert [EpochFigures.from_json(json.loads(json.dumps(figures.as_json()))) for figures in whole] == list(whole)


def test_checkpoint_of_an_older_version_has_no_history_and_is_resumed(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    with pytest.raises(Interrupted):
        fit(small_network(), interrupt_after(run, STEPS + 2, "signal"))
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["history"]
    torch.save(state, tmp_path / "last.pt")
    assert [figures.epoch for figures in fit(small_network(), run, resume=True).history] == [2, 3]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5969, "99 min"), (6000, "1 h 40 min")]
)
def test_duration_is_given_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
