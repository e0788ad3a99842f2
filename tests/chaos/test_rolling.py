"""A short run of `rolling.py`."""

from __future__ import annotations

import asyncio
import shutil

import pytest
from rolling import run


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
def test_replicas_that_restart_behind_haproxy_lose_no_request() -> None:
    report = asyncio.run(run(seconds=600.0, n_clients=8, restarts=2, pause_s=0.05))
    assert report.is_well, "\n".join(report.lines())
    assert sorted(report.by_replica.values()) == [1, 1]
