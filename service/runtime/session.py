"""Sessions of ONNX Runtime, with options that keep it inside the certificate's error analysis.

The analysis covers correctly rounded operations summed in any order. So: no TF32 and no other emulation of a format by
narrower ones, a convolution algorithm that does not depend on the batch, no graph optimisation (every node of the graph
is one kernel), subnormal numbers preserved. No node of a GPU session runs on the CPU: a provider that is not available
is an error, never a silent fallback.

CUDA graphs, which would spare the launch of each operator, are left out: their gain has not been measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from service.errors import ProviderError
from service.runtime.failures import explain
from service.runtime.provider import CPU, CUDA, Resolved

_CUDA_OPTIONS = {
    # TF32 has 11 bits of each factor: outside the error analysis.
    "use_tf32": "0",
    # The default searches for every batch size, and may pick FFT or Winograd, whose errors are not analysed.
    "cudnn_conv_algo_search": "DEFAULT",
    # The default doubles the arena each time; a GPU has other users.
    "arena_extend_strategy": "kSameAsRequested",
}
# Errors and worse: the runtime's warnings are about its own attempts, which this package reports in its own words.
_LOG_SEVERITY_ERROR = 3
_DTYPES: dict[str, Any] = {"tensor(double)": np.float64, "tensor(float)": np.float32}


class GraphError(Exception):
    """ONNX Runtime cannot load or run the graph, on any provider; the message is the runtime's."""


class GpuLimits(NamedTuple):
    """Limits of one graph on a GPU."""

    batch: int = 256
    """Images in the largest batch."""
    memory_bytes: int = 0
    """Size of the arena; 0 without a limit."""


def open_session(
    graph_bytes: bytes, provider: Resolved, threads: int, memory_bytes: int = 0
) -> onnxruntime.InferenceSession:
    """Load a graph into a session that runs all of it on one provider.

    Args:
        graph_bytes: a serialised ONNX model.
        provider: of `resolve_provider`.
        threads: threads inside one operator; at least 1.
        memory_bytes: as in `GpuLimits`.

    Raises:
        GraphError: the runtime cannot load the graph on the CPU either.
        ProviderError: the runtime cannot load it with CUDA.
    """
    options = session_options(threads)
    wanted: list[Any] = [CPU]
    if provider == "cuda":
        limit = {"gpu_mem_limit": str(memory_bytes)} if memory_bytes else {}
        # The option conflicts with an explicit CPU provider.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = [(CUDA, _CUDA_OPTIONS | limit)]
    try:
        session = onnxruntime.InferenceSession(
            graph_bytes,
            sess_options=options,
            providers=wanted,
            enable_fallback=0,
        )
    except Exception as error:  # The runtime's exceptions share no base class.
        if provider == "cpu":
            raise GraphError(str(error)) from error
        open_session(graph_bytes, "cpu", threads)
        raise ProviderError(explain(error, None, memory_bytes)) from error
    session.disable_fallback()
    # Needed for the fallback alone, and as large as the file.
    session._model_bytes = None  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    given = session.get_providers()[0]
    if provider == "cuda" and given != CUDA:
        raise ProviderError(
            f"the NVIDIA driver is there, but ONNX Runtime could not start its CUDA provider and offered {given} "
            "instead. Most often a CUDA or cuDNN library is missing or of another version: install the `gpu` extra "
            "(onnxruntime-gpu[cuda,cudnn]), or set LIPCERT_PROVIDER=cpu."
        )
    return session


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return the options of every session; see the docstring of this module."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _LOG_SEVERITY_ERROR
    # Idle threads that spin would take a whole core of a small machine between requests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    return options


def dtype(name: str, onnx_type: str) -> Any:
    """Return the numpy type of an input; raises `GraphError` unless it is float64 or float32."""
    try:
        return _DTYPES[onnx_type]
    except KeyError:
        raise GraphError(f"input {name!r} is {onnx_type}; it must be tensor(double) or tensor(float)") from None
