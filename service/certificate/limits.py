"""Limits of one analysis: a size that a file declares is checked before an array of that size is made."""

import math

MOST_ELEMENTS = 1 << 26
"""Elements of one array (512 MiB in float64); the largest tensor of ResNet-50 at 224 x 224 has 8e5."""

MOST_ELEMENTS_TOGETHER = 1 << 28
"""Elements of all values that the nodes of a graph make; an analysis takes some 30 bytes for each."""


def fits(*shape: int) -> bool:
    """Return whether an array of this shape is within the limit."""
    return math.prod(shape) <= MOST_ELEMENTS


def size_error(elements: int, most: int | None = None) -> str:
    """Return the message about too many elements; default: of one array."""
    return f"too large to analyse: {elements} elements, at most {MOST_ELEMENTS if most is None else most}"
