"""Failures of the CUDA provider are told apart by their texts."""

from __future__ import annotations

import pytest
from fake_gpu import LIMIT_REACHED, NO_KERNEL, OTHER_PROVIDER, OUT_OF_MEMORY, FakeGpu, failed_call

from service.runtime.failures import explain, is_out_of_memory, is_sticky, summary

ECC = failed_call(214, "uncorrectable ECC error encountered")
ILLEGAL = failed_call(700, "an illegal memory access was encountered")
LAUNCH = failed_call(719, "unspecified launch failure")
KERNEL = RuntimeError("Status Message: CUDA error cudaErrorLaunchFailure:unspecified launch failure")
DRIVER = failed_call(35, "CUDA driver version is insufficient for CUDA runtime version")
BUSY = failed_call(46, "CUDA-capable device(s) is/are busy or unavailable")
MEMORY = failed_call(2, "out of memory")
CUBLAS = RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; hostname=node ; expr=cublasCreate(&h)")
CUDNN = RuntimeError("CUDNN failure 2003: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0 ; expr=f()")


@pytest.mark.parametrize("error", [ECC, ILLEGAL, LAUNCH, KERNEL])
def test_errors_after_which_cuda_fails_for_good_are_known(error: Exception) -> None:
    assert is_sticky(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, LIMIT_REACHED, MEMORY, CUBLAS, CUDNN])
def test_errors_of_memory_are_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_sticky(error)


@pytest.mark.parametrize("error", [DRIVER, BUSY, NO_KERNEL, OTHER_PROVIDER, ValueError("719")])
def test_other_errors_are_neither(error: Exception) -> None:
    assert not is_sticky(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LAUNCH, "CUDA failure 719: unspecified launch failure"),
        (CUBLAS, "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
        (
            NO_KERNEL,
            "CUDA error cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the device",
        ),
        (OUT_OF_MEMORY, "Failed to allocate memory for requested buffer of size 8388608"),
        (ValueError("anything else"), "anything else"),
    ],
)
def test_the_summary_names_the_failure_alone(error: Exception, expected: str) -> None:
    assert summary(error) == expected


def test_missing_memory_is_explained_with_figures_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    assert explain(OUT_OF_MEMORY, 256, 0) == (
        "the memory of the GPU is too small for a batch of 256 images (8388608 bytes asked for; 16000000000 bytes in "
        "all, 1000000 free): serve fewer models, set a smaller LIPCERT_FORWARD_BATCH, or set LIPCERT_PROVIDER=cpu."
    )
    assert explain(LIMIT_REACHED, None, 140_000_000) == (
        "the memory of the GPU is too small for the weights (135383040 bytes asked for; 16000000000 bytes in all, "
        "1000000 free; LIPCERT_GPU_MEMORY_BYTES=140000000): serve fewer models, set a smaller LIPCERT_FORWARD_BATCH, "
        "raise LIPCERT_GPU_MEMORY_BYTES, or set LIPCERT_PROVIDER=cpu."
    )


def test_missing_memory_is_explained_where_the_driver_tells_no_figures() -> None:
    assert "for a batch of 8 images (CUDA failure 2: out of memory): serve fewer models" in explain(MEMORY, 8, 0)


def test_another_failure_is_explained_by_its_summary() -> None:
    assert explain(BUSY, None, 0) == (
        "the GPU does not run a graph that the CPU runs (CUDA failure 46: CUDA-capable device(s) is/are busy or "
        "unavailable). Check it with nvidia-smi, or set LIPCERT_PROVIDER=cpu."
    )
