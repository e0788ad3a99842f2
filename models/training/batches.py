"""Batches of a training as pure functions of seed, epoch and step, so that a resumed run sees the same ones.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.data.augmentation import augment
from models.data.labelled import LabelledImages
from models.recipes import Augment
from models.training.errors import TrainingError

CPU = torch.device("cpu")

Batch = tuple[Float[Tensor, "N C H W"], Int[Tensor, " N"]]
"""Images and their labels (class numbers)."""


class BatchSource(Protocol):
    """Source of the batches of a run."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        ...

    def batch(self, epoch: int, step: int, device: torch.device = CPU) -> Batch:
        """Return the batch of a step; equal arguments give equal batches.

        Args:
            epoch: counted from 0.
            step: within the epoch, counted from 0.
            device: of the tensors.
        """
        ...


def generator_for(seed: int, *stream: int) -> torch.Generator:
    """Return an independent generator for each `(seed, *stream)`; the numbers are mixed as in SplitMix64."""
    state = 0
    for number in (seed, *stream):
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state)


def calibration_split(images: LabelledImages, size: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Return the calibration part of a training set, drawn uniformly at random, and the other images.

    It is not stratified: the images must be exchangeable with those that will be sent.

    Args:
        images: the training set as it was loaded.
        size: number of calibration images.
        seed: of the training.
    """
    chosen_N = torch.zeros(len(images), dtype=torch.bool)
    chosen_N[torch.randperm(len(images), generator=generator_for(seed, 6))[:size]] = True
    return images.at(chosen_N), images.at(~chosen_N)


class ImageBatches:
    """Shuffled, augmented batches of a data set.

    Args:
        data: the images.
        batch_size: images in a batch.
        seed: of order and augmentation.
        augmentation: random map of each image; default: the images as they are.
        steps: batches of an epoch, for which all images are passed through as often as needed, in a new order each
            time; default: one pass, whose incomplete last batch is dropped.
        class_weights: mean number of appearances in an epoch of an image of each class; default: 1. Appearances
            rather than factors of the loss: in the mean both are equal for every loss that is a mean over images, but
            appearances also balance the class means of the KR term, and no single image makes a huge step.

    Raises:
        TrainingError: the images do not fill one batch.
    """

    def __init__(
        self,
        data: LabelledImages,
        batch_size: int,
        seed: int,
        augmentation: Augment | None,
        class_weights: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> None:
        if len(data) < batch_size:
            raise TrainingError(f"{len(data)} images do not fill one batch of {batch_size}: lower schedule.batch_size")
        self._data = data
        self._batch_size = batch_size
        self._seed = seed
        self._augmentation = augmentation
        self._class_weights = class_weights
        self._steps = len(data) // batch_size if steps is None else steps
        self._order: tuple[int, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of an epoch."""
        return self._steps

    def batch(self, epoch: int, step: int, device: torch.device = CPU) -> Batch:
        """Return images as float32 in [0, 1], augmented on the device, and their labels.

        Args:
            epoch: counted from 0; decides the order.
            step: within the epoch, counted from 0.
            device: of the tensors.
        """
        if self._order is None or self._order[0] != epoch:
            generator = generator_for(self._seed, 0, epoch)
            passes = math.ceil(self._steps * self._batch_size / len(self._data))
            self._order = (epoch, torch.cat([self._shuffled(generator) for _ in range(passes)]))
        chosen = self._order[1][step * self._batch_size : (step + 1) * self._batch_size]
        part = self._data.at(chosen)
        part = LabelledImages(part.images_NCHW.to(device), part.labels_N.to(device))
        images = part.pixels()
        if self._augmentation is not None:
            images = augment(images, self._augmentation, generator_for(self._seed, 1, epoch, step))
        return images, part.labels_N

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        n = len(self._data)
        if self._class_weights is None:
            return torch.randperm(n, generator=generator)
        drawn: list[Tensor] = []
        for label, weight in enumerate(self._class_weights):
            members = (self._data.labels_N == label).nonzero()[:, 0]
            whole, rest = divmod(round(weight * len(members)), len(members))
            some = members[torch.randperm(len(members), generator=generator)[:rest]]
            drawn += [members.repeat(whole), some]
        order = torch.cat(drawn)
        # The rounding of each class may leave a few images too many or too few.
        order = order[torch.randperm(len(order), generator=generator)]
        return torch.cat([order, order])[:n]


@dataclass(frozen=True)
class SampledBatches:
    """Batches drawn from a distribution."""

    sample: Callable[[int, torch.Generator], Batch]
    """`(number of images, generator) -> batch`."""
    batch_size: int
    steps_per_epoch: int
    seed: int

    def batch(self, epoch: int, step: int, device: torch.device = CPU) -> Batch:
        """Return a fresh sample for each step.

        Args:
            epoch: counted from 0.
            step: within the epoch, counted from 0.
            device: of the tensors.
        """
        images, labels = self.sample(self.batch_size, generator_for(self.seed, 2, epoch, step))
        return images.to(device), labels.to(device)
