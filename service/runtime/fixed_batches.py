"""Batches of few fixed sizes, in memory that is bound to a session once: how a graph runs on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnxruntime

from service.runtime.session import GraphError, dtype


class FixedBatches:
    """Runs a graph in batches of few sizes: powers of two below the largest size, and that one.

    A GPU needs set-up for every batch size that it has not seen, so all sizes are run before anything is served. A
    smaller batch is filled up with black images, a larger one is cut; added rows are dropped, and by contract no row of
    a batch depends on another. One batch at a time, from any thread.
    """

    sizes: tuple[int, ...]
    """Batch sizes, ascending; a graph of a fixed batch size has that alone."""

    def __init__(self, session: onnxruntime.InferenceSession, device: Literal["cpu", "cuda"], largest: int) -> None:
        """Allocate host memory for the largest batch.

        Args:
            session: of a graph whose inputs and outputs have the batch as their first axis.
            device: device of the session's provider; inputs are stored there.
            largest: images in the largest batch.

        Raises:
            GraphError: an input has no fixed shape behind its batch axis, so that no memory can be bound to it.
        """
        self._session = session
        self._device = device
        self._lock = threading.Lock()
        declared = session.get_inputs()
        fixed = next((value.shape[0] for value in declared if isinstance(value.shape[0], int)), None)
        powers = tuple(2**k for k in range((largest - 1).bit_length()))
        self.sizes = (*powers, largest) if fixed is None else (fixed,)
        for value in declared:
            if not all(isinstance(length, int) for length in value.shape[1:]):
                raise GraphError(
                    f"input {value.name!r} has shape {value.shape}; it must be fixed behind the batch axis"
                )
        # Rows are gathered here and go to the device in one piece.
        self._gathered = {
            value.name: np.zeros((self.sizes[-1], *value.shape[1:]), dtype(value.name, value.type))
            for value in declared
        }
        self._outputs = tuple(value.name for value in session.get_outputs())
        self._inputs: dict[int, dict[str, onnxruntime.OrtValue]] = {}
        self._bindings: dict[tuple[int, tuple[str, ...]], onnxruntime.IOBinding] = {}

    def run_once(self, size: int) -> None:
        """Run a batch of one of `sizes`, without a result; its images are those of the batch before, or black."""
        self._run({name: rows[:size] for name, rows in self._gathered.items()}, self._outputs)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Evaluate `outputs` on a batch of any size; raises `ValueError` for inputs that the graph does not have."""
        n = len(next(iter(inputs.values()), ()))
        expected = {name: (n, *rows.shape[1:]) for name, rows in self._gathered.items()}
        given = {name: rows.shape for name, rows in inputs.items()}
        if given != expected:
            raise ValueError(f"the graph takes {expected}, and got {given}")
        largest = self.sizes[-1]
        # An empty batch is run, too, for the shape of its results.
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
            # The next run of the binding overwrites its memory.
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
