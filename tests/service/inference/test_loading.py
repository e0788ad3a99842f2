"""Loading of all artefacts: the default model runs before anything is served, on the provider that works."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import LIMIT_REACHED, NO_KERNEL, OUT_OF_MEMORY, FakeGpu, failed_call

from service.artefact.findings import Findings
from service.artefact.pool import VerifierPool
from service.artefact.verification import verify
from service.errors import ProviderError
from service.inference.loading import load_classifiers
from service.runtime.provider import CPU, CUDA, Provider
from service.settings import Settings

BUSY = failed_call(46, "CUDA-capable device(s) is/are busy or unavailable")


class Pool(VerifierPool):
    """Verifies in this process, each artefact once."""

    def __init__(self) -> None:
        self._known: dict[Path, Findings] = {}

    def findings(self, folder: Path) -> Findings:
        if folder not in self._known:
            self._known[folder] = verify(folder)
        return self._known[folder]


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


def settings_for(zoo: Path, provider: Provider, **others: int) -> Settings:
    return Settings(models=zoo, default_model="grey", provider=provider, **others)  # type: ignore[arg-type]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_on_a_gpu_only_the_default_model_is_loaded_at_the_start(
    monkeypatch: pytest.MonkeyPatch, zoo: Path, pool: Pool
) -> None:
    gpu = FakeGpu().install(monkeypatch)
    classifiers = load_classifiers(settings_for(zoo, "cuda"), pool)
    assert {classifier.provider for classifier in classifiers.values()} == {CUDA}
    # Both graphs of `grey`.
    assert len(gpu.opened) == 2
    classifiers["colour"].predict(np.zeros((1, *classifiers["colour"].input_shape)))
    assert len(gpu.opened) == 3


def test_on_a_gpu_the_settings_limit_batch_and_memory(monkeypatch: pytest.MonkeyPatch, zoo: Path, pool: Pool) -> None:
    gpu = FakeGpu().install(monkeypatch)
    load_classifiers(settings_for(zoo, "cuda", forward_batch=3, gpu_memory_bytes=7_000_000), pool)
    assert max(gpu.sizes) == 3
    assert {providers[0][1]["gpu_mem_limit"] for _, providers in gpu.opened} == {"7000000"}


@pytest.mark.parametrize(
    ("gpu", "complaint"),
    [
        (FakeGpu(version=12_040), r"CUDA 12\.4"),
        (FakeGpu(capability=(10, 0)), r"compute capability 10\.0"),
        (FakeGpu(open_failure=BUSY), "CUDA failure 46"),
        (FakeGpu(given=[CPU]), "could not start its CUDA provider"),
        (FakeGpu(run_failure=lambda size: NO_KERNEL), "no kernel image"),
        (
            FakeGpu(run_failure=lambda size: OUT_OF_MEMORY),
            "the memory of the GPU is too small for a batch of 256 images",
        ),
        (FakeGpu(open_failure=LIMIT_REACHED), "too small for the weights"),
        (FakeGpu(offset=1e-3), "no radius would hold"),
    ],
    ids=["old driver", "no code", "exclusive", "silent fallback", "no kernel", "memory", "limit", "wrong logits"],
)
def test_a_gpu_that_does_not_work_ends_cuda_and_is_a_warning_of_auto(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    zoo: Path,
    pool: Pool,
    gpu: FakeGpu,
    complaint: str,
) -> None:
    gpu.install(monkeypatch)
    with pytest.raises(ProviderError, match=complaint):
        load_classifiers(settings_for(zoo, "cuda"), pool)
    assert warnings_of(caplog) == []
    classifiers = load_classifiers(settings_for(zoo, "auto"), pool)
    assert {classifier.provider for classifier in classifiers.values()} == {CPU}
    (warning,) = warnings_of(caplog)
    assert warning.startswith("serving on the CPU: ")
    for classifier in classifiers.values():
        classifier.predict(np.zeros((1, *classifier.input_shape)))


def test_auto_takes_a_gpu_that_works_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, zoo: Path, pool: Pool
) -> None:
    FakeGpu().install(monkeypatch)
    classifiers = load_classifiers(settings_for(zoo, "auto"), pool)
    assert {classifier.provider for classifier in classifiers.values()} == {CUDA}
    assert warnings_of(caplog) == []


def test_an_error_of_the_gpu_names_the_file(monkeypatch: pytest.MonkeyPatch, zoo: Path, pool: Pool) -> None:
    FakeGpu(open_failure=BUSY).install(monkeypatch)
    with pytest.raises(ProviderError, match=r"grey/model\.onnx: "):
        load_classifiers(settings_for(zoo, "cuda"), pool)
