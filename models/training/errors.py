"""Errors that end a training; each message says what to do."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot start or continue."""


class CheckpointError(TrainingError):
    """The disk is full, or the folder of the checkpoints cannot be written to."""


class NonFiniteError(TrainingError):
    """The loss or a weight became NaN or infinite."""


class Interrupted(Exception):
    """The user stopped the training; its state is in the checkpoint named in the message."""
