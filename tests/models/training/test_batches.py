"""Batches are functions of seed, epoch and step, and show the images as often as they should."""

from __future__ import annotations

import pytest
import torch
from bright_bars import bars
from small_runs import BATCH, STEPS

from models.data.labelled import LabelledImages
from models.training.batches import ImageBatches, generator_for
from models.training.errors import TrainingError


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


def test_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(TrainingError, match="batch_size"):
        ImageBatches(bars(), 71, 0, None)
