"""Generated negatives: deterministic, inside the box, away from the data, and walked to the boundary."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from bright_bars import bars
from small_runs import AUGMENT, BATCH, STEPS, assert_equal_networks, interrupt_after, small_run

from models.data.labelled import LabelledImages
from models.nets.networks import LipschitzNetwork, dense_network
from models.parts import Change, Negatives
from models.recipes import Loss
from models.training.batches import ImageBatches, generator_for
from models.training.errors import Interrupted
from models.training.loop import Run, fit
from models.training.negatives import CHANGES as FUNCTIONS
from models.training.negatives import NegativeImages, starts, walked
from models.training.objective import objective_of

CHANGES: tuple[Change, ...] = get_args(Change)


def known(n: int = 12, channels: int = 1, height: int = 14, width: int = 10) -> torch.Tensor:
    """A bright bar at a random place, on black."""
    images = torch.zeros(n, channels, height, width)
    for i, row in enumerate(torch.randint(height - 4, (n,), generator=torch.Generator().manual_seed(0)).tolist()):
        images[i, :, row : row + 3, 2:5] = 0.9
    return images


class Linear(torch.nn.Module):
    """f = 1 - sum of pixels / sqrt(number of pixels): 1-Lipschitz, with its zero where the sum is the root."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        return 1 - flat.sum(1, keepdim=True) / flat.shape[1] ** 0.5


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_change_stays_in_the_box_and_leaves_the_data(change: Change, channels: int) -> None:
    images = known(channels=channels)
    made = starts(images, Negatives(noise=0.0, changes=(change,)), generator_for(0))
    assert made.shape == images.shape
    assert made.min() >= 0
    assert made.max() <= 1
    distance = torch.cdist(made.flatten(1), images.flatten(1)).amin(1)
    # A rectangle may miss the bar, and a mirrored one may be its own mirror image.
    assert (distance > 0.1).double().mean() >= 0.4


def test_noise_has_every_contrast_and_grain() -> None:
    made = starts(known(200), Negatives(noise=1.0), generator_for(0))
    assert made.min() >= 0
    assert made.max() <= 1
    spread = made.flatten(1).std(1)
    assert (spread == 0).any()
    assert (spread > 0.25).any()


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("changes", [(), CHANGES, CHANGES[:3]])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_there_is_one_start_for_each_known_image(noise: float, changes: tuple[Change, ...], n: int) -> None:
    assert len(starts(known(n), Negatives(noise=noise, changes=changes), generator_for(0))) == n


def test_walks_end_at_the_boundary_and_do_not_cross_it() -> None:
    images = torch.rand(6, 1, 14, 10, generator=torch.Generator().manual_seed(1))
    f = Linear()(images)[:, 0]
    assert (f < 0).all()
    ends = Linear()(walked(Linear(), images, torch.ones(6), 16))[:, 0]
    # Clipping to the box slows the walk down.
    assert (ends > 1e-2 * f).all()
    assert (ends < 1e-4).all()
    half = Linear()(walked(Linear(), images, torch.full((6,), 0.5), 1))[:, 0]
    assert (half > f).all()
    assert (half < 0).all()


def test_an_image_that_the_network_takes_for_known_stays() -> None:
    images = torch.zeros(3, 1, 14, 10)
    assert torch.equal(walked(Linear(), images, torch.ones(3), 4), images)


def test_a_step_is_a_function_of_seed_epoch_and_step() -> None:
    source, network = NegativeImages(Negatives(changes=CHANGES), seed=3), Linear()
    images, labels = source.joined(network, known(), 1, 2)
    assert labels.tolist() == 12 * [0] + 12 * [1]
    assert torch.equal(images[:12], known())
    assert torch.equal(images, source.joined(network, known(), 1, 2)[0])
    for other in (source.joined(network, known(), 1, 3), source.joined(network, known(), 2, 2)):
        assert not torch.equal(images, other[0])
    assert not torch.equal(images, NegativeImages(source.negatives, seed=4).joined(network, known(), 1, 2)[0])


def test_generation_leaves_no_gradient_and_no_trace_in_the_global_generator() -> None:
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(140, 1))
    before = torch.get_rng_state()
    images, _ = NegativeImages(Negatives(changes=CHANGES), seed=0).joined(layer, known(), 0, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in layer.parameters())


def one_class_run(folder: Path) -> Run:
    batches = ImageBatches(LabelledImages(bars().images_NCHW, torch.zeros(len(bars())).long()), BATCH, 0, AUGMENT)
    objective = objective_of(Loss(kind="hkr", alpha=5.0, min_margin=0.5))
    negatives = NegativeImages(Negatives(changes=("patches", "warp", "paste"), steps=2), seed=0)
    return replace(small_run(folder), batches=batches, objective=objective, negatives=negatives)


def one_output() -> LipschitzNetwork:
    torch.manual_seed(1)
    return dense_network((1, 6, 6), (12, 8), 1, parametrisation="stiefel")


def test_an_interrupted_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(one_output(), one_class_run(tmp_path / "whole")).network
    run = one_class_run(tmp_path / "cut")
    with pytest.raises(Interrupted):
        fit(one_output(), interrupt_after(run, STEPS + 2, "signal"))
    torch.manual_seed(99)
    assert_equal_networks(
        whole, fit(dense_network((1, 6, 6), (12, 8), 1, parametrisation="stiefel"), run, resume=True).network
    )


def test_a_training_tells_bars_from_noise(tmp_path: Path) -> None:
    run = one_class_run(tmp_path)
    trained = fit(one_output(), replace(run, schedule=run.schedule.model_copy(update={"epochs": 30}))).network
    with torch.no_grad():
        known = trained(bars().pixels())[:, 0]
        noise = trained(torch.rand(100, 1, 6, 6, generator=torch.Generator().manual_seed(5)))[:, 0]
    assert (known > 0).double().mean() > 0.8
    assert (noise < 0).double().mean() > 0.8


def test_a_run_with_negatives_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    run = replace(one_class_run(tmp_path), checkpoints=tmp_path)
    assert pickle.loads(pickle.dumps(run)).negatives == run.negatives


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_move_and_no_pixel_is_lost(channels: int) -> None:
    images = torch.arange(40 * channels * 15 * 14.0).reshape(40, channels, 15, 14)
    made = FUNCTIONS["patches"](images, generator_for(0))
    assert torch.equal(made.flatten(2).sort(2).values, images.flatten(2))
    assert (made != images).double().mean() > 0.5
