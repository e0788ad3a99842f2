"""Training is reproducible, resumes exactly, and stops with the step that broke it."""

import errno
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bright_bars import bars
from curve_files import points

from models.data.labelled import LabelledImages
from models.nets.layers.sorting import GroupSort2
from models.nets.networks import LipschitzNetwork, dense_network
from models.recipes import Augment, Loss, Schedule
from models.training import loop as training
from models.training.batches import ImageBatches, generator_for
from models.training.errors import CheckpointError, Interrupted, NonFiniteError, TrainingError
from models.training.loop import Run, fit
from models.training.objective import objective_of
from models.training.scores import correct_within, score

EPOCHS, BATCH = 3, 16
STEPS = 4
"""Of an epoch: 70 images in batches of 16, the incomplete one dropped."""
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


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches the tests, also where a shell started them in the background and lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_after(run: Run, steps: int, how: str) -> Run:
    """The same run, cut at the given step by an exception or by a signal."""
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


def assert_equal_networks(one: LipschitzNetwork, other: LipschitzNetwork) -> None:
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name


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
    torch.manual_seed(99)  # what the new process starts with must not matter
    resumed = fit(dense_network((1, 6, 6), (12, 8), 3, parametrisation=parametrisation), run, resume=True).network  # type: ignore[arg-type]
    assert_equal_networks(whole, resumed)


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
    assert 0 < (exact - mixed).abs().max() < 0.02  # bfloat16 was in it, once or twice
    assert not torch.equal(mixed, mixed.bfloat16().float())  # and not in the head
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


def test_each_epoch_says_how_much_time_the_run_still_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0

    def objective(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 600.0
        return small.objective(network, logits, labels)

    monkeypatch.setattr(training.time, "monotonic", lambda: now)
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


def test_an_epoch_shows_every_image_at_most_once_in_a_new_order() -> None:
    images = torch.arange(70, dtype=torch.uint8)[:, None, None, None]
    batches = ImageBatches(LabelledImages(images, torch.zeros(70, dtype=torch.int64)), BATCH, 0, None)
    epochs = [
        [round(255 * v) for step in range(STEPS) for v in batches.batch(epoch, step)[0].flatten().tolist()]
        for epoch in (0, 1)
    ]
    assert batches.steps_per_epoch == STEPS
    assert all(len(set(epoch)) == STEPS * BATCH for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("counts", [(60, 10), (50, 3, 17), (64, 1)])
def test_weighted_classes_appear_equally_often_and_so_do_the_images_of_a_class(counts: tuple[int, ...]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    n = len(labels)
    weights = [n / (len(counts) * count) for count in counts]
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None]
    batches = ImageBatches(LabelledImages(images, labels), n, 0, None, weights)
    (shown, classes), (again, _) = batches.batch(0, 0), batches.batch(1, 0)
    assert all(abs(found - n / len(counts)) <= 1 for found in torch.bincount(classes).tolist())
    times = torch.bincount((255 * shown).round().long().flatten(), minlength=n)
    for label, weight in enumerate(weights):
        assert (times[labels == label] - weight).abs().max() < 2
    assert not torch.equal(shown, again)


def test_streams_of_random_numbers_differ_in_each_of_their_numbers() -> None:
    streams = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 1), (1, 0), (0, 0)]
    first = {torch.rand((), generator=generator_for(*stream), dtype=torch.float64).item() for stream in streams}
    assert len(first) == len(streams)


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


def test_checkpoints_leave_no_temporary_file(tmp_path: Path) -> None:
    fit(small_network(), small_run(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "best.pt"}


def test_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(TrainingError, match="batch_size"):
        ImageBatches(bars(), 71, 0, None)


def test_full_disk_during_training_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(small_network(), small_run(tmp_path / "whole")).network
    really_save, full = torch.save, False

    def save_or_fail(state: Any, file: Any) -> None:
        nonlocal full
        if full:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        really_save(state, file)
        full = file.name.endswith("best.tmp")

    monkeypatch.setattr(torch, "save", save_or_fail)
    run = small_run(tmp_path / "full")
    assert_equal_networks(whole, fit(small_network(), run).network)
    assert "No space left on device" in caplog.text
    assert "training goes on without it" in caplog.text
    assert {path.name for path in run.checkpoints.iterdir()} == {"last.pt"}
    # What was written before is whole: a new process goes on from it.
    monkeypatch.setattr(torch, "save", really_save)
    assert_equal_networks(whole, fit(small_network(), run, resume=True).network)


def test_best_checkpoint_makes_room_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_save = torch.save

    def save_one_beside_the_last(state: Any, file: Any) -> None:
        if (tmp_path / "best.pt").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        really_save(state, file)

    monkeypatch.setattr(torch, "save", save_one_beside_the_last)
    fit(small_network(), small_run(tmp_path))
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == EPOCHS


def test_disk_without_room_for_the_checkpoints_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"0 MB left, checkpoints need .* --out"):
        fit(small_network(), small_run(tmp_path / "not" / "yet"))


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


def test_certified_share_counts_margins_above_epsilon_times_the_pairs_constant() -> None:
    logits = torch.tensor([[3.0, 0.0, -9.0], [3.0, 0.0, 2.9], [0.0, 3.0, 0.0]])
    labels = torch.tensor([0, 0, 0])
    bounds = torch.tensor([[0.0, 2.0, 0.5], [2.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    assert correct_within(logits, labels, bounds, 0.0).tolist() == [True, True, False]
    assert correct_within(logits, labels, bounds, 1.4).tolist() == [True, False, False]
    assert correct_within(logits, labels, bounds, 1.5).tolist() == [False, False, False]


def test_certified_share_of_one_output_is_its_absolute_value() -> None:
    network = LipschitzNetwork(
        (1, 1, 2), dense_network((1, 1, 2), (2,), 1).body, dense_network((1, 1, 2), (2,), 1).head
    )
    assert any(isinstance(layer, GroupSort2) for layer in network.modules())
    logits, labels = torch.tensor([[0.8], [-0.8], [0.3]]), torch.tensor([0, 1, 1])
    bounds = network.declared_margin_bounds_KK().detach()
    assert correct_within(logits, labels, bounds, 0.79).tolist() == [True, True, False]
    assert correct_within(logits, labels, bounds, 0.81).tolist() == [False, False, False]
