"""The best epoch by held-out images is exported, and epochs that bring nothing are skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bright_bars import bars
from small_runs import BATCH, STEPS, assert_equal_networks, interrupt_after, small_network, small_run

from models.nets.networks import LipschitzNetwork
from models.recipes import Schedule
from models.training import loop
from models.training.errors import Interrupted
from models.training.loop import Run, fit
from models.training.scores import Scores

EPOCHS = 9


def keeping_run(folder: Path, patience: int | None = None, ema_decay: float | None = None) -> Run:
    schedule = Schedule(epochs=EPOCHS, batch_size=BATCH, keep="best", patience=patience, ema_decay=ema_decay)
    return replace(small_run(folder), schedule=schedule, validation=bars().at(slice(0, 20)))


def script(monkeypatch: pytest.MonkeyPatch, certified: list[float]) -> list[dict[str, torch.Tensor]]:
    """Have the held-out images score as written, epoch by epoch; return the weights that were scored."""
    seen: list[dict[str, torch.Tensor]] = []

    def score(network: LipschitzNetwork, *_arguments: Any, **_options: Any) -> Scores:
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return Scores(1.0, {0.1: certified[len(seen) - 1], 0.5: 0.0})

    monkeypatch.setattr(loop, "score", score)
    return seen


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_network_of_the_best_epoch_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float | None
) -> None:
    seen = script(monkeypatch, [0.9, 0.9, 0.9, 0.5, 0.6, 0.8, 0.7, 0.6, 0.5])
    found = fit(small_network(), keeping_run(tmp_path, ema_decay=ema_decay)).network
    assert len(seen) == EPOCHS
    for name, value in found.state_dict().items():
        assert torch.equal(value, seen[5][name]), name


def test_epochs_are_halved_where_none_is_better_and_the_rates_still_fall_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    seen = script(monkeypatch, [0.5] * 3 + [0.9] + [0.1] * 9)
    run = keeping_run(tmp_path, patience=2)
    fit(small_network(), run)
    # Best: the fourth epoch. Two epochs later three are left, of which one is skipped; two later one is left.
    assert len(seen) == EPOCHS - 1
    assert "half of those that are left (1) are skipped" in caplog.text
    state = torch.load(run.checkpoints / "last.pt", weights_only=True)
    assert all(scheduler["last_epoch"] == EPOCHS * STEPS for scheduler in state["schedulers"])


def test_a_run_with_skipped_epochs_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certified = [0.5] * 3 + [0.9] + [0.1] * 9
    script(monkeypatch, certified)
    whole = fit(small_network(), keeping_run(tmp_path / "whole", patience=2)).network
    seen = script(monkeypatch, certified)
    run = keeping_run(tmp_path / "cut", patience=2)
    with pytest.raises(Interrupted):
        fit(small_network(), interrupt_after(run, 6 * STEPS + 2, "signal"))
    assert_equal_networks(whole, fit(small_network(), run, resume=True).network)
    assert len(seen) == EPOCHS - 1
