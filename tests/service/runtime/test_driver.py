"""The driver is asked before ONNX Runtime is: whatever is missing is named with its cure."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_gpu import FakeGpu

from service.runtime import driver

ROOT = Path(__file__).resolve().parents[3]


def test_nothing_is_missing_where_driver_and_gpu_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu().install(monkeypatch)
    assert driver.obstacle() is None


@pytest.mark.parametrize(
    ("gpu", "complaint"),
    [
        (
            FakeGpu(version=12_040),
            r"driver supports CUDA 12\.4, and this ONNX Runtime needs CUDA 13\.0; .* version 580",
        ),
        (FakeGpu(version=12_090, init=100), r"supports CUDA 12\.9"),
        (FakeGpu(init=100), "cuInit returned 100"),
        (FakeGpu(devices=0), "sees no GPU"),
        (FakeGpu(mode=2), "compute mode Prohibited"),
    ],
    ids=["driver of CUDA 12.4", "old driver that does not start", "broken driver", "no GPU", "prohibited"],
)
def test_an_obstacle_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu, complaint: str) -> None:
    gpu.install(monkeypatch)
    assert re.search(complaint, driver.obstacle() or "")


def test_an_exclusive_gpu_may_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(mode=3).install(monkeypatch)
    assert driver.obstacle() is None


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert "libcuda.so.1 cannot be loaded" in (driver.obstacle() or "")
    assert driver.memory() is None


@pytest.mark.parametrize(
    ("machine", "capability", "fits"),
    [
        ("x86_64", (7, 5), True),  # T4
        ("x86_64", (8, 0), True),  # A100
        ("x86_64", (8, 6), True),  # A10
        ("x86_64", (8, 7), True),  # runs the code of 8.6
        ("x86_64", (8, 9), True),  # L4
        ("x86_64", (9, 0), True),  # H100, H200
        ("x86_64", (12, 0), True),  # RTX PRO 6000
        ("x86_64", (7, 0), False),  # V100
        ("x86_64", (6, 1), False),  # P4
        ("x86_64", (10, 0), False),  # B200
        ("x86_64", (10, 3), False),  # B300
        ("x86_64", (12, 1), False),  # the code of 12.0 is architecture-specific
        ("aarch64", (12, 1), True),  # GB10
        ("aarch64", (9, 0), True),  # GH200
        ("aarch64", (8, 0), False),
        ("aarch64", (10, 0), False),  # GB200
        ("riscv64", (10, 0), True),  # no wheel: nothing is known
    ],
)
def test_a_compute_capability_without_code_in_the_wheel_is_an_obstacle(
    monkeypatch: pytest.MonkeyPatch, machine: str, capability: tuple[int, int], fits: bool
) -> None:
    FakeGpu(capability=capability).install(monkeypatch)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    found = driver.obstacle()
    assert (found is None) is fits
    if not fits:
        assert f"the GPU has compute capability {capability[0]}.{capability[1]}, and this ONNX Runtime" in (found or "")


def test_a_driver_without_newer_functions_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu().install(monkeypatch)
    library = ctypes.CDLL("libcuda.so.1")
    old = SimpleNamespace(cuInit=library.cuInit, cuDeviceGetCount=library.cuDeviceGetCount)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: old)
    assert gpu.devices == 1
    assert driver.obstacle() is None
    assert driver.memory() is None


@pytest.mark.parametrize("free", [1_000_000, None])
def test_memory_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    FakeGpu(free_bytes=free).install(monkeypatch)
    assert driver.memory() == (16_000_000_000, free)


def test_version_and_capabilities_are_those_of_the_locked_wheel() -> None:
    lock = (ROOT / "requirements" / "serve-gpu.txt").read_text(encoding="utf-8")
    (wheel,) = re.findall(r"^onnxruntime-gpu==(\S+)", lock, re.MULTILINE)
    (major,) = re.findall(r"^nvidia-cuda-runtime==(\d+)\.", lock, re.MULTILINE)
    # Another wheel may have code for other GPUs: read them from it.
    assert f"onnxruntime-gpu {wheel}:" in Path(driver.__file__).read_text(encoding="utf-8")
    assert 1000 * int(major) == driver.CUDA_VERSION


def test_the_driver_is_asked_before_anything_is_installed() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import service.runtime.driver"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=60)
