"""Pace: the cost model of a forward pass, which decides how many workers share a batch."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from service.inference.classifier import Classifier
from service.runtime.provider import CUDA

# Largest share of a worker, in images.
_MOST_SHARE = 32
# Shortest forward pass for which a second worker pays, in seconds.
_LEAST_PASS_S = 0.003
# Work of a request beside its images, in seconds: HTTP, decoding and JSON. Measured answers correct it, see `Load`.
_REQUEST_S = 0.0003
# Images of the larger pass that is measured.
_SEVERAL = 8


@dataclass(frozen=True)
class Pace:
    """Cost model of a forward pass: `fixed_s + n * image_s` seconds for n images."""

    fixed_s: float
    """Fixed cost of a pass: reading the weights, and the interpreter."""
    image_s: float

    @functools.cached_property
    def alone_s(self) -> float:
        """Work of a request for one image, in seconds."""
        return _REQUEST_S + self.fixed_s + self.image_s

    @functools.cached_property
    def share(self) -> int:
        """Smallest number of images that justifies a pass on one more worker; at least 1.

        Their cost equals the fixed cost of the pass, and the pass takes longer than waking a worker, and longer than
        the answers of the previous pass take to bring the next requests.
        """
        if self.image_s <= 0.0:
            return 1
        efficient = min(_MOST_SHARE, self.fixed_s / self.image_s)
        long_enough = (_LEAST_PASS_S - self.fixed_s) / self.image_s
        return max(1, math.ceil(max(efficient, long_enough)))


def measure_pace(classifier: Classifier, beat: Callable[[float], None] = lambda _: None) -> Pace:
    """Return the pace of a model, from passes of one and of several black images; the first pass also loads the model.

    The two sizes take turns, and on the CPU the clock is the processor time of this thread: other work on the machine,
    and the event loop that holds the GIL, would make shares too small. On a GPU the thread waits.

    `beat` is called after each pass, with the seconds that the next one may be expected to take.
    """
    clock = time.perf_counter if classifier.provider == CUDA else time.thread_time
    view = classifier.view(classifier.input_shape)
    seconds = dict.fromkeys((1, _SEVERAL), math.inf)
    for is_warm in (False, True, True, True):
        for count in seconds:
            image_NCHW = np.zeros((count, *classifier.input_shape))
            start = clock()
            view.classify(image_NCHW)
            elapsed_s = clock() - start
            beat(_SEVERAL * elapsed_s)
            if is_warm:
                seconds[count] = min(seconds[count], elapsed_s)
    image_s = max((seconds[_SEVERAL] - seconds[1]) / (_SEVERAL - 1), seconds[1] / _MOST_SHARE)
    return Pace(max(seconds[1] - image_s, 0.0), image_s)
