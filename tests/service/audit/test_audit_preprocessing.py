"""The input of the model: the stated map of the image that was sent, in exact numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from audit_cases import DIGITS, rational, rational_pixels
from flint import ctx

from service.audit.images import SentImage
from service.audit.preprocessing import preprocess


def naive_triangle(n: int, m: int) -> np.ndarray:
    scale, half = Fraction(n, m), Fraction(1, 2)
    width = max(scale, Fraction(1))
    rows = [[max(Fraction(0), 1 - abs((j + half) * scale - (k + half)) / width) for k in range(n)] for j in range(m)]
    return np.array([[weight / sum(row) for weight in row] for row in rows], dtype=object)


@pytest.mark.parametrize(("sent", "seen"), [((1, 5, 4), (1, 3, 7)), ((3, 2, 9), (1, 2, 4)), ((1, 4, 4), (3, 2, 5))])
def test_the_input_of_the_model_is_the_stated_map(sent: tuple[int, int, int], seen: tuple[int, int, int]) -> None:
    ctx.prec = DIGITS
    pixels = np.random.default_rng(0).integers(0, 256, sent)
    x = rational_pixels(pixels)
    if sent[0] == 3 and seen[0] == 1:
        x = (Fraction(299, 1000) * x[0] + Fraction(587, 1000) * x[1] + Fraction(114, 1000) * x[2])[None]
    rows, columns = naive_triangle(sent[1], seen[1]), naive_triangle(sent[2], seen[2])
    expected = np.array([rows @ plane @ columns.T for plane in x])
    if seen[0] == 3 and sent[0] == 1:
        expected = np.repeat(expected, 3, axis=0)
    found = preprocess(SentImage(sent, pixels.ravel().tolist(), 255, ""), seen)
    for ball, value in zip(found.pixels, expected.ravel(), strict=True):
        assert abs(rational(ball.mid()) - value) <= rational(ball.rad())
    channels = {(3, 1): np.array([[0.299, 0.587, 0.114]]), (1, 3): np.ones((3, 1))}.get(
        (sent[0], seen[0]), np.eye(sent[0])
    )
    norm = np.linalg.norm(np.kron(channels, np.kron(rows.astype(float), columns.astype(float))), 2)
    assert norm * (1 - 1e-14) <= float(found.norm) <= norm * (1 + 1e-12)
