"""`docs/soundness.md` against the code: operators, functions, tests and mutants that it names."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
from random_graphs import STEPS

from service.certificate.rules.table import RULES

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "soundness.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[(`[^`]+`|mutant \"[^\"]+\")\]\(\.\./([\w/.]+\.py)\)", PAGE)
MUTATIONS = "tests/service/certificate/test_mutations.py"


def test_every_operator_with_a_rule_has_its_place_in_the_table() -> None:
    table = PAGE.split("| operators |")[1].split("\n\n")[0]
    operators = {word for row in table.splitlines() for word in re.findall(r"\w+", row.split(" | ")[0])}
    assert set(RULES) <= operators | {"Sqrt"}


def test_every_kernel_that_may_run_has_its_assumption() -> None:
    table = PAGE.split("| kernels |")[1].split("\n\n")[0]
    kernels = {word for row in table.splitlines() for word in re.findall(r"\w+", row.split(" | ")[0])}
    # Refused by its rule.
    assert set(RULES) - {"ThresholdedRelu", "Sign"} <= kernels


def test_every_rule_names_its_function_and_its_test() -> None:
    tables = [part.split("\n\n")[0] for part in re.split(r"\|(?:---\|){4,}\n", PAGE)[1:]]
    assert len(tables) == 2
    for row in (row for table in tables for row in table.splitlines()):
        *_, function, test, _ = re.split(r"(?<!\\)\|", row)
        assert "](../service/certificate/" in function, row
        assert "](../tests/service/certificate/" in test or test.strip() == "the same", row


@pytest.mark.parametrize(("text", "file"), sorted({link for link in LINKS if link[1].startswith("service/")}))
def test_every_function_that_is_named_exists(text: str, file: str) -> None:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    reduce(getattr, text.strip("`").split("."), module)


@pytest.mark.parametrize(("text", "file"), sorted({link for link in LINKS if link[1].startswith("tests/")}))
def test_every_test_that_is_named_exists(text: str, file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    if text.startswith("mutant"):
        assert f'"{text.removeprefix("mutant ").strip(chr(34))}"' in source
        return
    name, step = re.fullmatch(r"`(\w+)(?:\[(\w+)\])?`", text).groups()
    assert f"def {name}(" in source
    assert step is None or step in STEPS


def test_every_mutant_is_the_loss_of_a_rule_on_the_page() -> None:
    source = (ROOT / MUTATIONS).read_text(encoding="utf-8")
    mutants = set(re.findall(r'Mutant\(\s*\d+,\s*"([^"]+)"', source))
    assert len(mutants) > 40
    assert mutants == {text.removeprefix("mutant ").strip('"') for text, _ in LINKS if text.startswith("mutant")}
