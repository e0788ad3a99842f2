"""Texts of clients, and names of this server, as messages quote them: cut in one place."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

_QUOTED = 100
_LISTED = 1000


def shortened(text: object) -> str:
    """Return a text of a client as a message quotes it: its first 100 characters."""
    shown = str(text)
    return shown if len(shown) <= _QUOTED else f"{shown[:_QUOTED]}..."


def quoted(text: object) -> str:
    """Return a text of a client, shortened and in quotation marks, control characters escaped."""
    return repr(shortened(text))


def listed(names: Iterable[object]) -> str:
    """Return names of this server, separated by commas, as far as some 1,000 characters reach."""
    texts = [str(name) for name in names]
    shown = sum(end <= _LISTED for end in accumulate(len(text) + 2 for text in texts))
    return ", ".join(texts[:shown]) + (f" and {len(texts) - shown} more" if shown < len(texts) else "")
