"""Training in several processes, one for each device; the calling process waits for them and listens to signals.

The processes get what they need as bytes and leave what they found in a file, an error as well: so the caller sees the
errors of a training in one process, and nothing goes through shared memory, of which containers have little.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.multiprocessing.spawn import ProcessException

from models.logs import log_to_stderr
from models.nets.networks import LipschitzNetwork
from models.training.errors import Interrupted, TrainingError
from models.training.loop import Run, Trained, fabric_for, fit
from models.training.signals import STOP_SIGNALS, on_stop_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Order:
    """What each process gets."""

    network: LipschitzNetwork
    run: Run
    resume: bool
    threads: int | None
    log_level: int
    caller: int
    """Process id."""


def fit_on(network: LipschitzNetwork, run: Run, *, devices: int, threads: int | None, resume: bool) -> Trained:
    """As `models.training.loop.fit`, in so many processes; the network comes back on the CPU.

    Args:
        network: with its initial weights.
        run: can be pickled.
        devices: number of processes, and of GPUs where `run.device` is one.
        threads: CPU threads of each process; None shares the processors out.
        resume: go on from `last.pt`, of whatever number of processes.

    Raises:
        TrainingError, NonFiniteError, Interrupted: as `fit`.
        TrainingError: there are not so many GPUs, or a process ended; the checkpoints are whole.
        KeyboardInterrupt: a second signal came before the first was obeyed.
    """
    if run.device.type == "cuda" and devices > torch.cuda.device_count():
        raise TrainingError(f"--devices {devices}: torch sees {torch.cuda.device_count()} CUDA devices")
    if devices == 1:
        return fit(network, run, resume=resume)
    order = _Order(network.cpu(), run, resume, threads, logging.getLogger().level, os.getpid())
    if sys.platform == "linux":
        # All processes are on this machine, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder, _signals_left_in(Path(folder)) as received:
        failure = _launch(fabric_for(run, devices), pickle.dumps(order), Path(folder))
        outcome_file = Path(folder) / "outcome"
        if outcome_file.exists():
            outcome = pickle.loads(outcome_file.read_bytes())
            if isinstance(outcome, Exception):
                raise outcome
            assert isinstance(outcome, Trained)
            return outcome
    if len(received) > 1:
        raise KeyboardInterrupt
    last = run.checkpoints / "last.pt"
    kept = f"{last} is whole: run the same command with --resume to go on" if last.exists() else "nothing was saved yet"
    log.error("%s", failure)
    reason = str(failure).strip().splitlines()[-1]
    raise TrainingError(f"a process of the training ended ({reason}); {kept}") from failure


def _launch(fabric: Fabric, order: bytes, folder: Path) -> ProcessException | None:
    """Run the processes to their end, from a thread that takes no signals; they inherit that."""

    # Starting the first process starts a tracker, and that lets the signals through again.
    resource_tracker.ensure_running()
    # Fabric leaves the port in the environment, where the next training would find it taken.
    port = os.environ.get("MASTER_PORT")
    try:
        with ThreadPoolExecutor(1, initializer=_take_no_signals) as thread:
            thread.submit(fabric.launch, partial(_train_one_share, order=order, folder=folder)).result()
    except ProcessException as error:
        return error
    finally:
        if port is None:
            os.environ.pop("MASTER_PORT", None)
    return None


def _take_no_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _train_one_share(fabric: Fabric, order: bytes, folder: Path) -> None:
    _take_no_signals()
    given = pickle.loads(order)
    assert isinstance(given, _Order)
    (folder / f"{os.getpid()}.pid").touch()
    log_to_stderr(given.log_level)
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    def stop_requested() -> bool:
        return (folder / "stop").exists() or os.getppid() != given.caller

    outcome: Trained | Exception
    try:
        trained = fit(given.network, given.run, resume=given.resume, fabric=fabric, stop_requested=stop_requested)
        outcome = replace(trained, network=trained.network.cpu())
    except (TrainingError, Interrupted) as error:
        outcome = error
    if fabric.is_global_zero:
        unfinished = folder / "outcome.tmp"
        unfinished.write_bytes(pickle.dumps(outcome))
        unfinished.rename(folder / "outcome")
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _signals_left_in(folder: Path) -> Generator[list[int]]:
    """The first SIGINT or SIGTERM leaves a file that asks all processes to stop; the second ends them."""
    received: list[int] = []

    def pass_on(number: int, _previous: Any) -> None:
        received.append(number)
        (folder / "stop").touch()
        if len(received) > 1:
            for file in folder.glob("*.pid"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.stem), signal.SIGKILL)

    with on_stop_signals(pass_on):
        yield received
