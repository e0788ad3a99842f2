"""Engines: one ONNX graph each, loaded now or when it is first run.

On a GPU a graph runs in `FixedBatches`, each size of which runs once before the engine is ready. A run that fails there
asks whether the device still answers. If it does not, the device is lost for the whole process: no engine can be loaded
again, so the process has to end (`service.processes.serving`).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from service.errors import DeviceLostError, ProviderError
from service.runtime.failures import explain, is_sticky, summary
from service.runtime.fixed_batches import FixedBatches
from service.runtime.provider import CPU, CUDA, Resolved
from service.runtime.session import GpuLimits, GraphError, dtype, open_session

_log = logging.getLogger(__name__)
_CACHED = 1 << 18
"""Numbers of one tensor of a batch, 2 MiB in float64: beyond, the operators of a graph wait for memory."""


class Engine:
    """One ONNX graph, loaded and ready; `run` may be called from several threads at once."""

    provider: str
    """The provider that runs the graph, for example `CPUExecutionProvider`."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    is_lost: bool
    """Whether the device has failed for good."""

    def __init__(
        self, graph_bytes: bytes, provider: Resolved, threads: int, limits: GpuLimits | None = None, largest: int = 1
    ) -> None:
        """Load a graph; on a GPU, run it in each of its batch sizes.

        Args:
            graph_bytes: a serialised ONNX model.
            provider: of `resolve_provider`.
            threads: threads inside one operator; at least 1.
            limits: on a GPU.
            largest: numbers in the largest tensor of one image; on a CPU, as many images run at once as their tensors
                stay in its caches.

        Raises:
            GraphError: the runtime refuses the graph, also on the CPU.
            ProviderError: the GPU does not run a graph that the CPU runs.
            ValueError: `threads` below 1.
        """
        if threads < 1:
            raise ValueError(f"an engine needs 1 thread or more, got {threads}")
        limits = limits or GpuLimits()
        self._session = open_session(graph_bytes, provider, threads, limits.memory_bytes)
        self.provider = self._session.get_providers()[0]
        self._dtypes = {value.name: dtype(value.name, value.type) for value in self._session.get_inputs()}
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self.is_lost = False
        self._images = max(1, _CACHED // largest)
        self._fixed = None
        if provider == "cuda":
            self._fixed = FixedBatches(self._session, "cuda", limits.batch)
            self._warm_up(self._fixed, graph_bytes, limits.memory_bytes)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Evaluate `outputs` on `inputs`, each converted to the precision that the graph declares.

        Raises:
            DeviceLostError: the GPU has failed for good.
        """
        if self._fixed is None:
            feed = {name: np.ascontiguousarray(value, self._dtypes[name]) for name, value in inputs.items()}
            return self._run_in_parts(list(outputs), feed)
        if self.is_lost:
            raise DeviceLostError
        try:
            return self._fixed.run(outputs, inputs)
        except ValueError:
            raise
        except Exception as error:
            if not (is_sticky(error) or self._is_unresponsive(self._fixed)):
                raise
            self.is_lost = True
            _log.error("the GPU is lost: %s", summary(error))
            raise DeviceLostError from error

    def _run_in_parts(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run a batch in parts of nearly one size."""
        parts = -(-max(map(len, feed.values()), default=0) // self._images)
        if parts < 2:
            return self._session.run(outputs, feed)  # type: ignore[return-value]
        split = {name: np.array_split(value, parts) for name, value in feed.items()}
        results = [self._session.run(outputs, {name: value[k] for name, value in split.items()}) for k in range(parts)]
        return [np.concatenate(of_one) for of_one in zip(*results, strict=True)]  # type: ignore[arg-type]

    def _warm_up(self, fixed: FixedBatches, graph_bytes: bytes, memory_bytes: int) -> None:
        # The largest first: its memory is enough for the others.
        for size in reversed(fixed.sizes):
            try:
                fixed.run_once(size)
            except Exception as error:
                on_cpu = FixedBatches(open_session(graph_bytes, "cpu", 1), "cpu", 1)
                try:
                    on_cpu.run_once(on_cpu.sizes[0])
                except Exception as same:
                    raise GraphError(str(same)) from error
                raise ProviderError(explain(error, size, memory_bytes)) from error

    @staticmethod
    def _is_unresponsive(fixed: FixedBatches) -> bool:
        """Whether the device fails in the smallest batch, too."""
        try:
            fixed.run_once(fixed.sizes[0])
        except Exception:
            return True
        return False


class LazyEngine:
    """A graph that is loaded when it is first run: of many models, a server holds those that are asked for.

    `run` may be called from several threads at once.
    """

    provider: str
    """The provider that `load` loads the graph on."""

    def __init__(self, provider: Resolved, load: Callable[[], Engine]) -> None:
        """Store how the graph is loaded; the first call that needs it raises the errors of `load`."""
        self.provider = CUDA if provider == "cuda" else CPU
        self._load = load
        self._lock = threading.Lock()
        self._loaded: Engine | None = None

    @property
    def is_lost(self) -> bool:
        """As `Engine.is_lost`; a graph that is not loaded is not lost."""
        return self._loaded is not None and self._loaded.is_lost

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


Runs = Engine | LazyEngine
"""Runs one graph."""


def _give_memory_back() -> None:
    """Return memory that was freed after loading a graph to the system, where the C library can do that."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
