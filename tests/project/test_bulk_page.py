"""The examples of docs/bulk.md print what the page says, from the shipped model."""

from __future__ import annotations

import contextlib
import io
import logging
import shlex
from pathlib import Path

import pytest
from test_client_page import examples, rounded

from lipcert.__main__ import main
from service.api.schema import Options
from service.bulk.tables import answer_schema

ROOT = Path(__file__).resolve().parents[2]


def test_examples_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LIPCERT_PROVIDER", "cpu")
    found, level = examples("docs/bulk.md"), logging.getLogger().level
    assert [language for language, _, _ in found] == ["sh", "python"]
    for language, code, printed in found:
        code, output = code.replace("certified", str(tmp_path / "certified")), io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                if language == "python":
                    exec(compile(code, "docs/bulk.md", "exec"), {"__name__": "example"})
                else:
                    assert main(shlex.split(code)[1:]) == 0
        finally:
            logging.getLogger().setLevel(level)
        for left, right in zip(rounded(printed), rounded(output.getvalue()), strict=True):
            assert left == (pytest.approx(right, rel=2e-2) if isinstance(right, float) else right), output.getvalue()


def test_every_column_is_in_the_page() -> None:
    page = (ROOT / "docs" / "bulk.md").read_text(encoding="utf-8")
    options = Options(counterfactual=True, epsilon=0.5, coverage=0.9, max_error=0.1, novelty=True)
    for name in answer_schema(options).names:
        assert f"`{name.replace('counterfactual_', '_')}`" in page, name
