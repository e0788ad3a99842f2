"""Verification of an artefact before it is served: proof of `model.onnx`, and both graphs run on the CPU.

A server does this in other processes (`service.artefact.pool`): the libraries and the memory of a proof never enter it.
"""

from __future__ import annotations

from pathlib import Path

from service.artefact.engines import agreed_logits, load_engine
from service.artefact.files import GRAPH_FILES, MODEL_FILE, TRANSPORT_FILE, digest, read_file
from service.artefact.findings import Findings, Verified
from service.certificate import UnsupportedGraphError, certify
from service.errors import ArtefactError


def verify(folder: Path) -> Findings:
    """Read, prove and run the graphs in `folder`; a fault is in the findings, not raised.

    The graphs run on the CPU also where a GPU will serve them: whatever fails there alone is a fault of the GPU.
    """
    contents: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    try:
        for file in GRAPH_FILES:
            contents[file] = read_file(folder / file)
            digests[file] = digest(contents[file])
        return Findings(digests, verify_graphs(folder, contents[MODEL_FILE], contents[TRANSPORT_FILE]))
    except ArtefactError as error:
        return Findings(digests, None, (error.file, error.reason))


def verify_graphs(folder: Path, model_bytes: bytes, transport_bytes: bytes) -> Verified:
    """Prove `model.onnx` and run both graphs.

    Args:
        folder: of the artefact, for messages.
        model_bytes: content of `model.onnx`.
        transport_bytes: content of `transport.onnx`, which carries no proof.

    Raises:
        ArtefactError: the model has no proof, a graph cannot be run, or `transport.onnx` has other inputs and outputs
            than it must have or belongs to another network.
    """
    try:
        certificate = certify(model_bytes)
    except UnsupportedGraphError as error:
        raise ArtefactError(
            folder / MODEL_FILE,
            f"the graph has no proved Lipschitz bound, so it is not served: {error}\n"
            "Change the network to operators that the certifier knows, and export it again.",
        ) from error
    model = load_engine(folder / MODEL_FILE, model_bytes, "cpu", 1)
    transport = load_engine(folder / TRANSPORT_FILE, transport_bytes, "cpu", 1)
    inputs, outputs = set(transport.input_names), set(transport.output_names)
    if inputs != {"image", "margin_weights"} or outputs != {"logits", "gradient"}:
        raise ArtefactError(
            folder / TRANSPORT_FILE,
            f"the graph has inputs {sorted(inputs)} and outputs {sorted(outputs)}; it must take `image` and "
            "`margin_weights` and give `logits` and `gradient`. Export the artefact again.",
        )
    return Verified(certificate, agreed_logits(folder, model, transport, certificate))
