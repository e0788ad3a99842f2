"""The NVIDIA driver, asked through its own library before ONNX Runtime is: version, device, memory.

A failed attempt of ONNX Runtime is reported on stderr by native code, and names neither the version that is missing nor
the cure. `requirements/accelerator.py` imports this module before anything is installed: standard library only.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any, NamedTuple

CUDA_VERSION = 13_000
"""CUDA version of the libraries in requirements/serve-gpu.txt, as the driver counts: 1000 major + 10 minor."""
_DRIVER = "580"
"""First driver branch for CUDA 13."""

_COMPILED_FOR = {
    "x86_64": ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
    "aarch64": ((8, 9), (9, 0), (12, 0), (12, 1)),
}
"""Compute capabilities with code in the wheel, by machine.

Source: `cuobjdump --list-elf` and `--list-ptx` of libonnxruntime_providers_cuda.so in the Linux wheels of
onnxruntime-gpu 1.31.1: sm_75, 80, 86, 89, 90a, 120a on x86_64; sm_89, 90a, 120a, 121a on aarch64; no PTX, so the driver
can compile no code for another GPU. The same list stands in microsoft/onnxruntime pull request 31989.
"""
_FIRST_EXACT_MAJOR = 9
"""From here on the code is architecture-specific (the `a` of sm_90a) and runs on that capability alone; before it, also
on later minor versions (CUDA C++ Programming Guide, "Binary compatibility")."""

# Values of CUdevice_attribute and CUcomputemode in cuda.h.
_COMPUTE_MODE, _MAJOR, _MINOR = 20, 75, 76
_PROHIBITED = 2


class Memory(NamedTuple):
    """Memory of the GPU, in bytes."""

    total: int
    free: int | None
    """Null where this thread has no CUDA context."""


def obstacle() -> str | None:
    """Return why the driver or the first GPU cannot run the installed wheel, as a sentence with its cure, or null."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return (
            "the NVIDIA driver library libcuda.so.1 cannot be loaded; install the driver, and in a container "
            "start it with the GPU (docker run --gpus all)."
        )
    version = _ask(driver, "cuDriverGetVersion")
    if version is not None and version < CUDA_VERSION:
        return (
            f"the NVIDIA driver supports CUDA {_dotted(version)}, and this ONNX Runtime needs CUDA "
            f"{_dotted(CUDA_VERSION)}; update the driver to version {_DRIVER} or newer."
        )
    status = driver.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver does not start (cuInit returned {status}); check it with nvidia-smi."
    if not _ask(driver, "cuDeviceGetCount"):
        return "the NVIDIA driver sees no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi."
    return _obstacle_of_device(driver)


def _obstacle_of_device(driver: Any) -> str | None:
    device = _ask(driver, "cuDeviceGet", 0)
    major, minor, mode = (_ask(driver, "cuDeviceGetAttribute", it, device) for it in (_MAJOR, _MINOR, _COMPUTE_MODE))
    if mode == _PROHIBITED:
        return "the GPU is in compute mode Prohibited; change it with nvidia-smi --compute-mode=0."
    compiled_for = _COMPILED_FOR.get(platform.machine())
    if compiled_for is None or major is None or minor is None:
        return None
    if any(m == major and (n == minor or (m < _FIRST_EXACT_MAJOR and n < minor)) for m, n in compiled_for):
        return None
    return (
        f"the GPU has compute capability {major}.{minor}, and this ONNX Runtime has code for "
        f"{', '.join(f'{m}.{n}' for m, n in compiled_for)} alone; choose another GPU with CUDA_VISIBLE_DEVICES."
    )


def memory() -> Memory | None:
    """Return the memory of the first GPU, or null where the driver does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        if driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0:
            return Memory(total.value, free.value)
        device = _ask(driver, "cuDeviceGet", 0)
        if driver.cuDeviceTotalMem_v2(ctypes.byref(total), device) == 0:
            return Memory(total.value, None)
    except (OSError, AttributeError):
        pass
    return None


def _ask(driver: Any, function: str, *arguments: object) -> int | None:
    """Return the integer that a function of the driver writes to its first argument; null where it fails."""
    value = ctypes.c_int(0)
    # An older driver lacks functions.
    call = getattr(driver, function, None)
    return value.value if call is not None and call(ctypes.byref(value), *arguments) == 0 else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
