"""Sizes, language and docstrings of the product stay within the limits of `house.py`."""

from house import faults, measure


def test_every_module_class_and_docstring_is_within_the_limits() -> None:
    assert faults(measure(["service", "models"])) == []
