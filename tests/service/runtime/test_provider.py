"""Execution providers: what was asked for is what runs, or an error that says what is missing; `auto` warns."""

from __future__ import annotations

import logging
import os

import onnxruntime
import pytest
from fake_gpu import FakeGpu

from service.errors import ProviderError
from service.runtime import provider
from service.runtime.provider import CPU, Resolved, load_on, resolve_provider


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_cpu_never_asks_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: pytest.fail("asked"))
    assert resolve_provider("cpu") == "cpu"


def test_auto_falls_back_to_the_cpu_and_warns_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: "no driver; install one.")
    assert resolve_provider("auto") == "cpu"
    assert warnings_of(caplog) == ["serving on the CPU: no driver; install one. Or set LIPCERT_PROVIDER=cpu."]


def test_cuda_without_a_cuda_build_is_an_error_that_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderError, match="install the `gpu` extra"):
        resolve_provider("cuda")


@pytest.mark.parametrize(
    ("gpu", "complaint"),
    [
        (FakeGpu(version=12_080), r"CUDA 12\.8.*CUDA 13\.0"),
        (FakeGpu(capability=(10, 0)), r"capability 10\.0"),
        (FakeGpu(init=802), "cuInit returned 802"),
    ],
)
def test_a_driver_or_gpu_that_does_not_fit_ends_cuda_and_is_a_warning_of_auto(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpu: FakeGpu, complaint: str
) -> None:
    gpu.install(monkeypatch)
    with pytest.raises(ProviderError, match=f"LIPCERT_PROVIDER=cuda is not available: .*{complaint}"):
        resolve_provider("cuda")
    assert resolve_provider("auto") == "cpu"
    (warning,) = warnings_of(caplog)
    assert warning.startswith("serving on the CPU: the ")


def test_nothing_in_the_environment_makes_cuda_compute_in_narrower_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    names = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION")
    for name in names:
        monkeypatch.setenv(name, "1")
    assert resolve_provider("auto") == "cuda"
    assert [os.environ[name] for name in names] == ["0", "0", "0"]


def test_auto_loads_on_the_cpu_where_the_gpu_fails_and_cuda_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FakeGpu().install(monkeypatch)
    tried: list[Resolved] = []

    def load(resolved: Resolved) -> str:
        tried.append(resolved)
        if resolved == "cuda":
            raise ProviderError("the GPU is busy")
        return "loaded"

    with pytest.raises(ProviderError, match="busy"):
        load_on("cuda", load)
    assert load_on("auto", load) == "loaded"
    assert tried == ["cuda", "cuda", "cpu"]
    assert warnings_of(caplog) == ["serving on the CPU: the GPU is busy"]


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_an_error_of_the_cpu_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, asked: provider.Provider) -> None:
    monkeypatch.setattr(provider, "missing_for_cuda", lambda: "no driver.")
    tried: list[Resolved] = []

    def load(resolved: Resolved) -> None:
        tried.append(resolved)
        raise ProviderError("no")

    with pytest.raises(ProviderError):
        load_on(asked, load)
    assert tried == ["cpu"]
