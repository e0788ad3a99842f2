"""The audit of shipped models ends in `holds`, within the time and the memory that docs/audit.md states."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import archive, served
from encoding import encode
from thorough import ZOO, shipped_models

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = ROOT / "service" / "static" / "samples"

SECONDS, BYTES = 30.0, 10**9

# CPU seconds and peak memory of the process itself. On Linux `ru_maxrss` begins with that of its parent.
AUDIT = """
import re, resource, sys
from pathlib import Path

from service.__main__ import main
status = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
linux = Path("/proc/self/status")
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", linux.read_text())[1]) * 1024 if linux.exists() else used.ru_maxrss
print("used", used.ru_utime + used.ru_stime, peak)
sys.exit(status)
"""


def image_of(folder: Path) -> bytes:
    """Return a sample where there is one, else large coloured squares in the shape of the model's input."""
    if folder.name.startswith("mnist"):
        return (SAMPLES / "mnist-8.png").read_bytes()
    shape = json.loads((folder / "card.json").read_text(encoding="utf-8"))["input"]
    height, width, channels = shape["height"], shape["width"], shape["channels"]
    squares = np.random.default_rng(5).integers(0, 256, (7, 7, channels), dtype=np.uint8)
    picture = squares[np.arange(height)[:, None] * 7 // height, np.arange(width)[None] * 7 // width]
    return encode(picture[:, :, 0] if channels == 1 else picture)


@pytest.mark.parametrize("name", shipped_models())
def test_an_answer_of_a_shipped_model_holds_in_the_stated_time_and_memory(
    runner: Any, tmp_path: Path, name: str
) -> None:
    folder = ZOO / name
    archived = archive(served(folder, runner), image_of(folder), folder, epsilon=0.3, counterfactual=True)
    (tmp_path / "answer.json").write_text(json.dumps(archived.answer))
    (tmp_path / "image.png").write_bytes(archived.image)
    files = [str(tmp_path / "answer.json"), str(tmp_path / "image.png")]
    found = subprocess.run(
        [sys.executable, "-c", AUDIT, "audit", *files, "--model", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert found.returncode == 0, found
    line, used = found.stdout.splitlines()
    assert line.startswith("holds: class ")
    _, seconds, size = used.split()
    assert float(seconds) < SECONDS
    assert float(size) < BYTES
    # The server's slack is small.
    radius, proved = archived.answer["certificate"]["radius"], re.search(r"audit: ([\d.e+-]+);", line)
    assert proved is not None
    if archived.answer["certificate"]["certified"]:
        assert radius <= float(proved.group(1)) <= radius * (1 + 1e-7)
