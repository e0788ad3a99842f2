"""The log of a training says where it is, how good, and how long it will take."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import EPOCHS, STEPS, interrupt_after, small_network, small_run

from models.nets.networks import LipschitzNetwork
from models.training.errors import Interrupted
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


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5969, "99 min"), (6000, "1 h 40 min")]
)
def test_duration_is_given_in_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
