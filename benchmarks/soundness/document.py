"""Sections of `benchmarks/SOUNDNESS.md`, each written by one command.

A section NAME stands between `<!-- NAME: written by make TARGET -->` and `<!-- /NAME -->`. Writing one leaves every
other byte of the file as it is; a section that is not there yet is appended.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from models.export import environment

FILE = Path(__file__).resolve().parent.parent / "SOUNDNESS.md"
TITLE = (
    "# Soundness, measured\n\nWhat is proved, and from which assumptions: [docs/soundness.md](../docs/soundness.md).\n"
)


def write_section(name: str, target: str, content: str, file: Path = FILE) -> None:
    """Replace a section of the document, or append it.

    Args:
        name: of the section.
        target: of make, which writes the section.
        content: Markdown with its heading.
        file: the document.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else TITLE
    section = f"<!-- {name}: written by make {target} -->\n{content.strip()}\n<!-- /{name} -->"
    pattern = re.compile(
        rf"<!-- {re.escape(name)}: written by make [\w-]+ -->\n.*?<!-- /{re.escape(name)} -->", re.DOTALL
    )
    found = pattern.search(text)
    text = pattern.sub(lambda _: section, text, count=1) if found else f"{text.rstrip()}\n\n{section}\n"
    file.write_text(text, encoding="utf-8")


def write_measured(page: Path, content: str) -> None:
    """Replace what stands between `<!-- measured -->` and `<!-- /measured -->` of a page."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
    page.write_text(pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text), encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; cells are written with `str`, None as `-`."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def provenance(command: str, code: str) -> str:
    """Return a paragraph on the origin of the figures of a section; `code` is the version of the source tree."""
    made = environment(0.0)
    return (
        f"`{command}`, code {code}. Hardware: {made['cpu']}, {os.cpu_count()} logical CPUs, "
        f"{platform.machine()}. Versions: Python {platform.python_version()}, ONNX Runtime {made['onnxruntime']}, "
        f"numpy {made['numpy']}. Load average of the machine afterwards: {os.getloadavg()[0]:.1f}."
    )


def floor(value: float, digits: int) -> str:
    """Return `value` with `digits` decimals, rounded down: a smallest ratio must not look larger than it is."""
    scale = 10.0**digits
    return f"{math.floor(value * scale) / scale:.{digits}f}" if math.isfinite(value) else "-"
