"""Locks, Makefile and the choice between the two onnxruntime wheels."""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("serve-cpu.txt", "serve-gpu.txt", "test.txt", "build.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(lock: str) -> dict[str, set[str]]:
    """Name -> versions (several where they differ between versions of Python) of one lock."""
    versions: dict[str, set[str]] = {}
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def pinned(requirements: list[str]) -> dict[str, set[str]]:
    """The same of a list of pyproject.toml; everything there is pinned."""
    parts = [re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", line) for line in requirements]
    return {part[1].lower().replace("_", "-"): {part[2]} for part in parts if part}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_requirement_has_a_hash_and_no_address(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    requirements = re.split(r"\n(?=\S)", text.split("\n", 1)[1].strip())
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", requirement) for requirement in requirements)
    assert not re.search(r"://|index-url|find-links|extra-index", text)


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("serve-cpu.txt", ["cpu"]),
        ("serve-gpu.txt", ["gpu"]),
        ("test.txt", ["train", "evaluate", "client", "bulk", "test"]),
    ],
)
def test_lock_holds_what_pyproject_pins(lock: str, extras: list[str]) -> None:
    project = PROJECT["project"]
    requirements = list(project["dependencies"])
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    wanted = pinned(requirements)
    assert len(wanted) == len(requirements), "pyproject.toml pins exact versions: NAME==VERSION"
    wanted.pop("torch", None)
    have = locked(lock)
    assert {name: have.get(name) for name in wanted} == wanted, "run `make lock`"


def test_locks_agree_so_that_one_venv_serves_and_tests() -> None:
    test = locked("test.txt")
    for lock in ("serve-cpu.txt", "serve-gpu.txt", "build.txt"):
        shared = locked(lock).keys() & test.keys()
        assert shared
        assert {name: locked(lock)[name] for name in shared} == {name: test[name] for name in shared}


def test_no_lock_brings_torch_or_both_onnxruntime_wheels() -> None:
    both = {"onnxruntime", "onnxruntime-gpu"}
    assert locked("serve-cpu.txt").keys() & both == {"onnxruntime"}
    assert locked("serve-gpu.txt").keys() & both == {"onnxruntime-gpu"}
    assert not locked("test.txt").keys() & both
    assert not any("torch" in locked(lock) for lock in LOCKS)


def fake_driver(version: int, devices: int, status: int = 0) -> SimpleNamespace:
    def answer(value: int) -> Callable[[object], int]:
        def call(pointer: object) -> int:
            pointer._obj.value = value  # pyright: ignore
            return status

        return call

    return SimpleNamespace(
        cuInit=lambda flags: status, cuDriverGetVersion=answer(version), cuDeviceGetCount=answer(devices)
    )


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (None, "cpu"),
        (fake_driver(13_000, 1), "gpu"),
        (fake_driver(13_020, 8), "gpu"),
        (fake_driver(12_080, 1), "cpu"),
        (fake_driver(13_000, 0), "cpu"),
        (fake_driver(13_000, 1, status=100), "cpu"),
    ],
)
def test_gpu_wheel_is_taken_only_where_the_driver_can_run_it(
    driver: SimpleNamespace | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> SimpleNamespace:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    script = runpy.run_path(str(ROOT / "requirements/accelerator.py"))
    assert script["accelerator"]() == expected


def test_accelerator_is_found_before_anything_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "requirements/accelerator.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout in {"cpu\n", "gpu\n"}


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # These tests often run under `make test`, whose own choices are not theirs.
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ACCELERATOR", "PYTHON"}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in outer},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that `make` reads, without a .venv."""
    (tmp_path / "requirements").mkdir()
    for path in ("Makefile", "pyproject.toml", "requirements/accelerator.py"):
        shutil.copyfile(ROOT / path, tmp_path / path)
    for lock in LOCKS:
        shutil.copyfile(ROOT / "requirements" / lock, tmp_path / "requirements" / lock)
    return tmp_path


def fake_python(folder: Path, script: str) -> Path:
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@needs_make
def test_make_alone_shows_the_targets(checkout: Path) -> None:
    result = make(checkout)
    assert result.returncode == 0
    assert {"serve", "train", "test", "lock", "image"} <= set(re.findall(r"^make (\w+)", result.stdout, re.MULTILINE))


@needs_make
def test_too_old_python_is_refused_with_what_to_install(checkout: Path) -> None:
    python = fake_python(checkout, 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.9.2;; esac')
    result = make(checkout, "serve", f"PYTHON={python}", "ACCELERATOR=cpu")
    assert result.returncode != 0
    assert "needs Python 3.11 or newer" in result.stderr
    assert "Python 3.9.2" in result.stderr
    assert "apt-get install python3 python3-venv" in result.stderr


@needs_make
def test_missing_venv_is_refused_with_what_to_install(checkout: Path) -> None:
    python = fake_python(checkout, 'case "$*" in *ensurepip*) exit 1;; esac')
    result = make(checkout, "serve", f"PYTHON={python}", "ACCELERATOR=cpu")
    assert result.returncode != 0
    assert "apt-get install python3-venv" in result.stderr


@needs_make
def test_unknown_accelerator_is_refused(checkout: Path) -> None:
    result = make(checkout, "serve", "ACCELERATOR=tpu")
    assert result.returncode != 0
    assert "set it to cpu or gpu" in result.stderr


@needs_make
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_make_serve_installs_one_hash_lock_and_no_torch(checkout: Path, accelerator: str) -> None:
    result = make(checkout, "--dry-run", "serve", f"ACCELERATOR={accelerator}", f"PYTHON={sys.executable}")
    installs = [line for line in result.stdout.splitlines() if re.search(r"-m pip .*\binstall\b", line)]
    assert [re.findall(r"-r (\S+)", line) for line in installs] == [
        [f"requirements/serve-{accelerator}.txt"],
        ["requirements/build.txt"],
        [],
    ]
    assert all("--require-hashes" in line for line in installs[:2])
    assert "--no-deps" in installs[2]
    assert "torch" not in result.stdout


@needs_make
def test_second_call_of_make_serve_installs_nothing(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    for stamp in ("created", "serve-cpu", "project"):
        (checkout / ".venv" / stamp).touch()
    result = make(checkout, "--dry-run", "serve", "ACCELERATOR=cpu", f"PYTHON={sys.executable}")
    assert result.stdout.split() == ["exec", ".venv/bin/python", "-m", "service"]


@needs_make
def test_make_test_is_make_check_and_every_other_test_once(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    for stamp in ("created", "serve-cpu", "test", "project"):
        (checkout / ".venv" / stamp).touch()
    settings = ("ACCELERATOR=cpu", f"PYTHON={sys.executable}")
    check = make(checkout, "--dry-run", "check", *settings).stdout.splitlines()
    checks = [line.removeprefix(".venv/bin/").split(" tests/")[0] for line in check if line.startswith(".venv/bin/")]
    assert sorted(checks) == [
        "lint-imports",
        "python -m pyright --pythonpath .venv/bin/python",
        "python -m pytest --quiet",
        "python -m ruff check .",
        "python -m ruff format --check .",
    ]
    (documents,) = (re.findall(r"tests/\S+", line) for line in check if "pytest" in line)
    assert documents
    assert all((ROOT / file).exists() for file in documents)
    *before, last = make(checkout, "--dry-run", "test", *settings).stdout.splitlines()
    assert before == check
    processes = str((os.cpu_count() or 1) + 1)
    shared = ["-n", processes, "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    assert last.split() == [".venv/bin/python", "-m", "pytest", *shared, *(f"--ignore={file}" for file in documents)]
