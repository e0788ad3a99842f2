"""Limits of one model: a size that a file declares is checked before an array of that size is made.

Sizes are limited one by one, and together: the work of reading and proving a model is counted before it is done, and
may be as large as the file is. It is counted in multiply-adds, not in seconds, so that a verdict is the same on every
machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.network.operators import Refusal, UnsupportedModelError

LARGEST_TENSOR = 1 << 24
"""Elements of a tensor of one image, or of a constant that is computed; the largest tensor of ResNet-50 at 224 x 224
has 8e5."""
LARGEST_WEIGHT = 1 << 28
"""Elements of a weight that the file holds."""
LARGEST_CONSTANT = 1 << 22
"""Elements of a constant that the file computes; of all of them, repetitions of numbers and copies of weights apart."""
COPIES_OF_WEIGHTS = 4
"""Computed constants may be that many times as large as all stored ones: casts and transpositions of weights."""
MOST_AXES = 32
MOST_NUMBERS = 4096
"""Integers in a list of axes, sizes, pads or bounds."""
MOST_OPERATORS = 20_000
LEAST_WORK = 2.0**30
"""Multiply-adds that any file may ask for: a second of one core, and less than 200 MB."""
WORK_OF_WEIGHT = 2.0**21
"""Multiply-adds that a file may ask for beside these, for each number that it holds."""
WORK_OF_NUMBER = 512.0
"""Multiply-adds that take as long as making one number of a tensor, with all that is proved of it."""
LONGEST_QUOTATION = 300
"""Characters of a message about a node."""


def size_error(elements: int, most: int) -> str:
    """Return the message about too many elements."""
    return f"too large to analyse: {elements} elements, at most {most}"


def limit_tensor(shape: Sequence[int]) -> None:
    """Refuse a tensor or constant before it is made.

    Raises:
        Refusal: it would have more than `LARGEST_TENSOR` elements or `MOST_AXES` axes.
    """
    limit_elements(shape, LARGEST_TENSOR)


def limit_elements(shape: Sequence[int], most: int) -> None:
    """Refuse an array before it is made.

    Raises:
        Refusal: it would have more than `most` elements or `MOST_AXES` axes.
    """
    if len(shape) > MOST_AXES:
        raise Refusal(f"{len(shape)} axes, at most {MOST_AXES}")
    if math.prod(shape) > most:
        raise Refusal(size_error(math.prod(shape), most))


def quoted(text: str | bytes, most: int = LONGEST_QUOTATION) -> str:
    """Return a text that a file wrote, or a part of it that fits into a message, on one line; bytes: no UTF-8."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    shown = "".join(c if c.isprintable() else "?" for c in text[:most])
    return shown if len(text) <= most else shown[: most - 3] + "..."


def allowed_work(weights: int) -> float:
    """Return the multiply-adds that a file may ask for which holds that many numbers, where nobody allows more."""
    return LEAST_WORK + WORK_OF_WEIGHT * weights


@dataclass
class Work:
    """Multiply-adds of one model, counted before they are done."""

    most: float
    done: float = 0.0

    def spend(self, amount: float, what: str) -> None:
        """Count some work.

        Args:
            amount: in multiply-adds.
            what: node or input that asks for it, for the message.

        Raises:
            UnsupportedModelError: it is too much, together with the work so far.
        """
        self.done += amount
        if self.done > self.most:
            raise UnsupportedModelError(
                [
                    f"{what}: too large to analyse: {self.done:.3g} multiply-adds so far, at most {self.most:.3g} for "
                    "a file of so few weights; allow more with --max-work (a server: LIPCERT_PROOF_WORK)"
                ]
            )
