"""ONNX Runtime: which execution provider runs a graph, and with which options.

The certificate's error analysis covers correctly rounded operations summed in any order. The options here
keep the runtime inside it: no TF32 and no other emulation of a format by narrower ones, a convolution algorithm that
does not depend on the batch, no rewriting of weights, subnormal numbers kept. A provider that was asked for and cannot
be had is an error, never a silent fall-back.

On a GPU every batch has one of few sizes, see `FixedBatches`. CUDA graphs, which would spare the launch of each
operator, are left out: what they are worth has not been measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime

from service.errors import ProviderError
from service.runtime.fixed_batches import FixedBatches, GraphError, dtype
from service.runtime.provider import CPU, CUDA

_CUDA_OPTIONS = {
    # TF32 keeps 11 bits of each factor: outside the error analysis.
    "use_tf32": "0",
    # The default searches anew for every batch size, and may pick FFT or Winograd, whose errors are not
    # analysed.
    "cudnn_conv_algo_search": "DEFAULT",
    # The default doubles what it takes each time; a GPU has other users.
    "arena_extend_strategy": "kSameAsRequested",
}
_LARGEST_GPU_BATCH = 256
# All but the last fold a scale into the weights of the layer before it: another network, by one rounding of every
# weight.
_DISABLED_OPTIMIZERS = [
    "ConvMulFusion",
    "ConvAddFusion",
    "ConvBNFusion",
    "MatMul_BatchNormalization_Fusion",
    "MatMulScaleFusion",
    # This one rewrites nothing that matters, but refuses every float64 Relu that is followed by a Clip.
    "FuseReluClip",
]
# Errors and worse: the runtime's warnings are about its own attempts, and this module reports those in its
# own words.
_LOG_SEVERITY_ERROR = 3


class Engine:
    """One ONNX graph, loaded and ready; `run` may be called from several threads at once."""

    provider: str
    """The provider that the runtime really gave, for example `CPUExecutionProvider`."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def __init__(self, graph_bytes: bytes, provider: Literal["cpu", "cuda"], threads: int) -> None:
        """Load a graph; on a GPU, run it in each of the batch sizes that it will have.

        Args:
            graph_bytes: a serialised ONNX model.
            provider: what `resolve_provider` chose.
            threads: threads inside one operator; at least 1.

        Raises:
            GraphError: the runtime refuses the graph.
            ProviderError: CUDA was asked for and the runtime gave something else.
            ValueError: `threads` below 1.
        """
        if threads < 1:
            raise ValueError(f"an engine needs 1 thread or more, got {threads}")
        wanted: list[Any] = [(CUDA, _CUDA_OPTIONS), CPU] if provider == "cuda" else [CPU]
        try:
            self._session = onnxruntime.InferenceSession(
                graph_bytes,
                sess_options=_session_options(threads),
                providers=wanted,
                disabled_optimizers=_DISABLED_OPTIMIZERS,
                enable_fallback=0,
            )
        except Exception as error:  # The runtime's exceptions share no base of their own.
            raise GraphError(str(error)) from error
        self._session.disable_fallback()
        # Kept for the fall-back alone: as much memory as the file is large.
        self._session._model_bytes = None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        self.provider = self._session.get_providers()[0]
        if provider == "cuda" and self.provider != CUDA:
            raise ProviderError(
                "the NVIDIA driver is there, but ONNX Runtime could not start its CUDA provider and offered "
                f"{self.provider} instead. Most often a CUDA or cuDNN library is missing or of another "
                "version: "
                "install the `gpu` extra (onnxruntime-gpu[cuda,cudnn]), or set LIPCERT_PROVIDER=cpu."
            )
        self._dtypes = {value.name: dtype(value.name, value.type) for value in self._session.get_inputs()}
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._fixed = FixedBatches(self._session, "cuda", _LARGEST_GPU_BATCH) if provider == "cuda" else None
        if self._fixed is not None:
            self._fixed.warm_up()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Evaluate `outputs` on `inputs`, each converted to the precision that the graph declares."""
        if self._fixed is not None:
            return self._fixed.run(outputs, inputs)
        feed = {name: np.ascontiguousarray(value, self._dtypes[name]) for name, value in inputs.items()}
        return self._session.run(list(outputs), feed)  # type: ignore[return-value]


class LaterEngine:
    """A graph that is loaded when it is first run: of many models, a server holds those that are asked for.

    `run` may be called from several threads at once.
    """

    provider = CPU

    def __init__(self, load: Callable[[], Engine]) -> None:
        """Take over how the graph is loaded; what `load` raises is raised by whatever needs the graph first."""
        self._load = load
        self._lock = threading.Lock()
        self._loaded: Engine | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """As the graph declares them."""
        return self._engine().input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """As the graph declares them."""
        return self._engine().output_names

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """As `Engine.run`."""
        return self._engine().run(outputs, inputs)

    def _engine(self) -> Engine:
        engine = self._loaded
        if engine is None:
            with self._lock:
                if self._loaded is None:
                    self._loaded = self._load()
                    _give_memory_back()
                engine = self._loaded
        return engine


Runs = Engine | LaterEngine
"""What runs one graph."""


def _give_memory_back() -> None:
    """What loading a graph took and freed goes back to the system, where the C library can do that."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Constant folding and fusions of MatMul with Add; the level above rewrites constants.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = _LOG_SEVERITY_ERROR
    # Idle threads that spin would take a whole core of a small machine between requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    return options
