"""The choice of an epoch by the figures of held-out images."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.training.scores import Scores

log = logging.getLogger(__name__)

REACHED = 0.9
"""Share of the right images that a radius certifies which a set can reach."""


class BestEpoch:
    """The best epoch so far: the one that certifies most images at one radius.

    Args:
        epsilons: radii of the certified accuracy (L2, pixels in [0, 1]); without any the smallest loss is best.
        from_epoch: epoch whose scores choose the radius, the largest that certifies `REACHED` of the images that are
            right, or the smallest of all; no epoch before is best. Default: the last radius is the one.
    """

    def __init__(self, epsilons: Sequence[float], from_epoch: int | None = None) -> None:
        self._epsilons, self._from_epoch = epsilons, from_epoch
        self._epsilon = epsilons[-1] if epsilons and from_epoch is None else None
        self._merit = -math.inf
        self._epoch: int | None = None
        self._due = 0

    def is_best(self, epoch: int, scores: Scores, loss: float) -> bool:
        """Note an epoch; return whether it is the best so far. Of equal ones the later is: its radii are larger.

        Args:
            epoch: counted from 0, in order.
            scores: of held-out images, or of the training images.
            loss: of the training images.
        """
        if self._from_epoch is not None and self._epsilon is None:
            if epoch < self._from_epoch:
                return False
            self._epsilon = reachable(scores, self._epsilons)
            log.info("from now on the epoch that certifies most held-out images at %g is kept", self._epsilon)
        merit = -loss if self._epsilon is None else scores.certified[self._epsilon]
        if merit < self._merit:
            return False
        self._merit, self._epoch = merit, epoch
        return True

    def due(self, epoch: int, patience: int) -> bool:
        """Return whether `patience` epochs have passed since the best one, or since the last time this was so.

        Args:
            epoch: the last one, counted from 0.
            patience: epochs.
        """
        if self._epoch is None or epoch - max(self._epoch, self._due) < patience:
            return False
        self._due = epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the content for a checkpoint."""
        return {"epsilon": self._epsilon, "merit": self._merit, "epoch": self._epoch, "due": self._due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the content of a checkpoint."""
        self._epsilon, self._merit = state["epsilon"], state["merit"]
        self._epoch, self._due = state["epoch"], state["due"]


def reachable(scores: Scores, epsilons: Sequence[float]) -> float:
    """Return the largest radius that certifies `REACHED` of the images that are right, or the smallest radius."""
    reached = [epsilon for epsilon in epsilons if scores.certified[epsilon] >= REACHED * scores.accuracy]
    return max(reached, default=min(epsilons))
