"""The cells of docs/lipcert.ipynb run, and print what is stored in it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from docs.notebook import NOTEBOOK, code_cells, run


def printed(outputs: list[dict[str, Any]]) -> list[str | float]:
    """Return the words; another processor may sum in another order, which can change the last digits of a number."""
    words = "".join(line for output in outputs for line in output.get("text", ())).split()
    return [pytest.approx(float(word), rel=1e-6) if re.fullmatch(r"\d+\.\d+", word) else word for word in words]


def test_the_cells_print_and_draw_what_is_stored() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    stored = [cell["outputs"] for cell in code_cells(cells)]
    found = list(run(cells))
    for number, (once, now) in enumerate(zip(stored, found, strict=True), 1):
        assert printed(now) == printed(once), f"cell {number}; `python -m docs.notebook` stores the outputs again"
        assert [output["output_type"] for output in now] == [output["output_type"] for output in once]
    assert sum("data" in output for outputs in stored for output in outputs) == 2
