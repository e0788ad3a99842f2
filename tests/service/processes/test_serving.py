"""Serving: the order of the start."""

from __future__ import annotations

import subprocess
import sys


def test_nothing_large_is_imported_before_the_verifiers_start() -> None:
    code = """
import sys
from service.__main__ import main
from service.artefact import pool
def started(self, cpus):
    print(*sorted(sys.modules))
    raise SystemExit(0)
pool.VerifierPool.__init__ = started
main(["serve"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(result.stdout.split())
    assert "service.processes.serving" in loaded
    assert not {"numpy", "onnx", "onnxruntime", "pydantic", "fastapi", "uvicorn", "prometheus_client"} & loaded
