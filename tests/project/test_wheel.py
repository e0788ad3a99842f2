"""A wheel, installed without the checkout: it serves its model, and its command works from any directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lipcert", "models", "service")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="paths of a venv on POSIX")


def run(*command: str | Path, folder: Path) -> str:
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def environment(**settings: str) -> dict[str, str]:
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("LIPCERT_", "PYTHON"))}
    return {**outer, **settings}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy: a build leaves files in its source."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copyfile(ROOT / name, folder / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ".", folder=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a venv with the wheel and, by a path file, the libraries of this one; not its editable project."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=folder)
    (libraries,) = folder.glob("lib/python*/site-packages")
    (libraries / "libraries.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    return folder / "bin"


@pytest.fixture(scope="module")
def url(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `lipcert serve` in a directory that has nothing to do with the checkout."""
    with subprocess.Popen(
        [installed / "lipcert", "serve"],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment(LIPCERT_PORT="0", LIPCERT_PROVIDER="cpu"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            log: list[str] = []
            address = None
            for line in process.stderr:
                log.append(line)
                found = re.search(r"serving on (http://\S+)", line)
                address = found[1] if found else address
                if "startup complete" in line:
                    break
            assert address is not None, "".join(log)
            yield address
        finally:
            process.terminate()
            process.communicate(timeout=20)
    assert process.returncode == 0


def get(url: str | urllib.request.Request) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as response:
        return response.read()


def test_wheel_serves_its_model_from_another_directory(url: str) -> None:
    (model,) = json.loads(get(f"{url}/models"))["models"]
    assert model["name"] == "mnist"
    request = urllib.request.Request(
        f"{url}/predict",
        (ROOT / "service/static/samples/mnist-7.png").read_bytes(),
        {"content-type": "image/png"},
    )
    answer = json.loads(get(request))
    assert answer["label"] == "7"
    assert answer["digest"] == model["digest"]
    assert answer["certificate"]["certified"]


@pytest.mark.parametrize("path", ["/", "/docs", "/static/swagger-ui/swagger-ui-bundle.js", "/openapi.json"])
def test_wheel_has_the_pages_of_the_service(url: str, path: str) -> None:
    assert get(f"{url}{path}")


def test_command_of_the_wheel_certifies_the_model_that_it_serves(url: str, installed: Path, tmp_path: Path) -> None:
    (file,) = installed.parent.glob("lib/python*/site-packages/models/zoo/*/model.onnx")
    proved = json.loads(run(installed / "lipcert", "certify", file, folder=tmp_path))
    (model,) = json.loads(get(f"{url}/models"))["models"]
    assert proved["digest"] == model["digest"]


def test_wheel_runs_the_code_that_it_contains(installed: Path, tmp_path: Path) -> None:
    code = f"import sys, {', '.join(PACKAGES)}; print(*(module.__path__[0] for module in ({', '.join(PACKAGES)})))"
    assert all(str(installed.parent) in path for path in run(installed / "python", "-c", code, folder=tmp_path).split())


def test_wheel_names_version_and_licence(installed: Path, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    code = (
        "from importlib.metadata import metadata; m = metadata('lipcert'); print(m['Version'], m['License-Expression'])"
    )
    assert run(installed / "python", "-c", code, folder=tmp_path).strip() == f"{__version__} {project['license']}"
