"""What has to be found out about the graphs of an artefact before it is served; and the process that does it.

`python -c "from service.prover import main; main()"` is started by `service.proving` and is of no other use.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from service.certificate import Certificate, UnsupportedGraphError, certify
from service.engine import Provider, missing_for_cuda
from service.errors import ArtefactError
from service.graphs import (
    GRAPH_FILES,
    MODEL_FILE,
    TRANSPORT_FILE,
    Findings,
    check_agreement,
    digest,
    load_engine,
    read_file,
)


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
        certificate = prove(folder, contents[MODEL_FILE], contents[TRANSPORT_FILE])
        on_cpu = provider == "cpu" or missing_for_cuda() is not None
        if on_cpu:
            model, transport = (load_engine(folder / file, contents.pop(file), "cpu", 1) for file in GRAPH_FILES)
            check_agreement(folder, model, transport, certificate)
    except ArtefactError as error:
        return Findings(digests, None, False, (error.file, error.reason))
    return Findings(digests, certificate, on_cpu)


def prove(folder: Path, model_bytes: bytes, transport_bytes: bytes) -> Certificate:
    """What is proved about `model.onnx`; the transport graph carries no proof, only its face is checked.

    Raises:
        ArtefactError: the model has no proof, or the transport graph has another face than it must have.
    """
    try:
        certificate = certify(model_bytes)
    except UnsupportedGraphError as error:
        raise ArtefactError(
            folder / MODEL_FILE,
            f"the graph has no proved Lipschitz bound, so it is not served: {error}\n"
            "Change the network to operators that the certifier knows, and export it again.",
        ) from error
    _check_face(folder / TRANSPORT_FILE, transport_bytes)
    return certificate


def _check_face(path: Path, content: bytes) -> None:
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(content)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ArtefactError(path, f"not a valid ONNX graph ({error}). Export the artefact again.") from error
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = {value.name for value in model.graph.input} - constants
    outputs = {value.name for value in model.graph.output}
    if inputs != {"image", "margin_weights"} or outputs != {"logits", "gradient"}:
        raise ArtefactError(
            path,
            f"the graph has inputs {sorted(inputs)} and outputs {sorted(outputs)}; it must take `image` and "
            "`margin_weights` and give `logits` and `gradient`. Export the artefact again.",
        )


def main() -> None:
    """Find out about each folder that stdin names, one after the other, and write what was found to stdout.

    Ends with the process that started it, whatever becomes of that.
    """
    # Whoever presses Ctrl-C means the server, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    # Nothing but results may get into the pipe.
    os.dup2(2, 1)
    try:
        provider, folders = pickle.load(sys.stdin.buffer)
    except EOFError:
        return
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for folder in folders:
            pickle.dump((folder, find_out(folder, provider)), results)
            results.flush()
    except BrokenPipeError:
        pass
    # Without taking everything down piece by piece.
    os._exit(0)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
