"""Moves of whole planes: what a Gather over all elements, and a mask of 0 and 1, do to the channels of a tensor.

A shift of channels takes from each plane of P pixels the pixels at one distance, and zeros beyond the border. So it
is the same as: order the planes so that equal distances are neighbours, roll each such run as one row of numbers, and
multiply by the mask. Runs are copied as a whole; a Gather copies number by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class PlaneMoves:
    """A map of C planes of P numbers: `y[d, p] = mask[d, p] x[source[d], p + distance[d]]`, no plane taken twice."""

    source: np.ndarray
    """Of each result plane d, `int64 (C,)`: a permutation."""
    distance: np.ndarray
    """In numbers, `int64 (C,)`."""
    mask: np.ndarray
    """0 or 1, `float (C, P)`."""

    @property
    def of_source(self) -> np.ndarray:
        """Distance of each plane of x, `int64 (C,)`."""
        found = np.empty_like(self.distance)
        found[self.source] = self.distance
        return found


def plane_moves(positions: np.ndarray, mask: np.ndarray, channels: int) -> PlaneMoves | None:
    """Return what a Gather and a mask do to planes; null where they do something else.

    Args:
        positions: of the Gather, `int64 (C P,)`.
        mask: factors of its result, `float (C P,)`.
        channels: C.
    """
    if positions.size % channels or not ((mask == 0.0) | (mask == 1.0)).all():
        return None
    planes = positions.reshape(channels, -1)
    kept, pixels = mask.reshape(planes.shape) != 0.0, planes.shape[1]
    if not kept.any(axis=1).all():
        return None
    source = (planes // pixels)[np.arange(channels), kept.argmax(axis=1)]
    ahead = planes - (source[:, None] * pixels + np.arange(pixels))
    distance = ahead[np.arange(channels), kept.argmax(axis=1)]
    # The whole statement, number by number: nothing below is assumed of the Gather.
    inside = (np.arange(pixels) + distance[:, None] >= 0) & (np.arange(pixels) + distance[:, None] < pixels)
    if ((ahead != distance[:, None]) & kept).any() or (kept & ~inside).any():
        return None
    if (np.bincount(source, minlength=channels) != 1).any():
        return None
    return PlaneMoves(source, distance, mask.reshape(planes.shape))


@dataclass(frozen=True)
class Roll:
    """Runs of planes, each rolled as one row: the parts of a row, and the order in which they are put together."""

    sizes: tuple[int, ...]
    """Of the parts, which follow each other in the row."""
    order: tuple[int, ...]
    """Parts in the order of the result."""

    def applied(self, row: np.ndarray) -> np.ndarray:
        """Return the parts of a row in the order of the result."""
        parts = np.split(row, np.cumsum(self.sizes)[:-1])
        return np.concatenate([parts[part] for part in self.order])


def rolled(distances: Sequence[int], pixels: int) -> Roll:
    """Return the roll of consecutive planes: each number comes from `distance` numbers ahead, in the same run.

    Args:
        distances: of the planes, in their order.
        pixels: numbers of a plane.
    """
    sizes: list[int] = []
    order: list[int] = []
    for first, stop in runs(distances):
        length = (stop - first) * pixels
        ahead = distances[first] % length
        parts = [part for part in (ahead, length - ahead) if part]
        order += reversed(range(len(sizes), len(sizes) + len(parts)))
        sizes += parts
    return Roll(tuple(sizes), tuple(order))


def runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop of each longest run of equal values."""
    cuts = [0, *(k for k in range(1, len(values)) if values[k] != values[k - 1]), len(values)]
    return list(pairwise(cuts))


def is_same_map(moves: PlaneMoves, order: np.ndarray, row: np.ndarray) -> bool:
    """Return whether a row of positions, masked, holds the planes of the moves, sorted by `order`.

    Args:
        moves: what has to be computed.
        order: of the planes of x in the row, `int64 (C,)`.
        row: for each number of the row the number of x that it is, `int64 (C P,)`.
    """
    channels, pixels = moves.mask.shape
    result = np.argsort(moves.source)[order]
    wanted = (moves.source * pixels + moves.distance)[result, None] + np.arange(pixels)
    return bool(((row.reshape(channels, pixels) == wanted) | (moves.mask[result] == 0.0)).all())
