"""Failures of the CUDA provider, told apart by the text of ONNX Runtime's exceptions: they have no code of their own.

A failed call reads `CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; ...`, also with CUDNN, CUBLAS
or CUFFT in place of CUDA (cuda_call.cc). A failed kernel reads `CUDA error cudaErrorLaunchFailure:unspecified launch
failure`. The arena reports `Failed to allocate memory for requested buffer of size N`, or where it has a limit
`Available memory of M is smaller than requested bytes of N` (bfc_arena.cc).
"""

from __future__ import annotations

import re

from service.runtime import driver

_CALL = re.compile(r"(?:CUDA|CUDNN|CUBLAS|CUFFT) (?:failure \d+: |error cuda\w+:)[^;\n]*[^;\s]")
_ARENA = re.compile(r"(?:Failed to allocate memory for requested buffer of size|smaller than requested bytes of) (\d+)")
_OUT_OF_MEMORY = re.compile(r"CUDA failure 2:|cudaErrorMemoryAllocation|(?:CUBLAS|CUDNN)_STATUS_\w*ALLOC\w*_FAILED")
# The CUDA runtime API says of the 7xx: "This leaves the process in an inconsistent state and any further CUDA work will
# return the same error. To continue using CUDA, the process must be terminated and relaunched." 214, 220 and 226 are
# errors of memory and of NVLink that the hardware could not correct.
_STICKY = re.compile(
    r"CUDA failure (?:214|220|226|700|702|710|71[4-9]|721):"
    r"|unspecified launch failure|illegal memory access|device lost",
    re.IGNORECASE,
)


def is_sticky(error: Exception) -> bool:
    """Return whether CUDA fails for the rest of the process after this error."""
    return _STICKY.search(str(error)) is not None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the memory of the GPU, or its limit, was too small."""
    return _ARENA.search(str(error)) is not None or _OUT_OF_MEMORY.search(str(error)) is not None


def summary(error: Exception) -> str:
    """Return the part of the text that names the failure, without file names and signatures."""
    found = _CALL.search(str(error)) or _ARENA.search(str(error))
    return found[0] if found else str(error)


def explain(error: Exception, batch: int | None, memory_bytes: int) -> str:
    """Return why a graph that the CPU runs does not start on the GPU, with figures and a cure.

    Args:
        error: raised by ONNX Runtime.
        batch: images in the batch that failed; null while the graph was loaded.
        memory_bytes: limit of the arena; 0 without a limit.
    """
    if not is_out_of_memory(error):
        return (
            f"the GPU does not run a graph that the CPU runs ({summary(error)}). Check it with nvidia-smi, or set "
            "LIPCERT_PROVIDER=cpu."
        )
    needed = "the weights" if batch is None else f"a batch of {batch} images"
    asked = _ARENA.search(str(error))
    figures = [] if asked is None else [f"{asked[1]} bytes asked for"]
    memory = driver.memory()
    if memory is not None:
        figures.append(f"{memory.total} bytes in all" + ("" if memory.free is None else f", {memory.free} free"))
    cures = ["serve fewer models", "set a smaller LIPCERT_FORWARD_BATCH", "set LIPCERT_PROVIDER=cpu"]
    if memory_bytes:
        figures.append(f"LIPCERT_GPU_MEMORY_BYTES={memory_bytes}")
        cures.insert(2, "raise LIPCERT_GPU_MEMORY_BYTES")
    return (
        f"the memory of the GPU is too small for {needed} ({'; '.join(figures) or summary(error)}): "
        f"{', '.join(cures[:-1])}, or {cures[-1]}."
    )
