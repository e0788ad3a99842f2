"""The same images in other batches, on other numbers of threads and at other levels of graph optimisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnxruntime

from service.certificate import Certificate, certified_radius, certify, two_class_logits
from service.network.graphs import forward_graph
from service.network.reader import read
from service.runtime import provider
from service.runtime.session import session_options

BATCHES = (1, 2, 3, 7, 16, 64, 256)
THREADS = (1, 2, 3, 4)
LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)
"""The first is that of the service."""


@dataclass(frozen=True)
class Variation:
    """The spread of the answers about n images over all settings."""

    n: int
    settings: int
    logit_error: float
    logits: float
    """Largest difference of one logit between two settings."""
    radii: float
    """Largest difference of one radius."""
    smallest_bound: float
    """Smallest `K_ij` of a deciding pair."""
    classes_changed: int
    """Images with a radius in some setting and another class in another."""
    different: int
    """Settings whose logits are not bit for bit those of the service's own."""

    @property
    def logits_over_2e(self) -> float:
        """The promise is at most 1: each logit lies within E of the exact one."""
        return self.logits / (2.0 * self.logit_error)

    @property
    def radii_over_2e(self) -> float:
        """Largest difference of a radius, in units of `2 E`."""
        return self.radii / (2.0 * self.logit_error)


def vary(model_bytes: bytes, image_NCHW: np.ndarray, optimised: bool) -> Variation:
    """Run the served graph in every combination of `BATCHES`, `THREADS` and, where optimised, `LEVELS`.

    Args:
        model_bytes: a model that can be certified.
        image_NCHW: the images; batches are filled up with them, starting at another one each time.
        optimised: run at the other levels too, at which the runtime folds one layer into the weights of another.
    """
    certificate = certify(model_bytes)
    graph = forward_graph(read(model_bytes)).content
    logits, radii, classes, certified, bounds = [], [], [], [], []
    for threads in THREADS:
        for level in LEVELS if optimised else LEVELS[:1]:
            session = _session(graph, threads, level)
            for size in BATCHES:
                raw_NK = _in_batches(session, image_NCHW, size)
                answer = certified_radius(raw_NK, certificate.margin_bounds_KK, certificate.logit_error)
                logits.append(raw_NK)
                radii.append(answer.radius_N)
                classes.append(answer.class_id_N)
                certified.append(answer.certified_N)
                bounds.append(answer.lipschitz_bound_N.min())
    class_SN, certified_SN = np.stack(classes), np.stack(certified)
    # All certified settings of an image, and all others, must agree with one of them.
    reference_N = class_SN[certified_SN.argmax(axis=0), np.arange(len(image_NCHW))]
    changed_N = certified_SN.any(axis=0) & (class_SN != reference_N).any(axis=0)
    return Variation(
        n=len(image_NCHW),
        settings=len(logits),
        logit_error=certificate.logit_error,
        logits=float(np.ptp(np.stack(logits), axis=0).max()),
        radii=float(np.ptp(np.stack(radii), axis=0).max()),
        smallest_bound=float(min(bounds)),
        classes_changed=int(changed_N.sum()),
        different=sum(not np.array_equal(array, logits[0]) for array in logits),
    )


def lost_radius(certificate: Certificate, logits_NK: np.ndarray) -> tuple[float, float]:
    """Medians over the images: of the radius without rounding errors less the radius, and of the radius."""
    radii = certified_radius(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
    row_N = np.arange(len(logits_NK))
    margin_NK = (logits_NK[row_N, radii.class_id_N][:, None] - logits_NK).astype(np.longdouble)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_NK = margin_NK / certificate.margin_bounds_KK[radii.class_id_N]
    ratio_NK[row_N, radii.class_id_N] = math.inf
    lost_N = ratio_NK.min(axis=1) - radii.radius_N
    return float(np.median(lost_N)), float(np.median(radii.radius_N))


def _session(graph: bytes, threads: int, level: object) -> onnxruntime.InferenceSession:
    # The server's own options, but for what is varied.
    options = session_options(threads)
    options.graph_optimization_level = level  # type: ignore[assignment]
    return onnxruntime.InferenceSession(graph, sess_options=options, providers=[provider.CPU])


def _in_batches(session: onnxruntime.InferenceSession, image_NCHW: np.ndarray, size: int) -> np.ndarray:
    """Logits N x K as float64, from batches of exactly `size` images."""
    (taken,) = session.get_inputs()
    dtype = np.float64 if taken.type == "tensor(double)" else np.float32
    n = len(image_NCHW)
    parts = []
    for start in range(0, n, size):
        index = (start + np.arange(size)) % n
        (raw,) = session.run(None, {taken.name: image_NCHW[index].astype(dtype)})
        parts.append(np.asarray(raw, np.float64)[: min(size, n - start)])
    raw_NK = np.concatenate(parts)
    return two_class_logits(raw_NK) if raw_NK.shape[1] == 1 else raw_NK
