"""An ordinary small convolutional network without any certificate, and its training: what a user compares with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.data.labelled import DataSet

EPOCHS = 16
BATCH = 32
LEARNING_RATE = 3e-3
"""Greatest of the cycle."""


class SmallCnn(nn.Module):
    """Three blocks of convolution, normalisation, ReLU and maximum, a global maximum and one dense layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for width in (32, 64, 64):
            blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.dense = nn.Linear(channels, classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return the logits, N x K, of images in [0, 1]."""
        return self.dense(self.blocks(images_NCHW).amax((2, 3)))


@dataclass(frozen=True)
class Score:
    """What a network reaches on the test images."""

    accuracy: float
    balanced_accuracy: float
    """Mean of the shares of each class that are classified right."""
    cpu_seconds: float
    """Of the training, on one thread."""
    wall_seconds: float
    epochs: int


def fit(data: DataSet, *, epochs: int = EPOCHS, seed: int = 0) -> Score:
    """Train on the training images, each mirrored at random, and score on the test images; on the threads of torch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    cpu, wall = time.process_time(), time.monotonic()
    images_NCHW, labels_N = data.train.images_NCHW, data.train.labels_N
    network = SmallCnn(images_NCHW.shape[1], len(data.labels))
    counts_K = torch.bincount(labels_N, minlength=len(data.labels))
    loss = nn.CrossEntropyLoss(weight=len(labels_N) / (len(counts_K) * counts_K))
    optimiser = torch.optim.Adam(network.parameters())
    steps = epochs * -(-len(labels_N) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels_N), generator=generator).split(BATCH):
            mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            pixels_NCHW = images_NCHW[batch].float() / 255
            logits_NK = network(torch.where(mirrored, pixels_NCHW.flip(3), pixels_NCHW))
            optimiser.zero_grad()
            loss(logits_NK, labels_N[batch]).backward()
            optimiser.step()
            cycle.step()
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    return Score(*accuracies(predict(network, data.test.images_NCHW), data.test.labels_N), cpu, wall, epochs)


def accuracies(predicted_N: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """Return the share of images that are classified right, and the mean of this share over the classes."""
    hits_N = (predicted_N == labels_N).double()
    of_classes_K = torch.stack([hits_N[labels_N == k].mean() for k in labels_N.unique()])
    return float(hits_N.mean()), float(of_classes_K.mean())


@torch.no_grad()
def predict(network: SmallCnn, images_NCHW: Tensor) -> Tensor:
    """Return the classes, N, of 8-bit images."""
    network.eval()
    return torch.cat([network(images.float() / 255).argmax(1) for images in images_NCHW.split(256)])
