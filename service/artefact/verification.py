"""What has to be found out about the graphs of an artefact before it is served; and the processes that do it, which
`service.artefact.proving` starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from service.artefact.graphs import (
    GRAPH_FILES,
    MODEL_FILE,
    TRANSPORT_FILE,
    Findings,
    check_agreement,
    digest,
    load_engine,
    read_file,
)
from service.certificate import Certificate, UnsupportedGraphError, certify
from service.errors import ArtefactError
from service.runtime.provider import Provider, missing_for_cuda


def find_out(folder: Path, provider: Provider) -> Findings:
    """Read, prove and, where it is the CPU that will run them, run the graphs in `folder`; never raises ArtefactError.

    Args:
        folder: holds `model.onnx` and `transport.onnx`.
        provider: what the server is asked for.
    """
    contents: dict[str, bytes] = {}
    digests: dict[str, str] = {}
    try:
        for file in GRAPH_FILES:
            contents[file] = read_file(folder / file)
            digests[file] = digest(contents[file])
        on_cpu = provider == "cpu" or missing_for_cuda() is not None
        if on_cpu:
            certificate = _prove_model(folder, contents[MODEL_FILE])
            model, transport = (load_engine(folder / file, contents.pop(file), "cpu", 1) for file in GRAPH_FILES)
            _check_face(folder / TRANSPORT_FILE, transport.input_names, transport.output_names)
            check_agreement(folder, model, transport, certificate)
        else:
            certificate = prove(folder, contents[MODEL_FILE], contents[TRANSPORT_FILE])
    except ArtefactError as error:
        return Findings(digests, None, False, (error.file, error.reason))
    return Findings(digests, certificate, on_cpu)


def prove(folder: Path, model_bytes: bytes, transport_bytes: bytes) -> Certificate:
    """What is proved about `model.onnx`; the transport graph carries no proof, only its face is checked.

    Raises:
        ArtefactError: the model has no proof, or the transport graph has another face than it must have.
    """
    certificate = _prove_model(folder, model_bytes)
    path = folder / TRANSPORT_FILE
    try:
        graph = onnx.load_model_from_string(transport_bytes).graph
        onnx.checker.check_model(transport_bytes)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ArtefactError(path, f"not a valid ONNX graph ({error}). Export the artefact again.") from error
    constants = {initializer.name for initializer in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    _check_face(path, inputs, [value.name for value in graph.output])
    return certificate


def _prove_model(folder: Path, model_bytes: bytes) -> Certificate:
    try:
        return certify(model_bytes)
    except UnsupportedGraphError as error:
        raise ArtefactError(
            folder / MODEL_FILE,
            f"the graph has no proved Lipschitz bound, so it is not served: {error}\n"
            "Change the network to operators that the certifier knows, and export it again.",
        ) from error


def _check_face(path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if set(inputs) != {"image", "margin_weights"} or set(outputs) != {"logits", "gradient"}:
        raise ArtefactError(
            path,
            f"the graph has inputs {sorted(inputs)} and outputs {sorted(outputs)}; it must take `image` and "
            "`margin_weights` and give `logits` and `gradient`. Export the artefact again.",
        )
