"""Accuracy and certified accuracy during training, by the declared constants in real arithmetic.

These figures serve the progress bar and the choice of an epoch; the card's figures come from the proved bounds of the
exported graph. Axes: N images, K classes (or one output f), E radii.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.data.labelled import LabelledImages
from models.nets.networks import LipschitzNetwork, both_logits

if TYPE_CHECKING:
    # Loading it takes 2 seconds, which reports and evaluations do not need.
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Scores:
    """Accuracy and, for each epsilon, the share of images classified right with a radius above it."""

    accuracy: float
    certified: Mapping[float, float]

    def __str__(self) -> str:
        certified = ", ".join(f"{value:.2%} at {epsilon:g}" for epsilon, value in self.certified.items())
        return f"accuracy {self.accuracy:.2%}, certified {certified}" if certified else f"accuracy {self.accuracy:.2%}"

    def scalars(self, group: str) -> dict[str, float]:
        """Return the figures as points of curves, by name."""
        certified = {f"{group}/certified_at_{epsilon:.3g}": value for epsilon, value in self.certified.items()}
        return {f"{group}/accuracy": self.accuracy, **certified}


class RunningScores:
    """Mean loss and scores over the images of an epoch so far.

    Args:
        epsilons: radii of the certified accuracy (L2, pixels in [0, 1]).
        device: of the counts, so that a step waits for no transfer.
        classifies: whether the logits say a class; if not, only the loss is reported.
    """

    def __init__(self, epsilons: Sequence[float], device: torch.device, *, classifies: bool) -> None:
        self.epsilons = epsilons
        self.classifies = classifies
        self.images, self.loss_sum = 0, 0.0
        self._counts = torch.zeros(1 + len(epsilons), dtype=torch.int64, device=device)

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4f}"
        return f"{loss}, {self.scores()}" if self.classifies else loss

    @property
    def loss(self) -> float:
        """Mean over the images; 0 before the first."""
        return self.loss_sum / max(self.images, 1)

    def add(self, loss: float, counts: Int[Tensor, " E1"] | None, images: int) -> None:
        """Add one batch.

        Args:
            loss: its mean over the images.
            counts: of `count_correct_within`; absent where the network does not classify.
            images: number of images.
        """
        self.images += images
        self.loss_sum += loss * images
        if counts is not None:
            self._counts += counts

    def scores(self) -> Scores:
        """Return the scores of all images added."""
        return scores_from(self._counts, self.images, self.epsilons)

    def reset(self) -> None:
        """Start an epoch."""
        self.images, self.loss_sum = 0, 0.0
        self._counts.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the content for a checkpoint."""
        return {"seen": self.images, "loss_sum": self.loss_sum, "counts": self._counts.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the content of a checkpoint."""
        self.images, self.loss_sum = state["seen"], state["loss_sum"]
        self._counts.copy_(state["counts"])


def correct_within(
    logits_NK: Float[Tensor, "N outputs"],
    labels_N: Int[Tensor, " N"],
    margin_bounds_KK: Float[Tensor, "K K"],
    epsilon: float,
) -> Bool[Tensor, " N"]:
    """Return which images are right with every margin above `epsilon K_ij`.

    Args:
        logits_NK: logits, or one output f of the classes `(f, -f)`.
        labels_N: class numbers.
        margin_bounds_KK: declared Lipschitz constants `K_ij` of `f_i - f_j`.
        epsilon: radius (L2, pixels in [0, 1]); 0 asks for the right class alone.
    """
    both_NK = both_logits(logits_NK)
    margin_NK = both_NK.gather(1, labels_N[:, None]) - both_NK - epsilon * margin_bounds_KK[labels_N]
    return margin_NK.scatter(1, labels_N[:, None], torch.inf).amin(1) > 0


def count_correct_within(
    logits_NK: Float[Tensor, "N outputs"],
    labels_N: Int[Tensor, " N"],
    margin_bounds_KK: Float[Tensor, "K K"],
    epsilons: Sequence[float],
) -> Int[Tensor, " E1"]:
    """Count the images that are right, then those that are `correct_within` each epsilon.

    Args:
        logits_NK: see `correct_within`, as the next two.
        labels_N: class numbers.
        margin_bounds_KK: declared constants.
        epsilons: radii.
    """
    return torch.stack([correct_within(logits_NK, labels_N, margin_bounds_KK, e).sum() for e in (0.0, *epsilons)])


def scores_from(counts: Int[Tensor, " E1"], images: int, epsilons: Sequence[float]) -> Scores:
    """Turn the counts of `count_correct_within` over a number of images into shares.

    Args:
        counts: right images, then those right within each epsilon.
        images: number of images counted.
        epsilons: radii, in the order of the counts.
    """
    accuracy, *certified = (counts.cpu() / max(images, 1)).tolist()
    return Scores(accuracy, dict(zip(epsilons, certified, strict=True)))


def score(
    network: LipschitzNetwork,
    data: LabelledImages,
    epsilons: Sequence[float],
    batch_size: int = 4096,
    fabric: Fabric | None = None,
) -> Scores:
    """Return the scores of a network over a data set.

    Args:
        network: on the device where it is evaluated.
        data: the images.
        epsilons: radii of the certified accuracy (L2, pixels in [0, 1]).
        batch_size: images of one forward pass.
        fabric: shares the images out among its processes; default: this process alone.
    """
    device = next(network.parameters()).device
    counts = torch.zeros(1 + len(epsilons), dtype=torch.int64, device=device)
    share = data if fabric is None else data.at(slice(fabric.global_rank, None, fabric.world_size))
    with torch.no_grad():
        bounds = network.declared_margin_bounds_KK()
        for start in range(0, len(share), batch_size):
            part = share.at(slice(start, start + batch_size))
            logits, labels = network(part.pixels().to(device)), part.labels_N.to(device)
            counts += count_correct_within(logits, labels, bounds, epsilons)
    if fabric is not None:
        fabric.all_reduce(counts, reduce_op="sum")
    return scores_from(counts, len(data), epsilons)
