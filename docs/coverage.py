"""Writer of docs/coverage.md: `make coverage` measures, `python docs/coverage.py FILE.json` writes the table.

Exit status: 0 written; 1 written, and a file is below `LEAST_PERCENT`.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coverage.md"
LEAST_PERCENT = 85.0


def files_below(report: dict[str, Any]) -> dict[str, float]:
    """Return the files of a `coverage json` report that are below the limit, with their percentage."""
    percentages = {name: entry["summary"]["percent_covered"] for name, entry in report["files"].items()}
    return {name: percent for name, percent in percentages.items() if percent < LEAST_PERCENT}


def page(report: dict[str, Any], code: str) -> str:
    """Return the page: a row for each package, then a row for each file.

    Args:
        report: as `coverage json` writes it; percentages are of statements.
        code: commit that was measured.
    """
    files = {name: entry["summary"] for name, entry in report["files"].items() if entry["summary"]["num_statements"]}
    packages: dict[str, list[dict[str, int]]] = {}
    for name, summary in files.items():
        folder = Path(name).parent
        packages.setdefault("/".join(folder.parts[:2]) + "/", []).append(summary)
    lines = [
        "# Coverage",
        "",
        "Statements of the product that its tests run, those of started processes included. Written by `make coverage`",
        f"(coverage {version('coverage')}, Python {platform.python_version()}) on commit {code}; no file may be under "
        f"{LEAST_PERCENT:g} %.",
        "",
        "| package | statements | not run | run |",
        "|---|---|---|---|",
        *(_row(name, summaries) for name, summaries in sorted(packages.items())),
        _row("**all**", list(files.values())),
        "",
        "| file | statements | not run | run |",
        "|---|---|---|---|",
        *(_row(name, [summary]) for name, summary in sorted(files.items())),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, summaries: list[dict[str, int]]) -> str:
    statements = sum(summary["num_statements"] for summary in summaries)
    missing = sum(summary["missing_lines"] for summary in summaries)
    shown = name if name.startswith("*") else f"`{name}`"
    return f"| {shown} | {statements:,} | {missing:,} | {100 * (statements - missing) / statements:.1f} % |"


def main(report_file: str) -> int:
    """Write the page; return the exit status."""
    report = json.loads(Path(report_file).read_text(encoding="utf-8"))
    code = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    PAGE.write_text(page(report, code.stdout.strip()), encoding="utf-8")
    below = files_below(report)
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {report['totals']['percent_covered']:.1f} % of all statements\n")
    sys.stdout.write(
        "".join(f"{name}: {percent:.1f} %, limit {LEAST_PERCENT:g} %\n" for name, percent in below.items())
    )
    return int(bool(below))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
