"""Attacks within a budget of time: an estimate before they start, and an end when the time is used up.

Axes: N images, M attacked images, G images of a group, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from models.evaluation import attacks as attacking
from models.evaluation.attacks import AttackResult
from models.evaluation.partial import PartialResults
from models.evaluation.tasks import InProcess, Runner
from service.inference.classifier import Classifier

log = logging.getLogger(__name__)

GROUPS = (1, 1, 2, 4, 8)
"""Images that are attacked together within a budget, in this order; the last number repeats. The first is attacked in
any case."""
PASSES = 5000
"""Gradient passes that cost as much as all attacks on one image: 2,700 for `malaria-cells`, 6,500 for `mnist`."""
_TIMED = 32
"""Images of the pass that is timed for the estimate."""


@dataclass(frozen=True)
class Attacked:
    """Results of attacks on some of the images."""

    index_M: Int64[np.ndarray, " M"]
    """Of the attacked images, rising."""
    results: list[AttackResult]
    """Of each attack, about these images."""
    seconds: float


def attack_within(
    classifier: Classifier,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    best_N: Float64[np.ndarray, " N"],
    seconds: float | None,
    *,
    cache: PartialResults | None = None,
    settings: Mapping[str, Any] | None = None,
    runner: Runner | None = None,
) -> Attacked:
    """Attack all images, or groups of them (`GROUPS`) until the time is used up; log an estimate first.

    Every beginning of the order of the groups is spread over the images. A group starts if its time fits into the rest,
    by the time of an image in the groups before it; after the first group as many start together as the runner is wide.

    Args:
        classifier: as it is served.
        image_NCHW: pixels in [0, 1].
        best_N: their largest proved radii.
        seconds: the budget; null: no limit.
        cache: of finished parts, see `attacks.run_attacks`.
        settings: see there.
        runner: see there.

    Raises:
        AttacksMissingError, CertificateRefutedError: see `attacks.run_attacks`.
    """
    attacking.require_libraries()
    runner = runner or InProcess(classifier)
    expected = estimated_seconds(classifier, image_NCHW) / runner.width
    _say(expected, len(image_NCHW), seconds)
    started = time.monotonic()
    if seconds is None:
        results = attacking.run_attacks(classifier, image_NCHW, best_N, cache=cache, settings=settings, runner=runner)
        return Attacked(np.arange(len(image_NCHW)), results, time.monotonic() - started)
    parts, indices, groups = list[list[AttackResult]](), list[np.ndarray](), groups_of(len(image_NCHW))
    together = groups[:1]
    while together:
        begun, indices_M = time.monotonic(), np.concatenate(together)
        found = attacking.run_attacks(
            classifier,
            image_NCHW[indices_M],
            best_N[indices_M],
            cache=cache,
            settings=settings,
            progress=False,
            runner=runner,
            groups=np.split(np.arange(len(indices_M)), np.cumsum([len(group) for group in together])[:-1]),
        )
        parts.append(found)
        indices.append(indices_M)
        groups = groups[len(together) :]
        # Time of one image in one process, at most: how long each was busy is not known.
        at_once = min(runner.width, len(found) * len(together))
        per_image = (time.monotonic() - begun) * at_once / len(indices_M)
        left = seconds - (time.monotonic() - started)
        together = _fitting(groups[: runner.width], per_image, left)
    index_M = np.concatenate(indices)
    rising_M = np.argsort(index_M)
    used = time.monotonic() - started
    log.info("attacked %d of %d images in %.0f s of %.0f s", len(index_M), len(image_NCHW), used, seconds)
    return Attacked(index_M[rising_M], [_joined(of_one, rising_M) for of_one in zip(*parts, strict=True)], used)


def estimated_seconds(classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"]) -> float:
    """Return the estimated time of all attacks on the images, from one gradient pass that is timed here."""
    some_NCHW = image_NCHW[:_TIMED]
    weights_NK = np.zeros((len(some_NCHW), len(classifier.labels)))
    classifier.margin_gradient(some_NCHW, weights_NK)
    started = time.monotonic()
    classifier.margin_gradient(some_NCHW, weights_NK)
    return PASSES * (time.monotonic() - started) / max(len(some_NCHW), 1) * len(image_NCHW)


def groups_of(n: int) -> list[Int64[np.ndarray, " G"]]:
    """Return the numbers below n in groups of the sizes `GROUPS`, in the order of `spread_order`."""
    order_N, groups, start = spread_order(n), list[np.ndarray](), 0
    while start < n:
        size = GROUPS[min(len(groups), len(GROUPS) - 1)]
        groups.append(order_N[start : start + size])
        start += size
    return groups


def spread_order(n: int) -> Int64[np.ndarray, " N"]:
    """Return the numbers below n in the order of their reversed bits: every beginning is spread over all of them."""
    bits = max(1, (n - 1).bit_length())
    reversed_N = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(n)]
    return np.argsort(reversed_N, kind="stable")


def _fitting(groups: list[np.ndarray], per_image: float, seconds: float) -> list[np.ndarray]:
    return list(takewhile(lambda group: len(group) * per_image <= seconds, groups))


def _say(expected: float, n: int, seconds: float | None) -> None:
    if seconds is None:
        log.info(
            "attacks on %d images: about %s; --attack-seconds S ends them earlier, --n-attack N takes fewer images",
            n,
            duration(expected),
        )
    else:
        fitting = min(n, max(1, int(n * seconds / max(expected, 1e-9))))
        log.info(
            "attacks on %d images: about %s; within --attack-seconds %g about %d of them",
            n,
            duration(expected),
            seconds,
            fitting,
        )


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _joined(parts: tuple[AttackResult, ...], rising_M: np.ndarray) -> AttackResult:
    return replace(
        parts[0],
        distance_N=np.concatenate([part.distance_N for part in parts])[rising_M],
        radius_N=np.concatenate([part.radius_N for part in parts])[rising_M],
        best_N=np.concatenate([part.best_N for part in parts])[rising_M],
    )
