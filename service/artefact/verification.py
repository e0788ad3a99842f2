"""Verification of an artefact before it is served: `model.onnx` read, proved, written, and run on the CPU.

The network that is proved is the one that is written: the graph of the logits and the graph of their gradient. Bytes
that somebody else wrote never reach the runtime. A server does this in other processes (`service.artefact.pool`): the
libraries and the memory of a proof never enter it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.artefact.engines import gradient_outputs, load_engine, model_logits, probe
from service.artefact.files import MODEL_FILE, digest, read_file
from service.artefact.findings import Findings, Verified
from service.artefact.splices import Ranges, Splice
from service.certificate import certify
from service.certificate.proof_limits import NO_LIMITS, ProofLimits, within
from service.errors import ArtefactError
from service.network.graphs import forward_graph, gradient_graph
from service.network.operators import UnsupportedModelError
from service.network.reader import read_draft


def verify(folder: Path, limits: ProofLimits = NO_LIMITS) -> Findings:
    """Read, prove and run the model in `folder`, each proof within `limits`; a fault is in the findings, not raised.

    The graphs run on the CPU also where a GPU will serve them: whatever fails there alone is a fault of the GPU.
    """
    found = None
    try:
        model_bytes = read_file(folder / MODEL_FILE)
        found = digest(model_bytes)
        return Findings(found, verify_model(folder, model_bytes, limits))
    except ArtefactError as error:
        return Findings(found, None, (error.file, error.reason))


def verify_model(folder: Path, model_bytes: bytes, limits: ProofLimits = NO_LIMITS) -> Verified:
    """Prove `model.onnx`, and run the graphs that are written from it.

    Args:
        folder: of the artefact, for messages.
        model_bytes: content of `model.onnx`.
        limits: of the proof.

    Raises:
        ArtefactError: the model has no proof within the limits, or a graph cannot be run.
    """
    path = folder / MODEL_FILE
    try:
        with within(limits):
            draft = read_draft(model_bytes, limits.work)
            certificate = certify(draft)
            network = draft.network()
            graphs = forward_graph(network), gradient_graph(network)
    except UnsupportedModelError as error:
        raise ArtefactError(
            path,
            f"the graph has no proved Lipschitz bound, so it is not served: {error}\n"
            "Change the network to operators that the certifier knows, and export it again.",
        ) from error
    forward, gradient = (load_engine(path, graph.content, "cpu", 1) for graph in graphs)
    image_NCHW = probe(certificate)
    try:
        logits_NK = model_logits(forward, image_NCHW)
        again_NK, gradient_NCHW = gradient_outputs(gradient, image_NCHW, certificate.n_outputs)
    except Exception as error:  # Whatever the runtime raises, the artefact cannot be served.
        raise ArtefactError(path, f"the model cannot be run ({error}).") from error
    # Each side is within `logit_error` of the exact logits. A NaN is refused, too.
    if gradient_NCHW.shape != image_NCHW.shape or not _agree(again_NK, logits_NK, 2.0 * certificate.logit_error):
        raise ArtefactError(path, "ONNX Runtime computes other logits beside a gradient than alone; report this model.")
    ranges = Ranges.in_file(model_bytes, draft.weights)
    of_logits, of_gradient = (Splice.of(graph.pieces, ranges) for graph in graphs)
    return Verified(certificate, logits_NK, of_logits, of_gradient, network.largest)


def _agree(one: np.ndarray, other: np.ndarray, allowed: float) -> bool:
    return one.shape == other.shape and bool((np.abs(one - other) <= allowed).all())
