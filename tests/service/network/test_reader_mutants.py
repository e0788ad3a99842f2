"""The reader with one of its checks dropped: a file that was refused is read, or refused for another reason.

A mutant is a function in which one `raise` or one `reasons.append` does nothing. `make thorough` tries
all of them (a minute or two), `make test` one in ten; `pytest -s` prints how many were noticed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, ModuleType

import numpy as np
from random_graphs import GraphBuilder
from test_hostile import NO_MODEL, TWO_READINGS, model_of
from test_reader import REFUSED
from test_refusals import REFUSALS
from thorough import often

from service.network.operators import UnsupportedModelError
from service.network.reader import read

EVERY = often(10, 1)
MODULES = [
    *(f"service.network.lowering.{name}" for name in ("elementwise", "linear", "rearrangements", "reductions")),
    *(f"service.network.lowering.{name}" for name in ("resampling", "table", "windows")),
    *(f"service.network.{name}" for name in ("constants", "limits", "nodes", "reader")),
]
_OF_SIZES = ("size_error", "MOST_", "too large")
_CHECKER = "the checker of onnx refuses such a file before"
_FOLDED = "a node without a tensor among its operands is evaluated as a constant before"
SPARED = {
    "limits as attributes, which": _CHECKER,
    "it needs two operands": _CHECKER,
    "it needs scale, bias": _CHECKER,
    "it needs scales": _CHECKER,
    "'it names no axes'": _CHECKER,
    "must be an integer": _CHECKER,
    "must be a list of integers": _CHECKER,
    "must be given once": _CHECKER,
    "are given twice": _CHECKER,
    "is given twice": _CHECKER,
    "output.reason": _CHECKER,
    "no proved rule for attribute": _CHECKER,
    "one operand must depend": _FOLDED,
    "nothing is left": "in Slice and for every tensor: each stands for the other",
    "Refusal(ROUNDS)": "before the evaluation and in it: each stands for the other",
    "does not hold numbers": "types of elements are checked before",
    "that does not hold numbers": "types of elements are checked before",
    "is stored outside the file": "has a test with a file",
    "its operands do not fit": "for whatever error numpy may raise",
}
"""Checks that no other file notices, by a part of their text, and why."""


@dataclass(frozen=True)
class Mutant:
    """A check that does nothing."""

    module: str
    line: int
    text: str
    function: FunctionType
    code: CodeType


def _is_check(node: ast.AST) -> bool:
    """Whether it is one; limits of sizes have tests of their own, and without them a file takes all memory."""
    if any(word in ast.unparse(node) for word in _OF_SIZES):
        return False
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return ast.unparse(node.exc.func) in ("Refusal", "UnsupportedModelError", "ValueError")
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("reasons.append")


def _functions(module: ModuleType) -> dict[int, FunctionType]:
    """Return the functions and methods of a module by the line of their code."""
    owners = [module, *(one for one in vars(module).values() if inspect.isclass(one))]
    found = (inspect.unwrap(one) for owner in owners for one in vars(owner).values() if inspect.isfunction(one))
    return {one.__code__.co_firstlineno: one for one in found if one.__code__.co_filename == module.__file__}


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


@cache
def mutants() -> tuple[Mutant, ...]:
    """Return one in `EVERY`."""
    found: list[Mutant] = []
    number = itertools.count()
    for name in MODULES:
        module = importlib.import_module(name)
        source = inspect.getsource(module)
        functions = _functions(module)
        checks = [node.lineno for node in ast.walk(ast.parse(source)) if _is_check(node)]
        for line in sorted(set(checks)):
            if next(number) % EVERY:
                continue
            tree = ast.parse(source)
            for parent in ast.walk(tree):
                for body in (getattr(parent, field, None) for field in ("body", "orelse")):
                    for place, node in enumerate(body if isinstance(body, list) else []):
                        if _is_check(node) and node.lineno == line:
                            text = ast.unparse(node)
                            body[place] = ast.copy_location(ast.Pass(), node)
            whole = compile(tree, str(module.__file__), "exec")
            around = [code for code in _codes(whole) if code.co_firstlineno in functions and code.co_firstlineno < line]
            code = max(around, key=lambda one: one.co_firstlineno)
            found.append(Mutant(name, line, text, functions[code.co_firstlineno], code))
    return tuple(found)


@cache
def files() -> tuple[tuple[bytes, str], ...]:
    """Return files that are refused, each with the reasons."""
    models = [build() for build, _ in NO_MODEL.values()]
    models += [model_of(build, shape, opset) for opset, shape, build, _ in TWO_READINGS.values()]
    models += [_model(build, (4,), 18) for build, _ in REFUSED.values()]
    models += [_model(case[1], case[0], case[3] if len(case) > 3 else 18) for case in REFUSALS]
    return tuple((model, _outcome(model)) for model in models)


def _model(build: Callable[[GraphBuilder], str], shape: tuple[int, ...], opset: int) -> bytes:
    builder = GraphBuilder(np.random.default_rng(0), dtype=np.float64, opset=opset)
    return builder.model(shape, build(builder), 4)


def _outcome(model: bytes) -> str:
    try:
        read(model)
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # A mutant may end in any way.
        return f"not refused: {error!r}"
    return "read"


@contextmanager
def _replaced(mutant: Mutant) -> Iterator[None]:
    before = mutant.function.__code__
    mutant.function.__code__ = mutant.code
    try:
        yield
    finally:
        mutant.function.__code__ = before


def _is_noticed(mutant: Mutant) -> bool:
    # The file whose reasons read like the check comes first.
    words = {word for word in mutant.text.split() if word.isalpha() and len(word) > 3}
    ordered = sorted(files(), key=lambda one: -len(words & set(one[1].split())))
    with _replaced(mutant):
        return any(_outcome(model) != reasons for model, reasons in ordered)


def test_a_check_that_is_dropped_is_noticed() -> None:
    chosen = mutants()
    unnoticed = [f"{one.module}:{one.line} {one.text}" for one in chosen if not _is_noticed(one)]
    sys.stdout.write(f"{len(chosen) - len(unnoticed)} of {len(chosen)} noticed\n" + "\n".join(unnoticed) + "\n")
    assert [one for one in unnoticed if not any(part in one for part in SPARED)] == []
