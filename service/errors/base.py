"""The class of all domain errors."""

from __future__ import annotations


class LipcertError(Exception):
    """Base of all errors that this package raises deliberately; the message is one or two sentences for a person."""
