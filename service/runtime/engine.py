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
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime

from service.errors import ProviderError

Provider = Literal["auto", "cpu", "cuda"]
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_log = logging.getLogger(__name__)

_CUDA_OPTIONS = {
    # TF32 keeps 11 bits of each factor: outside the error analysis.
    "use_tf32": "0",
    # The default searches anew for every batch size, and may pick FFT or Winograd, whose errors are not
    # analysed.
    "cudnn_conv_algo_search": "DEFAULT",
    # The default doubles what it takes each time; a GPU has other users.
    "arena_extend_strategy": "kSameAsRequested",
}
# Whoever sets these asks NVIDIA's libraries for products in narrower formats, whatever a program asks for.
_CUDA_ENVIRONMENT = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "0",
    "CUBLAS_EMULATE_DOUBLE_PRECISION": "0",
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
_DTYPES: dict[str, Any] = {"tensor(double)": np.float64, "tensor(float)": np.float32}


class GraphError(Exception):
    """ONNX Runtime cannot load the graph; the message is the runtime's."""


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
        self._dtypes = {value.name: _dtype(value.name, value.type) for value in self._session.get_inputs()}
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


class FixedBatches:
    """Runs a graph in batches of few sizes, powers of two, in memory that is bound to it once.

    A GPU sets itself up anew for every batch size that it has not seen, so all of them are seen before anything is
    served. A smaller batch is filled up with black images, a larger one is cut; rows that were added are dropped, and
    by contract no row of a batch has a part in another. One batch at a time, from any thread.
    """

    sizes: tuple[int, ...]
    """Batch sizes, ascending; a graph of a fixed batch size has that alone."""

    def __init__(self, session: onnxruntime.InferenceSession, device: Literal["cpu", "cuda"], largest: int) -> None:
        """Bind memory on `device`, which is where the session's provider computes.

        Args:
            session: of a graph whose inputs and outputs have the batch as their first axis.
            device: where inputs are kept.
            largest: images in the largest batch; a power of two.

        Raises:
            GraphError: an input has no fixed shape behind its batch axis, so that no memory can be bound to it.
        """
        self._session = session
        self._device = device
        self._lock = threading.Lock()
        declared = session.get_inputs()
        fixed = next((value.shape[0] for value in declared if isinstance(value.shape[0], int)), None)
        self.sizes = tuple(2**k for k in range(largest.bit_length())) if fixed is None else (fixed,)
        for value in declared:
            if not all(isinstance(length, int) for length in value.shape[1:]):
                raise GraphError(
                    f"input {value.name!r} has shape {value.shape}; it must be fixed behind the batch axis"
                )
        # Rows come together here and go to the device in one piece.
        self._gathered = {
            value.name: np.zeros((self.sizes[-1], *value.shape[1:]), _dtype(value.name, value.type))
            for value in declared
        }
        self._inputs: dict[int, dict[str, onnxruntime.OrtValue]] = {}
        self._bindings: dict[tuple[int, tuple[str, ...]], onnxruntime.IOBinding] = {}

    def warm_up(self) -> None:
        """Run every batch size once, the largest first: what it takes is enough for the others."""
        names = [value.name for value in self._session.get_outputs()]
        for size in reversed(self.sizes):
            self.run(names, {name: rows[:size] for name, rows in self._gathered.items()})

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """As `Engine.run`; raises `ValueError` where the inputs are not those of the graph."""
        n = len(next(iter(inputs.values()), ()))
        expected = {name: (n, *rows.shape[1:]) for name, rows in self._gathered.items()}
        given = {name: rows.shape for name, rows in inputs.items()}
        if given != expected:
            raise ValueError(f"the graph takes {expected}, and got {given}")
        largest = self.sizes[-1]
        # An empty batch has the shape of its results, too.
        parts = [
            self._run({name: rows[start : start + largest] for name, rows in inputs.items()}, tuple(outputs))
            for start in range(0, max(n, 1), largest)
        ]
        return parts[0] if len(parts) == 1 else [np.concatenate(columns) for columns in zip(*parts, strict=True)]

    def _run(self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...]) -> list[np.ndarray]:
        n = len(next(iter(inputs.values())))
        size = next(size for size in self.sizes if size >= n)
        with self._lock:
            binding = self._binding(size, outputs)
            for name, rows in inputs.items():
                gathered = self._gathered[name][:size]
                gathered[:n] = rows
                gathered[n:] = 0.0
                self._inputs[size][name].update_inplace(gathered)
            self._session.run_with_iobinding(binding)
            # The memory of a binding is written again by its next run.
            return [np.array(value.numpy()[:n]) for value in binding.get_outputs()]

    def _binding(self, size: int, outputs: tuple[str, ...]) -> onnxruntime.IOBinding:
        if size not in self._inputs:
            self._inputs[size] = {
                name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    (size, *rows.shape[1:]), rows.dtype, self._device, 0
                )
                for name, rows in self._gathered.items()
            }
        if (size, outputs) not in self._bindings:
            binding = self._session.io_binding()
            for name, value in self._inputs[size].items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            self._bindings[size, outputs] = binding
        return self._bindings[size, outputs]


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


def resolve_provider(provider: Provider) -> Literal["cpu", "cuda"]:
    """Choose the provider once, before a graph is loaded; `auto` logs why it does not take CUDA.

    Raises:
        ProviderError: `cuda` was asked for; the message says what is missing.
    """
    if provider == "cpu":
        return "cpu"
    missing = missing_for_cuda()
    if missing is None:
        os.environ.update(_CUDA_ENVIRONMENT)
        # The CUDA and cuDNN wheels are not on the loader's path; a no-op where the system has the libraries.
        onnxruntime.preload_dlls()
        return "cuda"
    if provider == "cuda":
        raise ProviderError(f"LIPCERT_PROVIDER=cuda cannot be had: {missing} Or set LIPCERT_PROVIDER=auto or cpu.")
    _log.info("serving on the CPU: %s", missing)
    return "cpu"


def missing_for_cuda() -> str | None:
    """What keeps this process from using CUDA, as a sentence with its cure; None if nothing is known to.

    Asks the driver itself: a failed attempt of the runtime would be reported on stderr by native code.
    """
    if CUDA not in onnxruntime.get_available_providers():
        return "the installed ONNX Runtime has no CUDA provider; install the `gpu` extra instead of `cpu`."
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (
            "the NVIDIA driver library libcuda.so.1 cannot be loaded; install the driver, and in a container "
            "start it with the GPU (docker run --gpus all)."
        )
    status = driver.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver does not start (cuInit returned {status}); check it with nvidia-smi."
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi."
    return None


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


def _dtype(name: str, onnx_type: str) -> Any:
    try:
        return _DTYPES[onnx_type]
    except KeyError:
        raise GraphError(f"input {name!r} is {onnx_type}; it must be tensor(double) or tensor(float)") from None
