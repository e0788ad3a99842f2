"""Limits of time and memory of a proof: more is a refusal with a reason, and nothing of them is left behind."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from builders import linear

from service.certificate.proof_limits import ProofLimits, within
from service.network.operators import UnsupportedModelError


def run_on() -> None:
    while True:
        np.ones(1000).sum()


def test_a_proof_that_takes_too_long_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"more than 0\.05 seconds"), within(ProofLimits(seconds=0.05)):
        run_on()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_limits_are_gone_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
    with within(ProofLimits(seconds=60.0, memory_bytes=1 << 40)):
        pass
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)) == before


def test_another_thread_has_no_limit_of_time() -> None:
    entered: list[bool] = []

    def enter() -> None:
        with within(ProofLimits(seconds=0.01)):
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize(
    ("option", "reason"),
    [("--max-bytes=300000000", "more memory than there is"), ("--max-seconds=0.001", "more than 0.001 seconds")],
)
def test_the_command_ends_with_one_line(tmp_path: Path, option: str, reason: str) -> None:
    file = tmp_path / "model.onnx"
    weight = np.random.default_rng(0).standard_normal((2000, 4096))
    file.write_bytes(linear(weight, np.zeros(2000), (1, 64, 64)).model)
    command = [sys.executable, "-m", "service.certificate", str(file), option]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
