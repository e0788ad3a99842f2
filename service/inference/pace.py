"""TODO: service/inference/pace.py."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import numpy as np

from service.inference.classifier import Classifier

# See `Pace.share`.
_MOST_SHARE = 32
_LEAST_PASS_S = 0.003


@dataclass(frozen=True)
class Pace:
    """How long a pass of the network takes: `fixed_s + n * image_s` for n images."""

    fixed_s: float
    """What a pass costs however many images it has: the weights are read, and the interpreter has its share."""
    image_s: float

    @functools.cached_property
    def share(self) -> int:
        """Images for which it pays that one more worker runs a pass of its own; at least 1.

        The pass spends as much time on them as on itself, and takes longer than waking a worker, and than the answers
        to the pass before take to bring the next requests.
        """
        if self.image_s <= 0.0:
            return 1
        efficient = min(_MOST_SHARE, self.fixed_s / self.image_s)
        long_enough = (_LEAST_PASS_S - self.fixed_s) / self.image_s
        return max(1, math.ceil(max(efficient, long_enough)))


def measure_pace(classifier: Classifier) -> Pace:
    """The pace of a model, from passes of one and of four black images; the first pass also loads it."""
    view = classifier.view(classifier.input_shape)
    seconds: dict[int, float] = {}
    for count in (1, 4):
        image_NCHW = np.zeros((count, *classifier.input_shape))
        view.classify(image_NCHW)
        took: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            view.classify(image_NCHW)
            took.append(time.perf_counter() - start)
        seconds[count] = min(took)
    image_s = max((seconds[4] - seconds[1]) / 3.0, seconds[1] / _MOST_SHARE)
    return Pace(max(seconds[1] - image_s, 0.0), image_s)
