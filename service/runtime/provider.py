"""Execution provider: chosen once for all graphs of the process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Literal, TypeVar

import onnxruntime

from service.errors import ProviderError
from service.runtime import driver

Provider = Literal["auto", "cpu", "cuda"]
Resolved = Literal["cpu", "cuda"]
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_Loaded = TypeVar("_Loaded")

_log = logging.getLogger(__name__)
# A 1 in these variables makes NVIDIA's libraries multiply in narrower formats, whatever the program asks for.
_CUDA_ENVIRONMENT = {
    "NVIDIA_TF32_OVERRIDE": "0",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "0",
    "CUBLAS_EMULATE_DOUBLE_PRECISION": "0",
}


def resolve_provider(provider: Provider) -> Resolved:
    """Return the provider to load graphs with; where `auto` cannot take CUDA, a warning says why.

    Raises:
        ProviderError: `cuda` is not available; the message names the missing part.
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
        raise ProviderError(f"LIPCERT_PROVIDER=cuda is not available: {missing} Or set LIPCERT_PROVIDER=auto or cpu.")
    _log.warning("serving on the CPU: %s Or set LIPCERT_PROVIDER=cpu.", missing)
    return "cpu"


def load_on(provider: Provider, load: Callable[[Resolved], _Loaded]) -> _Loaded:
    """Return `load` of the resolved provider; where a GPU fails in it, `auto` warns and loads on the CPU.

    Args:
        provider: the setting.
        load: loads graphs and runs them once.

    Raises:
        ProviderError: `cuda` is not available, or the GPU does not run the graphs.
    """
    resolved = resolve_provider(provider)
    try:
        return load(resolved)
    except ProviderError as error:
        if provider != "auto" or resolved == "cpu":
            raise
        _log.warning("serving on the CPU: %s", error)
        return load("cpu")


def missing_for_cuda() -> str | None:
    """Return why CUDA is not available in this process, as a sentence with its cure; null where it is."""
    if CUDA not in onnxruntime.get_available_providers():
        return "the installed ONNX Runtime has no CUDA provider; install the `gpu` extra instead of `cpu`."
    return driver.obstacle()
