"""The command `lipcert` is the command lines of the packages under one name, and loads no more than they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import builders
import pytest
from commands import run_command

from lipcert.__main__ import COMMANDS, main
from service.certificate.__main__ import main as certify

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    builders.write(tmp_path / "small", builders.random_groupsort(0), "small")
    return tmp_path / "small" / "model.onnx"


def test_certify_prints_what_the_certifier_prints(model_file: Path) -> None:
    result = run_command(main, ["certify", str(model_file)])
    assert result == run_command(certify, [str(model_file)])
    assert result.exit_code == 0
    assert json.loads(result.output)["lipschitz_bound"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["certify", "missing.onnx"], 2, "missing.onnx: cannot be read"),
        (["import", "missing.onnx", "--out", "out"], 2, "missing.onnx: it cannot be read"),
        (["train", "nonsense", "--out", "out"], 1, "error: no recipe 'nonsense'"),
        (["evaluate", "missing"], 1, "card.json"),
        (["convert", "missing", "--out", "out"], 1, "card.json"),
    ],
)
def test_exit_status_is_that_of_the_entry_point(arguments: list[str], status: int, message: str) -> None:
    result = run_command(main, arguments)
    assert result.exit_code == status
    assert message in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_itself_under_its_own_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lipcert {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_of_a_command_ends_with_status_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--nonsense"])
    assert stopped.value.code == 2
    assert f"lipcert {command}: error: " in capsys.readouterr().err or command == "serve"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == shown
    words = " ".join(shown.split())
    assert all(f" {name} {text}" in words for name, text in COMMANDS.items())


def test_unknown_command_is_refused_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fly"])
    assert stopped.value.code == 2
    assert all(f"'{name}'" in capsys.readouterr().err for name in list(COMMANDS)[:1])


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("serve", {"numpy", "onnx", "onnxruntime", "pydantic", "uvicorn", "models"}),
        ("predict", {"numpy", "onnx", "onnxruntime", "pydantic", "uvicorn", "models", "httpx"}),
        ("audit", {"numpy", "onnx", "onnxruntime", "pydantic", "uvicorn", "models"}),
        ("import", {"numpy", "onnx", "onnxruntime", "pydantic", "uvicorn", "models"}),
        ("evidence", {"numpy", "onnx", "onnxruntime", "pydantic", "uvicorn", "models"}),
        ("certify", {"onnxruntime", "pydantic", "uvicorn", "models"}),
        ("train", {"torch", "numpy", "onnx", "onnxruntime", "uvicorn"}),
        ("evaluate", {"torch", "numpy", "onnx", "onnxruntime", "uvicorn"}),
        ("convert", {"torch", "numpy", "onnx", "onnxruntime", "uvicorn"}),
    ],
)
def test_help_of_a_command_loads_no_library_of_another(command: str, absent: set[str]) -> None:
    code = f"""
import sys
from lipcert.__main__ import main
try:
    main([{command!r}, "--help"])
finally:
    loaded = {absent!r} & set(sys.modules)
    if loaded:
        sys.exit(f"loaded: {{loaded}}")
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "library", "advice"),
    [
        (
            ["train", "mnist", "--out", "out"],
            "torch",
            "pip install 'lipcert[cpu,train]'` (in a checkout: `make train`)",
        ),
        (["convert", "models/zoo/mnist", "--out", "out"], "torch", "pip install 'lipcert[cpu,train]'"),
        (["calibrate", "models/zoo/mnist"], "torch", "pip install 'lipcert[cpu,train]'"),
        (["evaluate", "models/zoo/mnist"], "onnxruntime", "pip install 'lipcert[cpu,train,evaluate]'"),
        (["serve"], "onnxruntime", "pip install 'lipcert[cpu]'"),
        (["evidence", "models/zoo/mnist", "--out", "out"], "onnxruntime", "pip install 'lipcert[cpu]'"),
    ],
)
def test_command_without_its_library_says_what_to_install(arguments: list[str], library: str, advice: str) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {library!r} else find(name, package)
sys.meta_path.insert(0, Missing())
from lipcert.__main__ import main
sys.exit(main({arguments!r}))
"""
    result = python(code)
    assert result.returncode == 1, result.stderr
    assert library in result.stderr
    assert advice in result.stderr
    assert "Traceback" not in result.stderr
