"""Limits and deadlines of connections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits and deadlines of each connection, and of all connections of a process."""
