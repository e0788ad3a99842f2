"""Figures of each epoch of a training, for checkpoints and for the report after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.training.scores import Scores


@dataclass(frozen=True)
class EpochFigures:
    """Figures of one epoch."""

    epoch: int
    """From 1."""
    loss: float
    """Mean over the training images, while the weights change."""
    training: Scores | None
    """Of the training images, augmented, while the weights change; null where the network does not classify."""
    validation: Scores | None
    """Of the held-out images after the epoch; null without such images."""

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "training": _as_json(self.training),
            "validation": _as_json(self.validation),
        }

    @classmethod
    def from_json(cls, figures: Mapping[str, Any]) -> EpochFigures:
        """Return the figures that `as_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: they are not of that form.
        """
        training, validation = (_from_json(figures[name]) for name in ("training", "validation"))
        return cls(int(figures["epoch"]), float(figures["loss"]), training, validation)


def _as_json(scores: Scores | None) -> dict[str, Any] | None:
    if scores is None:
        return None
    certified = [{"epsilon": epsilon, "value": value} for epsilon, value in scores.certified.items()]
    return {"accuracy": scores.accuracy, "certified": certified}


def _from_json(scores: Mapping[str, Any] | None) -> Scores | None:
    if scores is None:
        return None
    certified = {float(entry["epsilon"]): float(entry["value"]) for entry in scores["certified"]}
    return Scores(float(scores["accuracy"]), certified)
