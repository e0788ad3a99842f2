"""Every input that a fuzzer kept, and every input that once was a defect, on every run of the tests."""

from __future__ import annotations

import pytest
from run import NAMES, read_corpus
from targets import TARGETS


@pytest.mark.parametrize("name", NAMES)
def test_an_input_of_the_corpus_is_answered_or_refused(name: str) -> None:
    for data in read_corpus(name).values():
        TARGETS[name](data)


def test_each_target_has_a_corpus() -> None:
    assert set(NAMES) == set(TARGETS)
    assert all(read_corpus(name) for name in NAMES)
