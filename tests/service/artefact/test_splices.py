"""Splices: a graph from pieces of a file, byte for byte."""

from __future__ import annotations

from time import process_time

import numpy as np
import pytest

from service.artefact.splices import Range, Splice

RANDOM = np.random.default_rng(0)
SINGLE = RANDOM.standard_normal(1000).astype(np.float32)
DOUBLE = RANDOM.standard_normal(1000)


def test_arrays_of_the_file_become_ranges_and_the_rest_stays() -> None:
    file = b"head" + SINGLE.tobytes() + b"between" + DOUBLE.tobytes()
    wide = SINGLE.astype(np.float64)
    other = RANDOM.standard_normal(1000)
    graph = b"a" + wide.tobytes() + b"b" + other.tobytes() + b"c" + DOUBLE.tobytes() + b"d" + wide[:4].tobytes()
    splice = Splice.of(graph, [wide, wide[:4], DOUBLE, other], file)
    ranges = [piece for piece in splice.pieces if isinstance(piece, Range)]
    assert ranges == [Range(4, 4000, widened=True), Range(4 + 4000 + 7, 8000, widened=False)]
    assert splice.join(file) == graph


def test_a_number_that_float32_does_not_hold_is_not_widened() -> None:
    wide = SINGLE.astype(np.float64)
    wide[17] += 2.0**-40
    splice = Splice.of(wide.tobytes(), [wide], SINGLE.tobytes())
    assert splice.pieces == (wide.tobytes(),)


def test_signs_of_zeros_are_those_of_the_graph() -> None:
    zeros = np.zeros(1000)
    zeros[::2] = -0.0
    graph = zeros.tobytes()
    assert (
        Splice.of(graph, [zeros], np.zeros(1000, np.float32).tobytes()).join(np.zeros(1000, np.float32).tobytes())
        == graph
    )


def test_a_prefix_that_stands_elsewhere_too_is_no_match() -> None:
    file = DOUBLE[:64].tobytes() + b"x" + DOUBLE.tobytes()
    splice = Splice.of(DOUBLE.tobytes(), [DOUBLE], file)
    assert splice.join(file) == DOUBLE.tobytes()
    assert splice.pieces == (b"", Range(513, 8000, widened=False), b"")


def test_zeros_before_an_array_are_not_compared_one_by_one() -> None:
    first, second = np.zeros(100_000), np.zeros(100_000)
    second[-1] = 1.0
    graph = first.tobytes() + second.tobytes()
    started = process_time()
    assert Splice.of(graph, [first, second], graph).join(graph) == graph
    assert process_time() - started < 2.0


def test_another_file_is_refused() -> None:
    splice = Splice.of(DOUBLE.tobytes(), [DOUBLE], DOUBLE.tobytes())
    with pytest.raises(ValueError, match="not made of this file"):
        splice.join((DOUBLE + 1.0).tobytes())
