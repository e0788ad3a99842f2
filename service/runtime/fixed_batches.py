"""TODO: service/runtime/fixed_batches.py."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime

_DTYPES: dict[str, Any] = {"tensor(double)": np.float64, "tensor(float)": np.float32}


class GraphError(Exception):
    """ONNX Runtime cannot load the graph; the message is the runtime's."""


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
            value.name: np.zeros((self.sizes[-1], *value.shape[1:]), dtype(value.name, value.type))
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


def dtype(name: str, onnx_type: str) -> Any:
    try:
        return _DTYPES[onnx_type]
    except KeyError:
        raise GraphError(f"input {name!r} is {onnx_type}; it must be tensor(double) or tensor(float)") from None
