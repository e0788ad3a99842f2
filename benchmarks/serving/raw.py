"""The limit: ONNX Runtime in process, one thread, its own default options otherwise, on the graphs of the server."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.serving.artefacts import BATCH, Subject
from service.network.graphs import Graph, forward_graph, gradient_graph
from service.network.reader import read


class Raw:
    """The two graphs of an artefact, loaded for one thread each."""

    def __init__(self, subject: Subject, image_NCHW: np.ndarray) -> None:
        network = read(subject.model.read_bytes())
        self._forward = _session(forward_graph(network))
        self._gradient = _session(gradient_graph(network))
        self._image_NCHW = image_NCHW
        outputs = self._forward.get_outputs()[0].shape[-1]
        weights_NK = np.zeros((len(image_NCHW), int(outputs)))
        weights_NK[:, 0] = 1.0
        self._weights_NK = weights_NK

    def logits(self) -> np.ndarray:
        """Of all images, N x K (one column for a model with one output)."""
        return np.asarray(self._forward.run(["logits"], {"image": self._image_NCHW})[0])

    def images_per_s(self, seconds: float, batch: int = BATCH) -> float:
        """Images of the forward graph in a second, in batches; at least one batch is run."""
        feed = {"image": np.ascontiguousarray(self._image_NCHW[:batch])}
        return batch * _runs_per_s(self._forward, ["logits"], feed, seconds)

    def gradient_images_per_s(self, seconds: float, batch: int = BATCH) -> float:
        """Images of the gradient graph (logits and gradient) in a second, in batches."""
        feed = {
            "image": np.ascontiguousarray(self._image_NCHW[:batch]),
            "margin_weights": np.ascontiguousarray(self._weights_NK[:batch]),
        }
        return batch * _runs_per_s(self._gradient, ["logits", "gradient"], feed, seconds)

    def run_ms(self, batch: int, seconds: float) -> float:
        """Median time of one run of the forward graph, in milliseconds."""
        feed = {"image": np.ascontiguousarray(self._image_NCHW[:batch])}
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            started = time.perf_counter()
            self._forward.run(["logits"], feed)
            times.append(time.perf_counter() - started)
        return 1e3 * statistics.median(times)


def _session(graph: Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])


def _runs_per_s(
    session: onnxruntime.InferenceSession, outputs: list[str], feed: dict[str, Any], seconds: float
) -> float:
    started = time.perf_counter()
    runs = 0
    while runs == 0 or time.perf_counter() - started < seconds:
        session.run(outputs, feed)
        runs += 1
    return runs / (time.perf_counter() - started)
