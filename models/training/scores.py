"""TODO: models/training/scores.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from lightning_fabric import Fabric
from torch import Tensor

from models.data.labelled import LabelledImages
from models.nets.networks import LipschitzNetwork, both_logits


@dataclass(frozen=True)
class Scores:
    """Accuracy and, for each epsilon, the share of images that are right with a radius above it."""

    accuracy: float
    certified: Mapping[float, float]

    def __str__(self) -> str:
        certified = ", ".join(f"{value:.2%} at {epsilon:g}" for epsilon, value in self.certified.items())
        return f"accuracy {self.accuracy:.2%}, certified {certified}" if certified else f"accuracy {self.accuracy:.2%}"

    def scalars(self, group: str) -> dict[str, float]:
        """The same as points of curves."""
        certified = {f"{group}/certified_at_{epsilon:.3g}": value for epsilon, value in self.certified.items()}
        return {f"{group}/accuracy": self.accuracy, **certified}


def correct_within(
    logits_NK: Float[Tensor, "N K"],
    labels_N: Int[Tensor, " N"],
    margin_bounds_KK: Float[Tensor, "K K"],
    epsilon: float,
) -> Bool[Tensor, " N"]:
    """Right with every margin above `epsilon K_ij`: certified in real arithmetic with the declared constants.

    A figure for the progress bar; the card's figures come from the proved bounds of the exported graph.
    """
    both_NK = both_logits(logits_NK)
    margin_NK = both_NK.gather(1, labels_N[:, None]) - both_NK - epsilon * margin_bounds_KK[labels_N]
    return margin_NK.scatter(1, labels_N[:, None], torch.inf).amin(1) > 0


def score(
    network: LipschitzNetwork,
    data: LabelledImages,
    epsilons: Sequence[float],
    batch_size: int = 4096,
    fabric: Fabric | None = None,
) -> Scores:
    """Accuracy and certified accuracy (declared constants) over a data set; each process of `fabric` does its share."""
    device = next(network.parameters()).device
    counts = torch.zeros(1 + len(epsilons), dtype=torch.int64, device=device)
    own = data if fabric is None else data.at(slice(fabric.global_rank, None, fabric.world_size))
    with torch.no_grad():
        bounds = network.declared_margin_bounds_KK()
        for start in range(0, len(own), batch_size):
            part = own.at(slice(start, start + batch_size))
            logits, labels = network(part.pixels().to(device)), part.labels_N.to(device)
            counts += counts_within(logits, labels, bounds, epsilons)
    if fabric is not None:
        fabric.all_reduce(counts, reduce_op="sum")
    accuracy, *certified = (counts.cpu() / len(data)).tolist()
    return Scores(accuracy, dict(zip(epsilons, certified, strict=True)))


def counts_within(logits: Tensor, labels: Tensor, bounds: Tensor, epsilons: Sequence[float]) -> Tensor:
    return torch.stack([correct_within(logits, labels, bounds, e).sum() for e in (0.0, *epsilons)])
