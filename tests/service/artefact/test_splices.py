"""Splices: a graph from pieces of a file, byte for byte."""

from __future__ import annotations

import numpy as np

from service.artefact.splices import Range, Ranges, Splice
from service.network.writer import joined

RANDOM = np.random.default_rng(0)
SINGLE = RANDOM.standard_normal(1000).astype(np.float32)
DOUBLE = RANDOM.standard_normal(1000)


def test_arrays_of_the_file_become_ranges_and_the_rest_stays() -> None:
    file = b"head" + SINGLE.tobytes() + b"between" + DOUBLE.tobytes()
    wide = SINGLE.astype(np.float64)
    other = RANDOM.standard_normal(1000)
    pieces = [b"a", wide, b"b", other, b"c", DOUBLE, b"d", wide[:4], b"e", SINGLE]
    splice = Splice.of(pieces, Ranges.in_file(file, [SINGLE, DOUBLE]))
    single, double = Range(4, 4000, widened=True), Range(4 + 4000 + 7, 8000, widened=False)
    expected = (b"a", single, b"b", other.tobytes(), b"c", double, b"d", wide[:4].tobytes(), b"e")
    assert splice.pieces == (*expected, Range(4, 4000, widened=False))
    assert splice.join(file) == joined(pieces)


def test_a_number_that_float32_does_not_hold_is_not_widened() -> None:
    wide = SINGLE.astype(np.float64)
    wide[500] += 2.0**-40
    splice = Splice.of([wide], Ranges.in_file(SINGLE.tobytes(), [SINGLE]))
    assert splice.pieces == (wide.tobytes(),)


def test_signs_of_zeros_are_those_of_the_graph() -> None:
    zeros = np.zeros(1000)
    zeros[::2] = -0.0
    file = np.zeros(1000, np.float32).tobytes()
    splice = Splice.of([zeros], Ranges.in_file(file, [np.zeros(1000, np.float32)]))
    assert splice.join(file) == zeros.tobytes()


def test_a_beginning_that_stands_elsewhere_too_is_no_match() -> None:
    file = DOUBLE[:64].tobytes() + b"x" + DOUBLE.tobytes()
    splice = Splice.of([DOUBLE], Ranges.in_file(file, [DOUBLE]))
    assert splice.join(file) == DOUBLE.tobytes()
    assert splice.pieces == (Range(513, 8000, widened=False),)


def test_an_array_that_the_file_does_not_hold_stays() -> None:
    splice = Splice.of([DOUBLE], Ranges.in_file(b"another format", [DOUBLE]))
    assert splice.pieces == (DOUBLE.tobytes(),)


def test_zeros_before_an_array_are_not_compared_one_by_one() -> None:
    first, second = np.zeros(100_000), np.zeros(100_000)
    second[-1] = 1.0
    # Twice as many zeros as the file is said to hold.
    file = np.zeros(100_000).tobytes() + first.tobytes() + second.tobytes()
    splice = Splice.of([first, second], Ranges.in_file(file, [first, second]))
    assert splice.pieces == (Range(0, 800_000, widened=False), second.tobytes())
    assert splice.join(file) == joined([first, second])
