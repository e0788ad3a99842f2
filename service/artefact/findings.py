"""Findings: the result of verifying the graphs of an artefact.

They travel from the verifying process to the server (`service.artefact.pool`), so nothing here needs the libraries of
a proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.artefact.files import MODEL_FILE
from service.certificate import Certificate
from service.errors import ArtefactError


@dataclass(frozen=True)
class Verified:
    """Proved and computed facts about both graphs."""

    certificate: Certificate
    """Of `model.onnx`, derived from its bytes."""
    logits_NK: np.ndarray
    """Of `service.artefact.engines.probe`, computed by `model.onnx` on the CPU; `transport.onnx` agrees."""


@dataclass(frozen=True)
class Findings:
    """Facts about the graphs in a folder, from one reading of each file."""

    digests: dict[str, str]
    """By file name; of the bytes that were verified. A file that could not be read is missing."""
    verified: Verified | None
    fault: tuple[Path, str] | None = None
    """The file that is at fault, and why; without it, `verified` is there."""

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of `model.onnx`, whose bytes the certificate is about."""
        return self.digests[MODEL_FILE]

    def facts(self) -> Verified:
        """Return the facts; raises `ArtefactError` where there is a fault."""
        if self.verified is None:
            raise ArtefactError(*(self.fault or (Path(), "it was not verified")))
        return self.verified
