"""A GPU to test with: the driver and the CUDA sessions answer as this class says, and the CPU computes.

The texts of failures are those of ONNX Runtime (issues of microsoft/onnxruntime), shortened.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException

from service.runtime.provider import CPU, CUDA

_CALL = "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 bool onnxruntime::CudaCall() "
_WHERE = " ; GPU=0 ; hostname=node ; file=/onnxruntime_src/cuda_execution_provider.cc ; line=336 ; expr=call(); "
OUT_OF_MEMORY = RuntimeException(
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
    "Name:'node_1' Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:376 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for requested buffer of size 8388608"
)
LIMIT_REACHED = RuntimeException(
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : onnxruntime::BFCArena::AllocateRawInternal(size_t) Available memory "
    "of 1024 is smaller than requested bytes of 135383040"
)
NO_KERNEL = Fail(
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Relu node. Name:'Relu_1' Status "
    "Message: CUDA error cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the device"
)
OTHER_PROVIDER = Fail(
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but "
    "fallback to CPU EP has been explicitly disabled by the user."
)


def failed_call(code: int, text: str) -> RuntimeException:
    """The exception of a call of the CUDA runtime that failed."""
    failure = f"CUDA failure {code}: {text}"
    return RuntimeException(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {_CALL}{_CALL}{failure}{_WHERE}")


@dataclass
class FakeGpu:
    """Properties of the driver and the device, and the failures that sessions have from now on."""

    version: int = 13_000
    init: int = 0
    devices: int = 1
    capability: tuple[int, int] = (8, 0)
    mode: int = 0
    total_bytes: int = 16_000_000_000
    free_bytes: int | None = 1_000_000
    open_failure: Exception | None = None
    run_failure: Callable[[int], Exception | None] = field(default=lambda size: None)
    """Given the images of a batch."""
    offset: float = 0.0
    """Added to each output."""
    given: Sequence[str] = (CUDA, CPU)
    """Providers of a session."""
    opened: list[tuple[onnxruntime.SessionOptions, list[Any]]] = field(default_factory=list)
    """Options and providers of each CUDA session."""
    sizes: list[int] = field(default_factory=list)
    """Images of each batch that was run."""

    def install(self, patch: pytest.MonkeyPatch) -> FakeGpu:
        """Put this GPU into the machine."""
        load, open_real = ctypes.CDLL, onnxruntime.InferenceSession
        allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

        def open_session(
            graph: bytes, sess_options: onnxruntime.SessionOptions, providers: list[Any], **options: Any
        ) -> Any:
            if providers == [CPU]:
                return open_real(graph, sess_options, providers=providers, **options)
            self.opened.append((sess_options, providers))
            if self.open_failure is not None:
                raise self.open_failure
            return _Session(self, open_real(graph, providers=[CPU], **options))

        patch.setattr(ctypes, "CDLL", lambda name: _Driver(self) if name == "libcuda.so.1" else load(name))
        patch.setattr(platform, "machine", lambda: "x86_64")
        patch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        patch.setattr(onnxruntime, "preload_dlls", lambda: None)
        patch.setattr(onnxruntime, "InferenceSession", open_session)
        patch.setattr(
            onnxruntime.OrtValue,
            "ortvalue_from_shape_and_type",
            staticmethod(lambda shape, dtype, device, number: allocate(shape, dtype, "cpu", number)),
        )
        return self


class _Driver:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def cuInit(self, flags: int) -> int:
        return self._gpu.init

    def cuDriverGetVersion(self, pointer: Any) -> int:
        return _write(pointer, self._gpu.version)

    def cuDeviceGetCount(self, pointer: Any) -> int:
        return _write(pointer, self._gpu.devices)

    def cuDeviceGet(self, pointer: Any, number: int) -> int:
        assert number == 0
        return _write(pointer, 7)

    def cuDeviceGetAttribute(self, pointer: Any, attribute: int, device: int) -> int:
        assert device == 7
        return _write(
            pointer, {75: self._gpu.capability[0], 76: self._gpu.capability[1], 20: self._gpu.mode}[attribute]
        )

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        if self._gpu.free_bytes is None:
            return 201  # CUDA_ERROR_INVALID_CONTEXT
        _write(total, self._gpu.total_bytes)
        return _write(free, self._gpu.free_bytes)

    def cuDeviceTotalMem_v2(self, total: Any, device: int) -> int:
        assert device == 7
        return _write(total, self._gpu.total_bytes)


def _write(pointer: Any, value: int) -> int:
    pointer._obj.value = value
    return 0


class _Session:
    def __init__(self, gpu: FakeGpu, real: onnxruntime.InferenceSession) -> None:
        self._gpu = gpu
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return list(self._gpu.given)

    def io_binding(self) -> _Binding:
        return _Binding(self._gpu, self._real.io_binding())

    def run(self, *arguments: Any) -> None:
        raise AssertionError("a GPU runs bound batches alone")

    def run_with_iobinding(self, binding: _Binding) -> None:
        failure = self._gpu.run_failure(binding.size)
        if failure is not None:
            raise failure
        self._gpu.sizes.append(binding.size)
        self._real.run_with_iobinding(binding.real)


class _Binding:
    def __init__(self, gpu: FakeGpu, real: onnxruntime.IOBinding) -> None:
        self._gpu = gpu
        self.real = real
        self.size = 0

    def bind_ortvalue_input(self, name: str, value: onnxruntime.OrtValue) -> None:
        self.size = value.shape()[0]
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device: str) -> None:
        self.real.bind_output(name, device)

    def get_outputs(self) -> list[Any]:
        return [_Output(value.numpy() + self._gpu.offset) for value in self.real.get_outputs()]


class _Output:
    def __init__(self, value: Any) -> None:
        self._value = value

    def numpy(self) -> Any:
        return self._value
