"""TODO: models/training/errors.py."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot start or go on; the message says what to do."""


class CheckpointError(TrainingError):
    """The disk is full, or the folder of the checkpoints cannot be written to."""


class NonFiniteError(TrainingError):
    """The loss or a weight became NaN or infinite."""


class Interrupted(Exception):
    """Training was stopped by the user; its state is in the checkpoint named in the message."""
