"""Engines of an artefact: loaded when they are first run, from the verified bytes; on a GPU compared with the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from builders import random_groupsort, write
from fake_gpu import NO_KERNEL, FakeGpu

from service.artefact.engines import lazy_engines, probe
from service.artefact.files import MODEL_FILE
from service.artefact.findings import Findings
from service.artefact.verification import verify
from service.artefact.verified_files import VerifiedFiles
from service.errors import ArtefactError, ProviderError
from service.runtime.provider import CPU, CUDA
from service.runtime.session import GpuLimits

IMAGE = np.zeros((1, 1, 4, 4))
WEIGHTS = np.zeros((1, 3))


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    write(tmp_path, random_groupsort(0))
    return verify(tmp_path)


@pytest.fixture
def files(tmp_path: Path, findings: Findings) -> VerifiedFiles:
    return VerifiedFiles(tmp_path, "test", {MODEL_FILE: findings.digest})


def test_on_a_gpu_too_a_graph_is_loaded_when_it_is_first_run(
    monkeypatch: pytest.MonkeyPatch, files: VerifiedFiles, findings: Findings
) -> None:
    gpu = FakeGpu().install(monkeypatch)
    model, gradient = lazy_engines(files, findings, "cuda", 1, GpuLimits(batch=4, memory_bytes=5_000_000))
    assert (model.provider, gradient.provider) == (CUDA, CUDA)
    assert gpu.opened == []
    on_cpu, _ = lazy_engines(files, findings, "cpu", 1)
    assert on_cpu.provider == CPU
    np.testing.assert_array_equal(
        model.run(["logits"], {"image": IMAGE})[0], on_cpu.run(["logits"], {"image": IMAGE})[0]
    )
    assert len(gpu.opened) == 1
    # Warm-up, the comparison with the CPU, the request.
    assert gpu.sizes == [4, 2, 1, 1, 1]
    gradient.run(["logits", "gradient"], {"image": IMAGE, "margin_weights": WEIGHTS})
    assert len(gpu.opened) == 2
    assert all(providers[0][1]["gpu_mem_limit"] == "5000000" for _, providers in gpu.opened)


def test_both_graphs_are_compared_on_an_image_with_every_grey_level(findings: Findings) -> None:
    facts = findings.facts()
    image = probe(facts.certificate)
    assert image.shape == (1, 1, 4, 4)
    assert (image.min(), image.max(), len(np.unique(image))) == (0.0, 1.0, 16)
    assert facts.logits_NK.shape == (1, 3)


@pytest.mark.parametrize(("offset", "refused"), [(0.0, False), (1e-9, True)])
def test_a_gpu_whose_logits_are_outside_the_proved_error_is_refused(
    monkeypatch: pytest.MonkeyPatch, files: VerifiedFiles, findings: Findings, offset: float, refused: bool
) -> None:
    FakeGpu(offset=offset).install(monkeypatch)
    model, gradient = lazy_engines(files, findings, "cuda", 1, GpuLimits(batch=1))
    inputs = {"image": IMAGE, "margin_weights": WEIGHTS}
    for engine, names in ((model, ["image"]), (gradient, inputs)):
        refusal = pytest.raises(ProviderError, match=r"model\.onnx: .* no radius would hold")
        with refusal if refused else nullcontext():
            engine.run(["logits"], {name: inputs[name] for name in names})


def test_a_gpu_that_computes_nan_is_refused(
    monkeypatch: pytest.MonkeyPatch, files: VerifiedFiles, findings: Findings
) -> None:
    FakeGpu(offset=float("nan")).install(monkeypatch)
    model, _ = lazy_engines(files, findings, "cuda", 1, GpuLimits(batch=1))
    with pytest.raises(ProviderError, match="no radius would hold"):
        model.run(["logits"], {"image": IMAGE})


def test_a_failure_of_the_gpu_names_the_file_and_blames_the_provider(
    monkeypatch: pytest.MonkeyPatch, files: VerifiedFiles, findings: Findings
) -> None:
    FakeGpu(open_failure=NO_KERNEL).install(monkeypatch)
    model, _ = lazy_engines(files, findings, "cuda", 1)
    with pytest.raises(ProviderError, match=r"model\.onnx: the GPU does not run a graph that the CPU runs"):
        model.run(["logits"], {"image": IMAGE})


def test_findings_with_a_fault_give_no_engines(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="missing"):
        lazy_engines(VerifiedFiles(tmp_path, "test", {}), verify(tmp_path), "cpu", 1)
