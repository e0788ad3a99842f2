"""The preprocessing of the service in exact rationals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

HALF = Fraction(1, 2)


def exact_filter(n_in: int, n_out: int) -> np.ndarray:
    """The definition, word for word, in rationals."""
    scale = Fraction(n_in, n_out)
    width = max(scale, Fraction(1))
    weights = np.empty((n_out, n_in), dtype=object)
    for j in range(n_out):
        row = [max(Fraction(0), 1 - abs((j + HALF) * scale - (k + HALF)) / width) for k in range(n_in)]
        weights[j] = [weight / sum(row) for weight in row]
    return weights


def exact_conversion(sent: int, taken: int) -> np.ndarray:
    """Matrix taken x sent of the conversion of channels."""
    if sent == taken:
        return np.array([[Fraction(int(c == d)) for c in range(sent)] for d in range(taken)], dtype=object)
    if (sent, taken) == (3, 1):
        return np.array([[Fraction("0.299"), Fraction("0.587"), Fraction("0.114")]], dtype=object)
    return np.array([[Fraction(1)]] * 3, dtype=object)


def exact_map(sent: tuple[int, int, int], taken: tuple[int, int, int]) -> np.ndarray:
    """The whole map as one rational matrix, flat images in C order."""
    rows, columns = exact_filter(sent[1], taken[1]), exact_filter(sent[2], taken[2])
    return np.kron(np.kron(exact_conversion(sent[0], taken[0]), rows), columns)
