"""The examples of docs/client.md and of the README's Python block print what the pages say, from the shipped models."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer

from lipcert.__main__ import main
from service.api.app import create_app
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"


def examples(page: str) -> list[tuple[str, str, str]]:
    """Return language, code and printed text of each example: a block of code, and the block `text` right after it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```(python|sh)\n((?:(?!```).*\n)*)```\n\n```text\n((?:(?!```).*\n)*)```", text, re.MULTILINE)


EXAMPLES = [(page, *example) for page in ("docs/client.md", "README.md") for example in examples(page)]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with LiveServer(create_app(Settings(provider="cpu"))) as server:
        yield f"http://127.0.0.1:{server.port}"


def rounded(text: str) -> list[str | float]:
    """Return the words; another processor may sum in another order, which can change the last digit shown."""
    return [float(word) if re.fullmatch(r"\d+\.\d{2,}", word) else word for word in text.replace(",", " ").split()]


@pytest.mark.parametrize(("page", "language", "code", "printed"), EXAMPLES)
def test_example_prints_what_the_page_says(
    page: str, language: str, code: str, printed: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name in list(os.environ):
        if name.startswith("LIPCERT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LIPCERT_PROVIDER", "cpu")
    code, level = code.replace(ADDRESS, address), logging.getLogger().level
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            if language == "python":
                exec(compile(code, page, "exec"), {"__name__": "example"})
            else:
                assert main(shlex.split(code)[1:]) == 0
    finally:
        logging.getLogger().setLevel(level)
    if language == "sh":
        assert output.getvalue().splitlines()[0] == printed.splitlines()[0]
    shown, given = rounded(printed), rounded(output.getvalue())
    assert len(shown) == len(given), output.getvalue()
    for left, right in zip(shown, given, strict=True):
        assert left == (pytest.approx(right, rel=2e-2) if isinstance(right, float) else right), output.getvalue()


def test_the_examples_are_found() -> None:
    assert [(page, language) for page, language, _, _ in EXAMPLES] == [
        *[("docs/client.md", "python")] * 4,
        *[("docs/client.md", "sh")] * 2,
        ("README.md", "python"),
    ]
    whole = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^```(?:python|sh)$", whole, re.MULTILINE)) == 6


def test_every_argument_and_error_of_the_client_is_in_its_page() -> None:
    import inspect

    from service.client import Client, ClientError

    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    arguments = set(inspect.signature(Client.__init__).parameters) - {"self", "transport"}
    names = arguments | {kind.__name__ for kind in (ClientError, *ClientError.__subclasses__())}
    assert {name for name in names if f"`{name}`" not in page} == set()
