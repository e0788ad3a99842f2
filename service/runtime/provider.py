"""TODO: service/runtime/provider.py."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Literal

import onnxruntime

from service.errors import ProviderError

Provider = Literal["auto", "cpu", "cuda"]
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_log = logging.getLogger(__name__)
# Whoever sets these asks NVIDIA's libraries for products in narrower formats, whatever a program asks for.
_CUDA_ENVIRONMENT = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "0",
    "CUBLAS_EMULATE_DOUBLE_PRECISION": "0",
}


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
