"""Sources of answers: a server or a model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.api.schema import PredictAnswer


class RefusedError(Exception):
    """A file that is not answered, with the reason for its row."""


class SourceError(Exception):
    """No file can be answered."""


@dataclass(frozen=True)
class About:
    """The model that answers."""

    name: str
    labels: Sequence[str]
    accuracy: float | None
    """Share of the test images that it classifies right, from its card."""


class Source(Protocol):
    """Answers images; several threads may ask at once."""

    about: About
    workers: int
    """Files to ask about at the same time."""
    most_bytes: int
    """Of a file."""

    def answer(self, content: bytes) -> PredictAnswer:
        """Return the answer about an image file or an npy file; raises `RefusedError`."""
        ...
