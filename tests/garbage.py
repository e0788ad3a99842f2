"""Garbage in cycles: the service collects it rarely, so that requests must not leave it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep garbage, as the service does between two collections."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def count(*kinds: type) -> int:
    """Objects of these types, garbage included."""
    return sum(issubclass(type(found), kinds) for found in gc.get_objects())
