"""The graphs of an artefact as engines, and the check that a device computes the logits that it must.

Axes: N batch, C channels, H height, W width, K logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.artefact.files import MODEL_FILE
from service.artefact.findings import Findings, Verified
from service.artefact.splices import Splice
from service.artefact.verified_files import VerifiedFiles
from service.certificate import Certificate
from service.errors import ArtefactError, ProviderError
from service.runtime.engine import Engine, LazyEngine
from service.runtime.provider import Resolved
from service.runtime.session import GpuLimits, GraphError


def lazy_engines(
    files: VerifiedFiles, findings: Findings, provider: Resolved, threads: int, limits: GpuLimits | None = None
) -> tuple[LazyEngine, LazyEngine]:
    """Return the engines of the logits and of their gradient, each loaded when it is first run.

    A graph is put together from the bytes that the findings are about. On a GPU its logits are compared with those of
    the CPU before anything else is run.

    Args:
        files: of the artefact.
        findings: about them, of this run of the program.
        provider: of `resolve_provider`.
        threads: threads inside one operator; at least 1.
        limits: of each graph on a GPU.

    Raises:
        ArtefactError: the findings report a fault. Loading raises `ArtefactChangedError` where the file has changed.
    """
    facts, path = findings.facts(), files.folder / MODEL_FILE

    def load(graph: Splice) -> Engine:
        content = graph.join(files.read_model())
        engine = load_engine(path, content, provider, threads, limits, facts.largest)
        if provider == "cuda":
            _check_device(path, engine, facts)
        return engine

    return LazyEngine(provider, lambda: load(facts.forward)), LazyEngine(provider, lambda: load(facts.gradient))


def load_engine(
    path: Path, content: bytes, provider: Resolved, threads: int, limits: GpuLimits | None = None, largest: int = 1
) -> Engine:
    """Return the engine of one graph.

    Args:
        path: of the model, for messages.
        content: bytes of the graph.
        provider: of `resolve_provider`.
        threads: threads inside one operator; at least 1.
        limits: on a GPU.
        largest: numbers in the largest tensor of one image.

    Raises:
        ArtefactError: no provider runs the graph.
        ProviderError: the GPU does not run a graph that the CPU runs.
    """
    try:
        return Engine(content, provider, threads, limits, largest)
    except GraphError as error:
        raise ArtefactError(
            path, f"ONNX Runtime cannot run the graph ({error}). Export it with operators it has."
        ) from error
    except ProviderError as error:
        raise ProviderError(f"{path}: {error}") from error


def probe(certificate: Certificate) -> np.ndarray:
    """Return the image on which engines are compared: 1 x C x H x W, all grey levels in order."""
    return np.linspace(0.0, 1.0, int(np.prod(certificate.input_shape))).reshape(1, *certificate.input_shape)


def model_logits(engine: Engine, image_NCHW: np.ndarray) -> np.ndarray:
    """Return the logits (N, K) of images."""
    return engine.run(("logits",), {"image": image_NCHW})[0]


def gradient_outputs(engine: Engine, image_NCHW: np.ndarray, n_outputs: int) -> list[np.ndarray]:
    """Return the logits of one image and the gradient of the first of them.

    Args:
        engine: of the gradient.
        image_NCHW: N = 1.
        n_outputs: K.
    """
    weights_NK = np.zeros((1, n_outputs))
    weights_NK[0, 0] = 1.0
    return engine.run(("logits", "gradient"), {"image": image_NCHW, "margin_weights": weights_NK})


def _check_device(path: Path, engine: Engine, facts: Verified) -> None:
    """Refuse a device whose logits are further from the CPU's than the proved rounding error allows."""
    image_NCHW = probe(facts.certificate)
    if "margin_weights" in engine.input_names:
        logits_NK, _ = gradient_outputs(engine, image_NCHW, facts.certificate.n_outputs)
    else:
        logits_NK = model_logits(engine, image_NCHW)
    difference = float(np.abs(logits_NK - facts.logits_NK).max())
    # Each side is within `logit_error` of the exact logits. A NaN is refused, too.
    allowed = 2.0 * facts.certificate.logit_error
    if not difference <= allowed:
        raise ProviderError(
            f"{path}: on the GPU its logits differ by {difference:.3g} from those on the CPU, and {allowed:.3g} is "
            "allowed, so that no radius would hold. Check the GPU and its libraries, or set LIPCERT_PROVIDER=cpu."
        )
