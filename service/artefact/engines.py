"""Both graphs of an artefact as engines, and the checks that they compute the logits that they must.

Axes: N batch, C channels, H height, W width, K logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.artefact.files import MODEL_FILE, TRANSPORT_FILE, read_verified
from service.artefact.findings import Findings, Verified
from service.certificate import Certificate
from service.errors import ArtefactError, ProviderError
from service.runtime.engine import Engine, LazyEngine
from service.runtime.provider import Resolved
from service.runtime.session import GpuLimits, GraphError


def lazy_engines(
    folder: Path, findings: Findings, provider: Resolved, threads: int, limits: GpuLimits | None = None
) -> tuple[LazyEngine, LazyEngine]:
    """Return the engines of `model.onnx` and `transport.onnx`, each loaded when it is first run.

    A graph is loaded from the bytes that the findings are about. On a GPU its logits are compared with those of the CPU
    before anything else is run.

    Args:
        folder: of the artefact.
        findings: of this run of the program.
        provider: of `resolve_provider`.
        threads: threads inside one operator; at least 1.
        limits: of each graph on a GPU.

    Raises:
        ArtefactError: the findings report a fault. Loading raises it where a file has changed since.
    """
    facts = findings.facts()

    def load(file: str) -> Engine:
        path = folder / file
        engine = load_engine(path, read_verified(path, findings.digests[file]), provider, threads, limits)
        if provider == "cuda":
            _check_device(path, engine, facts)
        return engine

    return (
        LazyEngine(provider, lambda: load(MODEL_FILE)),
        LazyEngine(provider, lambda: load(TRANSPORT_FILE)),
    )


def load_engine(
    path: Path, content: bytes, provider: Resolved, threads: int, limits: GpuLimits | None = None
) -> Engine:
    """Return the engine of one graph.

    Args:
        path: of its file, for messages.
        content: bytes of the file.
        provider: of `resolve_provider`.
        threads: threads inside one operator; at least 1.
        limits: on a GPU.

    Raises:
        ArtefactError: no provider runs the graph.
        ProviderError: the GPU does not run a graph that the CPU runs.
    """
    try:
        return Engine(content, provider, threads, limits)
    except GraphError as error:
        raise ArtefactError(
            path, f"ONNX Runtime cannot run the graph ({error}). Export it with operators it has."
        ) from error
    except ProviderError as error:
        raise ProviderError(f"{path}: {error}") from error


def agreed_logits(folder: Path, model: Engine, transport: Engine, certificate: Certificate) -> np.ndarray:
    """Return the logits of the probe, if both graphs compute them: otherwise no counterfactual would be reached.

    Args:
        folder: of the artefact, for messages.
        model: engine of `model.onnx`.
        transport: engine of `transport.onnx`.
        certificate: of `model.onnx`.

    Raises:
        ArtefactError: the graphs give other logits for the same image, or cannot be run.
    """
    path = folder / TRANSPORT_FILE
    image_NCHW = probe(certificate)
    try:
        logits_NK = _model_logits(model, image_NCHW)
        transport_NK, gradient_NCHW = _transport_outputs(transport, image_NCHW, certificate.n_outputs)
    except Exception as error:  # Whatever the runtime raises, the artefact cannot be served.
        raise ArtefactError(
            path, f"model.onnx or transport.onnx cannot be run ({error}). Export the artefact again."
        ) from error
    if (
        transport_NK.shape != logits_NK.shape
        or gradient_NCHW.shape != image_NCHW.shape
        or not np.allclose(transport_NK, logits_NK, rtol=0.0, atol=_tolerance(certificate, logits_NK))
    ):
        raise ArtefactError(
            path, "its logits are not those of model.onnx, so it belongs to another network. Export both together."
        )
    return logits_NK


def probe(certificate: Certificate) -> np.ndarray:
    """Return the image on which engines are compared: 1 x C x H x W, all grey levels in order."""
    return np.linspace(0.0, 1.0, int(np.prod(certificate.input_shape))).reshape(1, *certificate.input_shape)


def _check_device(path: Path, engine: Engine, facts: Verified) -> None:
    """Refuse a device whose logits are further from the CPU's than the proved rounding error allows."""
    image_NCHW = probe(facts.certificate)
    if path.name == MODEL_FILE:
        logits_NK = _model_logits(engine, image_NCHW)
        # Each side is within `logit_error` of the exact logits.
        allowed = 2.0 * facts.certificate.logit_error
    else:
        logits_NK, _ = _transport_outputs(engine, image_NCHW, facts.certificate.n_outputs)
        allowed = _tolerance(facts.certificate, facts.logits_NK)
    difference = float(np.abs(logits_NK - facts.logits_NK).max())
    # A NaN is refused, too.
    if not difference <= allowed:
        raise ProviderError(
            f"{path}: on the GPU its logits differ by {difference:.3g} from those on the CPU, and {allowed:.3g} is "
            "allowed, so that no radius would hold. Check the GPU and its libraries, or set LIPCERT_PROVIDER=cpu."
        )


def _model_logits(engine: Engine, image_NCHW: np.ndarray) -> np.ndarray:
    return engine.run(engine.output_names[:1], {engine.input_names[0]: image_NCHW})[0]


def _transport_outputs(engine: Engine, image_NCHW: np.ndarray, n_outputs: int) -> list[np.ndarray]:
    weights_NK = np.zeros((1, n_outputs))
    weights_NK[0, 0] = 1.0
    return engine.run(("logits", "gradient"), {"image": image_NCHW, "margin_weights": weights_NK})


def _tolerance(certificate: Certificate, logits_NK: np.ndarray) -> float:
    """Largest difference between the logits of both graphs: `transport.onnx` may round more than the proof says."""
    return float(4.0 * certificate.logit_error + 1e-5 * (1.0 + np.abs(logits_NK).max()))
