"""Training in several processes, one for each device; the calling process waits for them and listens to signals.

Each process gets its job as bytes; the first of each node leaves the result or the error in a file. So the caller sees
the same errors as from a training in one process, and nothing goes through shared memory, of which containers have
little.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
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
from models.training.nodes import ALONE, Nodes, interface_towards, refuse_disagreement, weights_digest
from models.training.signals import STOP_SIGNALS, on_stop_signals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """Content of the bytes that each process gets."""

    network: LipschitzNetwork
    run: Run
    resume: bool
    threads: int | None
    nodes: Nodes
    log_level: int


def fit_on(
    network: LipschitzNetwork,
    run: Run,
    *,
    devices: int,
    threads: int | None,
    resume: bool,
    nodes: Nodes = ALONE,
) -> Trained:
    """Train as `models.training.loop.fit` does, in several processes; the network is returned on the CPU.

    Args:
        network: with its initial weights.
        run: can be pickled.
        devices: number of processes on each node, and of GPUs if `run.device` is one.
        threads: CPU threads of each process; default: the processors are shared out.
        resume: continue from `last.pt`, written by any number of processes.
        nodes: that train together; each calls this function.

    Raises:
        TrainingError, NonFiniteError, Interrupted: as `fit`.
        TrainingError: there are fewer GPUs, the nodes do not agree or do not meet, or a process ended; the checkpoints
            are complete.
        KeyboardInterrupt: a signal came before the training began, or a second one before the first was obeyed.
    """
    if run.device.type == "cuda" and devices > torch.cuda.device_count():
        raise TrainingError(f"--devices {devices}: torch sees {torch.cuda.device_count()} CUDA devices")
    if devices == nodes.count == 1:
        return fit(network, run, resume=resume)
    job = _Job(network.cpu(), run, resume, threads, nodes, logging.getLogger().level)
    # On one machine the loopback, whatever its name resolves to.
    interface = "lo" if nodes.count == 1 else interface_towards(nodes.address)
    if sys.platform == "linux" and interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if nodes.count > 1:
        log.info(
            "node %d of %d meets the others at %s:%d, within %g s",
            nodes.rank,
            nodes.count,
            nodes.address,
            nodes.port,
            nodes.timeout_s,
        )
    with tempfile.TemporaryDirectory() as folder, _signals_left_in(Path(folder)) as received:
        failure = _launch(fabric_for(run, devices, nodes), pickle.dumps(job), Path(folder))
        has_begun = (Path(folder) / "begun").exists()
        outcome_file = Path(folder) / "outcome"
        if outcome_file.exists():
            outcome = pickle.loads(outcome_file.read_bytes())
            if isinstance(outcome, Exception):
                raise outcome
            assert isinstance(outcome, Trained)
            if nodes.count > 1:
                log.info("node %d: weights %s", nodes.rank, weights_digest(outcome.network))
            return outcome
    if len(received) > 1 or (received and not has_begun):
        raise KeyboardInterrupt
    log.error("%s", failure)
    reason = str(failure).strip().splitlines()[-1]
    if not has_begun and nodes.count > 1:
        raise TrainingError(
            f"the {nodes.count} nodes did not meet at {nodes.address}:{nodes.port} within {nodes.timeout_s:g} s "
            f"({reason}): start all of them with the same MASTER_ADDR, MASTER_PORT, --nodes and --devices, each with "
            "its own NODE_RANK, and let them reach each other on all ports"
        ) from failure
    raise TrainingError(
        f"a process of the training ended ({reason}); {_saved(run.checkpoints / 'last.pt', nodes)}"
    ) from failure


def _saved(last: Path, nodes: Nodes) -> str:
    """Return where the training continues from."""
    if not nodes.is_first:
        return f"if {last.name} is on node 0, the same command on all nodes with --resume continues from it"
    if not last.exists():
        return "nothing was saved yet"
    where = " on all nodes" if nodes.count > 1 else ""
    return f"{last} is complete: run the same command{where} with --resume to continue"


def _launch(fabric: Fabric, job: bytes, folder: Path) -> ProcessException | None:
    """Run the processes to their end, from a thread that takes no signals; they inherit its signal mask."""
    # The resource tracker unblocks signals when it starts, with the first process at the latest.
    resource_tracker.ensure_running()
    # The processes are forks of one that has loaded torch, once for all of them.
    multiprocessing.set_forkserver_preload([__name__])
    # Fabric leaves its port in the environment; the next training would find that port in use.
    port = os.environ.get("MASTER_PORT")
    try:
        with ThreadPoolExecutor(1, initializer=_take_no_signals) as thread:
            thread.submit(fabric.launch, partial(_train_in_process, job=job, folder=folder)).result()
    except ProcessException as error:
        return error
    finally:
        if port is None:
            os.environ.pop("MASTER_PORT", None)
    return None


def _take_no_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _train_in_process(fabric: Fabric, job: bytes, folder: Path) -> None:
    _take_no_signals()
    given = pickle.loads(job)
    assert isinstance(given, _Job)
    (folder / "begun").touch()
    log_to_stderr(given.log_level)
    if given.threads is not None:
        torch.set_num_threads(given.threads)

    def stop_requested() -> bool:
        caller = multiprocessing.parent_process()
        return (folder / "stop").exists() or caller is None or not caller.is_alive()

    outcome: Trained | Exception
    try:
        if given.nodes.count > 1:
            described = {"version": given.run.version, "torch": torch.__version__, "resume": given.resume}
            refuse_disagreement(fabric, {**given.run.identity, **described})
        trained = fit(given.network, given.run, resume=given.resume, fabric=fabric, stop_requested=stop_requested)
        outcome = replace(trained, network=trained.network.cpu())
    except (TrainingError, Interrupted) as error:
        outcome = error
    if fabric.local_rank == 0:
        unfinished = folder / "outcome.tmp"
        unfinished.write_bytes(pickle.dumps(outcome))
        unfinished.rename(folder / "outcome")
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _signals_left_in(folder: Path) -> Generator[list[int]]:
    """Ask all processes to stop on the first SIGINT or SIGTERM, by a file in `folder`; end them on the second.

    Before the training has begun, in particular while a node waits for others, the first one ends them.

    Yields:
        Numbers of the signals received.
    """
    received: list[int] = []
    others = set(multiprocessing.active_children())

    def pass_on(number: int, _previous: Any) -> None:
        received.append(number)
        (folder / "stop").touch()
        if len(received) > 1 or not (folder / "begun").exists():
            for process in set(multiprocessing.active_children()) - others:
                process.kill()

    with on_stop_signals(pass_on):
        yield received
