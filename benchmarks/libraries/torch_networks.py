"""Networks of plain torch that the certifier is measured on; nothing is claimed about them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from forms import COLOUR, GREY, NEWER, Form, Network, nothing_claimed
from torch import nn


class ResidualBlock(nn.Module):
    """The basic block of ResNet-18: two 3 x 3 convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet(channels: int, colours: int = 3, blocks: Sequence[int] = (1, 2, 2)) -> nn.Module:
    """Stem, pool, basic blocks with these strides, global average, linear head."""
    layers: list[nn.Module] = [nn.Conv2d(colours, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for stride in blocks:
        layers.append(ResidualBlock(channels, channels * stride, stride))
        channels *= stride
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, 10))


class NormalisedCnn(nn.Module):
    """Two convolutions and two dense layers, with the normalisation of the pixels inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.dense = nn.Sequential(nn.Linear(32 * 144, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.layers((x - 0.1307) / 0.3081))


NETWORKS: list[Network] = [
    nothing_claimed("resnet", "ReLU, BatchNorm2d, basic blocks, MaxPool, global average", lambda: resnet(16), COLOUR),
    nothing_claimed("cnn-normalised", "normalisation, convolutions, ReLU, MaxPool", NormalisedCnn, GREY),
    nothing_claimed(
        "vgg-gelu",
        "BatchNorm, LeakyReLU, ELU, reflect padding, GELU",
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(32),
            nn.LeakyReLU(0.1),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ELU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        ),
        COLOUR,
        forms=(NEWER, Form("dynamo", 20)),
    ),
]
