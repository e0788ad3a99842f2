"""Matrices in exact rationals."""

from fractions import Fraction

import numpy as np


def exceeds_norm(bound: float, matrix: np.ndarray) -> bool:
    """Whether `bound >= ||matrix||`, decided in rationals: `bound^2 I - W^T W` is positive semidefinite.

    By Sylvester's inertia: symmetric elimination (LDL^T) with exact pivots, none of which may be negative.
    """
    w = np.vectorize(Fraction, otypes=[object])(matrix)
    gram = -(w.T @ w)
    for i in range(len(gram)):
        gram[i, i] += Fraction(bound) ** 2
    rest = list(range(len(gram)))
    while rest:
        pivot = max(rest, key=lambda i: gram[i, i])
        if gram[pivot, pivot] < 0:
            return False
        rest.remove(pivot)
        if gram[pivot, pivot] == 0:
            if any(gram[i, pivot] != 0 for i in rest):
                return False
            continue
        for i in rest:
            factor = gram[i, pivot] / gram[pivot, pivot]
            for j in rest:
                gram[i, j] -= factor * gram[pivot, j]
        if any(gram[i, i] < 0 for i in rest):
            return False
    return True
