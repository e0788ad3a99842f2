"""Limits of one model: a size that a file declares is checked before an array of that size is made."""

import math
from collections.abc import Sequence

from service.network.operators import Refusal

LARGEST_TENSOR = 1 << 24
"""Elements of a tensor of one image, or of a constant that is computed; the largest tensor of ResNet-50 at 224 x 224
has 8e5."""
LARGEST_WEIGHT = 1 << 28
"""Elements of a weight that the file holds."""
MOST_OPERATORS = 20_000
LONGEST_QUOTATION = 300
"""Characters of a message about a node."""


def size_error(elements: int, most: int) -> str:
    """Return the message about too many elements."""
    return f"too large to analyse: {elements} elements, at most {most}"


def limit_tensor(shape: Sequence[int]) -> None:
    """Refuse a tensor or constant before it is made.

    Raises:
        Refusal: it would have more than `LARGEST_TENSOR` elements.
    """
    if math.prod(shape) > LARGEST_TENSOR:
        raise Refusal(size_error(math.prod(shape), LARGEST_TENSOR))


def quoted(text: str, most: int = LONGEST_QUOTATION) -> str:
    """Return a text that a file wrote, or a part of it that fits into a message."""
    return text if len(text) <= most else text[: most - 3] + "..."
