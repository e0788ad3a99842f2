"""Every sentence of README.md that a machine can check: answers, tables, commands, paths."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lipcert.__main__ import COMMANDS
from service.settings import variable_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
INLINE = re.findall(r"`([^`\n]+)`", README)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answer(generator: ModuleType) -> dict[str, Any]:
    return generator.example_answer(README)


def assert_same(shown: Any, given: Any, where: str = "answer") -> None:
    """Equal, but for the last of the digits that are shown."""
    assert type(shown) is type(given), where
    if isinstance(given, dict):
        assert shown.keys() == given.keys(), where
        for key in given:
            assert_same(shown[key], given[key], f"{where}.{key}")
    elif isinstance(given, list):
        assert len(shown) == len(given), where
        for position, (left, right) in enumerate(zip(shown, given, strict=True)):
            assert_same(left, right, f"{where}[{position}]")
    elif isinstance(given, float):
        # Another processor may sum in another order and so end the search for a counterfactual elsewhere.
        assert shown == pytest.approx(given, rel=1e-2 if where.endswith("distance") else 1e-3), where
    else:
        assert shown == given, where


def test_answer_of_the_readme_is_the_answer_of_the_service(generator: ModuleType, answer: dict[str, Any]) -> None:
    content = generator.block(README, "example").removeprefix("```json\n").removesuffix("```\n")
    assert content, "run `make readme`"
    assert_same(json.loads(content), answer)


def test_example_answers_with_a_counterfactual_outside_the_radius(answer: dict[str, Any]) -> None:
    assert answer["certificate"]["certified"]
    assert answer["counterfactual"]["reached"]
    assert answer["counterfactual"]["distance"] >= answer["certificate"]["radius"]


@pytest.mark.parametrize("name", ["settings", "models"])
def test_generated_table_is_up_to_date(generator: ModuleType, name: str) -> None:
    assert generator.block(README, name) == getattr(generator, f"{name}_block")(), "run `make readme`"


def test_table_of_models_has_both_shares_of_each_radius_and_says_which_uses_the_box() -> None:
    title, *rows = [line for line in README.splitlines() if "`proof=fast` |" in line or line.startswith("| `")]
    assert "| certified accuracy, `proof=fast` | certified accuracy, `proof=best` (uses the box) |" in title
    cells = {row.split("`")[1]: row.split(" | ") for row in rows}
    for path in (ROOT / "models" / "zoo").glob("*/card.json"):
        card = json.loads(path.read_text(encoding="utf-8"))
        for column, key in ((3, "value"), (4, "with_references")):
            shares = [f"{one[key]:.2%} at {one['epsilon']:.4g}" for one in card["certified_accuracy"] if key in one]
            assert cells[card["name"]][column] == ("<br>".join(shares) or "-")


def test_every_setting_is_in_the_readme() -> None:
    assert [name for name in variable_names() if f"| `{name}` |" not in README] == []
    assert set(re.findall(r"\bLIPCERT_[A-Z_]*[A-Z]\b", README)) <= set(variable_names())


def test_every_command_of_the_readme_runs_and_knows_its_options() -> None:
    commands = [shlex.split(code) for code in INLINE if re.match(r"python -m |lipcert \w", code)]
    assert {words[1] for words in commands if words[0] == "lipcert"} == set(COMMANDS)
    assert any(words[0] == "python" for words in commands)
    for words in commands:
        program, arguments = (words[0], words[1:]) if words[0] == "lipcert" else (words[2], words[3:])
        subcommand = [argument for argument in arguments[:1] if argument.islower() and argument != "..."]
        shown = help_of(program, *subcommand)
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert option in shown, (words, option)


@cache
def help_of(*command: str) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", *command, "--help"],
        cwd=ROOT,
        env={"COLUMNS": "200", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert shown.returncode == 0, (command, shown.stderr)
    return shown.stdout


def test_every_recipe_of_the_readme_exists() -> None:
    from models.recipes import RECIPES

    (row,) = (line for line in README.splitlines() if "lipcert train RECIPE" in line)
    # The recipe of a folder has a row of its own, `lipcert train DIR`.
    assert set(re.findall(r"`([\w-]+)`", row.rpartition("|")[0].rpartition("|")[2])) == set(RECIPES) - {"image-folder"}


def test_every_file_that_an_example_sends_exists() -> None:
    attached = re.findall(r"@(\S+)", SHELL)
    assert attached
    assert [path for path in attached if not (ROOT / path).exists()] == []


def test_shell_blocks_hold_only_commands_that_are_checked() -> None:
    assert {line.split()[0] for line in SHELL.splitlines()} == {"make", "docker", "curl"}
    assert "docker compose up" in SHELL.splitlines()
