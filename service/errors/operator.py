"""Errors that are about this machine, its settings and its files, and not about a request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from service.errors.base import LipcertError

_LINE = 500
"""Characters of the reason why a model is not served."""


class ArtefactError(LipcertError):
    """A file of an artefact is missing, damaged or cannot be proved."""

    def __init__(self, file: Path, reason: str) -> None:
        self.file = file
        self.reason = reason
        super().__init__(f"{file}: {reason}")

    @property
    def line(self) -> str:
        """The reason in one line of bounded length."""
        words = " ".join(self.reason.split())
        return words if len(words) <= _LINE else f"{words[: _LINE - 3]}..."


class ProviderError(LipcertError):
    """The requested execution provider is not available on this machine."""


class SettingsError(LipcertError):
    """A `LIPCERT_*` variable is unknown or has an invalid value."""


class PortError(LipcertError):
    """The address to listen on is in use, not of this machine, or not permitted."""

    def __init__(self, host: str, port: int, cause: OSError) -> None:
        super().__init__(
            f"port {port} of {host} is not available ({cause.strerror or cause}); stop the process that uses it, or "
            "set LIPCERT_PORT, LIPCERT_GRPC_PORT or LIPCERT_HOST"
        )


class ClusterError(LipcertError):
    """Ray does not serve, or one of its replicas is not healthy."""


class KeptError(LipcertError):
    """A file of an audit, or a path of an evidence folder, is missing or of another kind than expected."""


class ImportRefusedError(LipcertError):
    """An ONNX file cannot become an artefact; nothing was written.

    Attributes:
        reasons: all that stands in the way, one line each.
    """

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = tuple(" ".join(reason.split()) for reason in reasons)
        super().__init__("\n".join(self.reasons))
