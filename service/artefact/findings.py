"""Findings: the result of verifying an artefact.

They travel from the verifying process to the server (`service.artefact.pool`), so nothing here needs the libraries of
a proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.artefact.splices import Splice
from service.certificate import Certificate
from service.errors import ArtefactError


@dataclass(frozen=True)
class Verified:
    """Proved and computed facts about a model."""

    certificate: Certificate
    """Of the network that `model.onnx` is read as."""
    logits_NK: np.ndarray
    """Of `service.artefact.engines.probe`, computed on the CPU."""
    forward: Splice
    """The graph of the logits, written from that network."""
    gradient: Splice
    """The graph of logits and gradient, written from that network."""
    largest: int = 1
    """Numbers in the largest tensor of one image."""


@dataclass(frozen=True)
class Findings:
    """Facts about the model in a folder, from one reading of `model.onnx`."""

    read_digest: str | None
    """`sha256:<hex>` of the bytes that were verified; null where they could not be read."""
    verified: Verified | None
    fault: tuple[Path, str] | None = None
    """The file that is at fault, and why; without it, `verified` is there."""

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of `model.onnx`, whose bytes the certificate is about.

        Raises:
            ArtefactError: it could not be read.
        """
        if self.read_digest is None:
            raise ArtefactError(*(self.fault or (Path(), "it was not verified")))
        return self.read_digest

    def facts(self) -> Verified:
        """Return the facts; raises `ArtefactError` where there is a fault."""
        if self.verified is None:
            raise ArtefactError(*(self.fault or (Path(), "it was not verified")))
        return self.verified
