"""Limits of one analysis: beside the tensors of a network, whose sizes the reader limits."""

import math

MOST_ELEMENTS = 1 << 26
"""Elements of one array (512 MiB in float64)."""

MOST_ELEMENTS_TOGETHER = 1 << 28
"""Elements of all values that the operators of a network make; an analysis takes some 30 bytes for each."""


def fits(*shape: int) -> bool:
    """Return whether an array of this shape is within the limit."""
    return math.prod(shape) <= MOST_ELEMENTS
