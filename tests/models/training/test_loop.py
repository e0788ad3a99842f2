"""Training is reproducible, resumes exactly, and stops with the step that broke it."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from bright_bars import bars
from curve_files import points
from small_runs import BATCH, STEPS, StopHere, assert_equal_networks, interrupt_after, small_network, small_run

from models.nets.networks import LipschitzNetwork, dense_network
from models.recipes import Schedule
from models.training.batches import ImageBatches
from models.training.errors import Interrupted, NonFiniteError, TrainingError
from models.training.loop import Run, fit
from models.training.scores import score


@pytest.mark.parametrize("parametrisation", ["cayley", "stiefel"])
@pytest.mark.parametrize(("ema_decay", "precision"), [(None, "32-true"), (0.9, "32-true"), (0.9, "bf16-mixed")])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, parametrisation: str, ema_decay: float | None, precision: str
) -> None:
    options = {"ema_decay": ema_decay, "precision": precision}
    whole = fit(small_network(parametrisation), small_run(tmp_path / "whole", **options)).network
    run = small_run(tmp_path / "cut", **options)
    with pytest.raises(Interrupted, match=r"epoch 2 after step 2.*--resume"):
        fit(small_network(parametrisation), interrupt_after(run, STEPS + 2, "signal"))
    torch.manual_seed(99)  # the random state of the new process must not matter
    resumed = fit(dense_network((1, 6, 6), (12, 8), 3, parametrisation=parametrisation), run, resume=True).network  # type: ignore[arg-type]
    assert_equal_networks(whole, resumed)


def test_killed_run_resumes_at_the_last_epoch_and_ends_the_same(tmp_path: Path) -> None:
    whole = fit(small_network(), small_run(tmp_path / "whole")).network
    run = small_run(tmp_path / "cut")
    with pytest.raises(StopHere):
        fit(small_network(), interrupt_after(run, STEPS + 2, "crash"))
    assert_equal_networks(whole, fit(small_network(), run, resume=True).network)


def test_resuming_a_finished_run_returns_its_network(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    finished = fit(small_network(), run).network
    assert_equal_networks(finished, fit(small_network(), run, resume=True).network)


def test_equal_seeds_give_equal_networks_and_other_seeds_other_batches(tmp_path: Path) -> None:
    assert_equal_networks(
        fit(small_network(), small_run(tmp_path / "a")).network, fit(small_network(), small_run(tmp_path / "b")).network
    )
    one, other = (ImageBatches(bars(), BATCH, seed, None).batch(0, 0)[0] for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("parametrisation", ["cayley", "stiefel"])
def test_mixed_precision_rounds_in_the_body_alone_and_learns_the_same(tmp_path: Path, parametrisation: str) -> None:
    seen: list[torch.Tensor] = []
    trained: list[LipschitzNetwork] = []
    for precision in ("32-true", "bf16-mixed"):
        run = small_run(tmp_path / precision, precision=precision)

        def objective(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor, run: Run = run) -> Any:
            seen.append(logits.detach())
            return run.objective(network, logits, labels)

        trained.append(fit(small_network(parametrisation), replace(run, objective=objective)).network)
    exact, mixed = seen[0], seen[len(seen) // 2]
    assert all(logits.dtype == torch.float32 for logits in seen)
    assert 0 < (exact - mixed).abs().max() < 0.02  # bfloat16 rounded the body
    assert not torch.equal(mixed, mixed.bfloat16().float())  # but not the head
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).abs().max() < 0.05


def test_curves_of_an_interrupted_and_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(name: str) -> Run:
        return replace(small_run(tmp_path / name), curves=tmp_path / f"{name} curves", validation=bars())

    fit(small_network(), run("whole"))
    with pytest.raises(Interrupted):
        fit(small_network(), interrupt_after(run("cut"), STEPS + 2, "signal"))
    with pytest.raises(StopHere):  # has written points beyond its last checkpoint
        fit(small_network(), interrupt_after(run("cut"), STEPS + 1, "crash"), resume=True)
    fit(small_network(), run("cut"), resume=True)
    tags = ["train/loss", "train/accuracy", "train/certified_at_0.5", "learning_rate/Adam"]
    tags += ["epoch/loss", "epoch/accuracy", "held_out/accuracy", "held_out/certified_at_0.1"]
    for tag in tags:
        whole, cut = (points(tmp_path / f"{name} curves", tag) for name in ("whole", "cut"))
        assert whole == cut, tag
        assert [step for step, _ in whole] == ([4, 8, 12] if tag.startswith(("epoch", "held")) else [10])
    assert [step for step, _ in points(tmp_path / "whole curves", "images_per_second")] == [10]
    first, *_, last = (value for _, value in points(tmp_path / "whole curves", "epoch/loss"))
    assert last < first


def test_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    taken = 0

    def objective(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        taken += 1
        loss = run.objective(network, logits, labels)
        return loss * torch.nan if taken == STEPS + 3 else loss

    with pytest.raises(NonFiniteError, match=r"the loss is nan in epoch 2, step 3; .*last\.pt is from before"):
        fit(small_network(), replace(run, objective=objective))
    kept = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (kept["epoch"], kept["step"]) == (1, 0)
    assert all(torch.isfinite(value).all() for value in kept["network"].values())


def test_weight_that_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: torch.optim.Adam) -> None:
        for group in self.param_groups:
            group["params"][0].data.fill_(torch.inf)

    run = small_run(tmp_path)
    batches = ImageBatches(bars(), 70, 0, None)  # one step an epoch: no later loss shows it
    monkeypatch.setattr(torch.optim.Adam, "step", spoil)
    with pytest.raises(NonFiniteError, match="a weight is not finite in epoch 1"):
        fit(small_network(), replace(run, batches=batches))
    assert not (tmp_path / "last.pt").exists()


def test_full_disk_during_training_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(small_network(), small_run(tmp_path / "whole")).network
    really_save, full = torch.save, False

    def save_or_fail(state: Any, file: IO[bytes]) -> None:
        nonlocal full
        if full:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        really_save(state, file)
        full = Path(file.name).name.startswith(".best.pt.")

    monkeypatch.setattr(torch, "save", save_or_fail)
    run = small_run(tmp_path / "full")
    assert_equal_networks(whole, fit(small_network(), run).network)
    assert "No space left on device" in caplog.text
    assert "training goes on without it" in caplog.text
    assert {path.name for path in run.checkpoints.iterdir()} == {"last.pt"}
    # The older checkpoint is whole: a new process continues from it.
    monkeypatch.setattr(torch, "save", really_save)
    assert_equal_networks(whole, fit(small_network(), run, resume=True).network)


def test_fewer_steps_than_the_schedule_needs_are_refused(tmp_path: Path) -> None:
    batches = ImageBatches(bars(), 70, 0, None)
    run = replace(small_run(tmp_path), batches=batches, schedule=Schedule(epochs=2, batch_size=70))
    with pytest.raises(TrainingError, match="2 steps are too few"):
        fit(small_network(), run)


def test_training_learns_the_bars(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run = replace(run, schedule=Schedule(epochs=15, batch_size=BATCH, learning_rate=2e-2))
    run = replace(run, batches=ImageBatches(bars(), BATCH, 0, None))
    scores = score(fit(small_network(), run).network, bars(), (0.1,))
    assert scores.accuracy == 1.0
    assert scores.certified[0.1] > 0.9


def test_average_starts_at_the_initial_weights_and_decays_with_each_step(tmp_path: Path) -> None:
    run = small_run(tmp_path, ema_decay=0.75)
    weights: list[list[torch.Tensor]] = []

    def objective(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        return run.objective(network, logits, labels)

    # A Cayley parameter is not orthogonal itself, so the average is returned as it is.
    averaged = fit(small_network("cayley"), replace(run, objective=objective)).network
    final = torch.load(tmp_path / "last.pt", weights_only=True)["network"]
    expected = [parameter.clone() for parameter in weights[0]]
    for step in [*weights[1:], list(final.values())]:
        for mean, current in zip(expected, step, strict=True):
            mean.lerp_(current, 0.25)
    for found, mean in zip(averaged.parameters(), expected, strict=True):
        assert torch.equal(found, mean)
