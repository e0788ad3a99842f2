"""The result of a check: a conclusion with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Conclusion(Enum):
    """The three verdicts, in the words of the report."""

    HOLDS = "holds"
    """Every check succeeded."""
    DOES_NOT_HOLD = "does not hold"
    """At least one member of the answer contradicts the derivation, the files or another member."""
    UNDECIDED = "undecided"
    """No check failed, and at least one could not be decided."""


@dataclass(frozen=True)
class Finding:
    """A check that did not succeed; the reason begins with the member of the answer that it is about."""

    conclusion: Conclusion
    reason: str


def failed(reason: str) -> Finding:
    """Return the finding that the answer contradicts itself, a file or the derivation."""
    return Finding(Conclusion.DOES_NOT_HOLD, reason)


def undecided(reason: str) -> Finding:
    """Return the finding that a member is neither confirmed nor contradicted."""
    return Finding(Conclusion.UNDECIDED, reason)


def one_line(text: str) -> str:
    """Return a text with escapes for characters that are not printable, so that no member adds a line to a report."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def as_json(value: object) -> str:
    """Return a value of an answer as JSON writes it; text in quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)
