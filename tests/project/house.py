"""Measure the house: sizes, language and docstrings of the product, as `docs/architecture.md` states them.

`python tests/project/house.py [PATH ...]` prints the figures of files below the paths (default: `service models`), then
every place that misses a limit.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULE_LINES = 450
CLASS_LINES = 220
MEDIAN_LINES = 150
WHAT_PER_1000 = 2.0
PARAPHRASES_PER_1000 = 0.3
PARAPHRASES = ("none", "anew", "so many", "kept", "shall", "is not to be had")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class House:
    """Figures of a set of modules."""

    lines: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    with_args: dict[str, bool] = field(default_factory=dict)
    """Public functions with three parameters or more: whether the docstring has `Args:`."""
    with_raises: dict[str, bool] = field(default_factory=dict)
    """Public functions with a `raise`: whether the docstring has `Raises:`, or states the error in its first line."""
    paraphrases: list[str] = field(default_factory=list)

    def per_1000(self, phrase: str) -> float:
        """Occurrences of a word or phrase per 1,000 words of comment and docstring."""
        text = " ".join(self.words)
        return 1000.0 * len(re.findall(rf"\b{phrase}\b", text)) / max(1, len(self.words))


def measure(paths: Sequence[str]) -> House:
    """Measure all Python files below paths that are relative to the root of the repository."""
    house = House()
    for path in paths:
        start = ROOT / path
        for file in sorted(start.rglob("*.py") if start.is_dir() else [start]):
            _add(house, file)
    return house


def _add(house: House, file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    name = str(file.relative_to(ROOT))
    tree = ast.parse(source)
    # A package that only says what it owns is no module.
    if file.name != "__init__.py" or any(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for node in tree.body):
        house.lines[name] = source.count("\n")
    for number, text in _texts(source, tree):
        words = re.findall(r"[a-z]+", text.lower())
        house.words += words
        joined = " ".join(words)
        house.paraphrases += [
            f"{name}:{number}: {phrase}"
            for phrase in ("what", *PARAPHRASES)
            for _ in re.findall(rf"\b{phrase}\b", joined)
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            house.classes[f"{name}:{node.lineno} {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    for function in _public(tree):
        place = f"{name}:{function.lineno} {function.name}"
        docstring = ast.get_docstring(function) or ""
        if _parameters(function) >= 3:
            house.with_args[place] = "Args:" in docstring
        if _raises(function):
            house.with_raises[place] = "Raises:" in docstring or "raise" in docstring.split("\n\n")[0].lower()


def _texts(source: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _public(node: ast.Module | ast.ClassDef) -> Iterator[Function]:
    for child in node.body:
        if isinstance(child, Function) and not child.name.startswith("_"):
            yield child
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _public(child)


def _parameters(function: Function) -> int:
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([one for one in names if one not in ("self", "cls")])


def _raises(function: Function) -> bool:
    """Whether the body itself (no nested function) raises an error of its own."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            pending += ast.iter_child_nodes(node)
    return False


def faults(house: House) -> list[str]:
    """Name every place that misses a limit."""
    found = [
        f"{name}: {lines} lines, limit {MODULE_LINES}" for name, lines in house.lines.items() if lines > MODULE_LINES
    ]
    found += [
        f"{name}: {lines} lines, limit {CLASS_LINES}" for name, lines in house.classes.items() if lines > CLASS_LINES
    ]
    found += [f"{place}: no Args:" for place, has in house.with_args.items() if not has]
    found += [f"{place}: no Raises:" for place, has in house.with_raises.items() if not has]
    if house.per_1000("what") > WHAT_PER_1000:
        found += [place for place in house.paraphrases if place.endswith(": what")]
    if sum(map(house.per_1000, PARAPHRASES)) > PARAPHRASES_PER_1000:
        found += [place for place in house.paraphrases if not place.endswith(": what")]
    return found


def main(paths: Sequence[str]) -> int:
    """Print the figures and the faults; return 1 if there is a fault."""
    house = measure(paths or ["service", "models"])
    longest = max(house.lines, key=house.lines.__getitem__)
    largest = max(house.classes, key=house.classes.__getitem__)
    print(f"modules {len(house.lines)}, median {statistics.median(house.lines.values()):g} lines")
    print(f"longest module {longest}: {house.lines[longest]}; largest class {largest}: {house.classes[largest]}")
    others = ", ".join(f"{phrase} {house.per_1000(phrase):.2f}" for phrase in PARAPHRASES)
    print(f"per 1,000 of {len(house.words)} words: what {house.per_1000('what'):.2f}, {others}")
    print(f"Args: {sum(house.with_args.values())} of {len(house.with_args)}")
    print(f"Raises: {sum(house.with_raises.values())} of {len(house.with_raises)}")
    found = faults(house)
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
