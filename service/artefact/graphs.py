"""The two graphs of an artefact: their files, the digests that name them, what was found out about them, and whether
they are of one network.

What is found travels between processes, see `service.artefact.proving`; so nothing here needs the prover's libraries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from service.certificate import Certificate
from service.errors import ArtefactError
from service.runtime.engine import Engine, Runs
from service.runtime.fixed_batches import GraphError

MODEL_FILE: Literal["model.onnx"] = "model.onnx"
TRANSPORT_FILE: Literal["transport.onnx"] = "transport.onnx"
GRAPH_FILES = (MODEL_FILE, TRANSPORT_FILE)


@dataclass(frozen=True)
class Findings:
    """What was found out about the graphs in a folder, from one reading of each file."""

    digests: dict[str, str]
    """By file name; of the bytes that everything else here is about. A file that could not be read is missing."""
    certificate: Certificate | None
    """None where something is wrong."""
    run: bool
    """Whether both graphs were run, on the CPU, and agreed."""
    fault: tuple[Path, str] | None = None
    """What is wrong, and with which file."""

    def proof(self) -> Certificate:
        """The certificate; raises `ArtefactError` where something is wrong."""
        if self.fault is not None or self.certificate is None:
            raise ArtefactError(*(self.fault or (Path(), "nothing was found out about it")))
        return self.certificate


def digest(content: bytes) -> str:
    """`sha256:<hex>` of `content`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def read_file(path: Path) -> bytes:
    """The bytes of a file of an artefact; raises `ArtefactError` where they cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ArtefactError(
            path,
            f"the file is missing. An artefact is a folder with {MODEL_FILE}, {TRANSPORT_FILE} and "
            "card.json; copy it whole, or export it again.",
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ArtefactError(path, f"the file cannot be read ({reason}). Check its permissions.") from error


def read_again(path: Path, expected: str) -> Callable[[], bytes]:
    """Read a file a second time, later, and only as the bytes of the digest `expected`.

    What is returned raises `ArtefactError` where the file is another one by then.
    """

    def read() -> bytes:
        content = read_file(path)
        found = digest(content)
        if found != expected:
            raise ArtefactError(
                path,
                f"the file has the digest {found}; when the server started, it was {expected}, and only that was "
                "proved. Put the file back, or start the server again.",
            )
        return content

    return read


def load_engine(path: Path, content: bytes, provider: Literal["cpu", "cuda"], threads: int) -> Engine:
    """`Engine` of the graph in a file whose bytes are `content`; raises `ArtefactError` if it cannot be run."""
    try:
        return Engine(content, provider, threads)
    except GraphError as error:
        raise ArtefactError(
            path, f"ONNX Runtime cannot run the graph ({error}). Export it with operators it has."
        ) from error


def check_agreement(folder: Path, model: Runs, transport: Runs, certificate: Certificate) -> None:
    """Both graphs must be of one network; otherwise no counterfactual would ever be reached.

    Raises:
        ArtefactError: they give other logits for one and the same image, or cannot be run.
    """
    path = folder / TRANSPORT_FILE
    image_NCHW = np.linspace(0.0, 1.0, int(np.prod(certificate.input_shape))).reshape(1, *certificate.input_shape)
    weights_NK = np.zeros((1, certificate.n_outputs))
    weights_NK[0, 0] = 1.0
    try:
        (logits_NK,) = model.run(model.output_names[:1], {model.input_names[0]: image_NCHW})
        transport_NK, gradient_NCHW = transport.run(
            ("logits", "gradient"), {"image": image_NCHW, "margin_weights": weights_NK}
        )
    except Exception as error:  # Whatever the runtime raises, the artefact cannot be served.
        raise ArtefactError(
            path, f"model.onnx or transport.onnx cannot be run ({error}). Export the artefact again."
        ) from error
    tolerance = 4.0 * certificate.logit_error + 1e-5 * (1.0 + np.abs(logits_NK).max())
    if (
        transport_NK.shape != logits_NK.shape
        or gradient_NCHW.shape != image_NCHW.shape
        or not np.allclose(transport_NK, logits_NK, rtol=0.0, atol=tolerance)
    ):
        raise ArtefactError(
            path, "its logits are not those of model.onnx, so it belongs to another network. Export both together."
        )
