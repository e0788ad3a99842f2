"""Writer of docs/coverage.md: it counts as `coverage` does and fails for a file below the limit."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITER = runpy.run_path(str(ROOT / "docs/coverage.py"))


def report(**missing_of_20: int) -> dict[str, Any]:
    return {
        "files": {
            f"service/api/{name}.py": {
                "summary": {"num_statements": 20, "missing_lines": missing, "percent_covered": 100 - 5 * missing}
            }
            for name, missing in missing_of_20.items()
        }
    }


def test_file_at_the_limit_passes_and_file_below_it_is_named() -> None:
    assert WRITER["files_below"](report(at=3, below=4)) == {"service/api/below.py": 80}


def test_page_has_a_row_for_each_file_its_package_and_all() -> None:
    page = WRITER["page"](report(one=1, two=2), "abc1234").splitlines()
    assert "| `service/api/one.py` | 20 | 1 | 95.0 % |" in page
    assert "| `service/api/two.py` | 20 | 2 | 90.0 % |" in page
    assert "| `service/api/` | 40 | 3 | 92.5 % |" in page
    assert "| **all** | 40 | 3 | 92.5 % |" in page
    assert any("on commit abc1234" in line for line in page)
