"""Nodes of a training: two of them train the network of one process, stop, fail and resume as one, or do not begin.

A node is a thread of the test here, which starts a process; `tests/chaos/two_nodes.py` has two network namespaces.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from bright_bars import bars
from lightning_fabric import Fabric
from small_runs import LOSS, assert_equal_networks, signal_caller, small_network

from models.nets.networks import LipschitzNetwork
from models.recipes import Augment, Schedule
from models.training.batches import ImageBatches
from models.training.errors import Interrupted, TrainingError
from models.training.loop import Run, Trained, fit
from models.training.nodes import ALONE, Nodes, interface_towards, read_nodes, refuse_disagreement
from models.training.objective import objective_of
from models.training.processes import fit_on

BATCH, STEPS = 15, 4
"""Odd, so that two processes have unequal shares; steps of an epoch of 70 images."""
VARIABLES = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": "1"}
TORCHRUN = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "1"}

steps_begun = 0


# Other processes import these functions by name.
def interrupted(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    global steps_begun
    steps_begun += 1
    if steps_begun == STEPS + 2 and torch.distributed.get_rank() == 1:
        signal_caller(signal.SIGTERM)
        time.sleep(0.5)
    return objective_of(LOSS)(network, logits, labels)


def dying(network: LipschitzNetwork, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    global steps_begun
    steps_begun += 1
    if steps_begun == STEPS + 2 and torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return objective_of(LOSS)(network, logits, labels)


def run_in(folder: Path, objective: Any = None) -> Run:
    return Run(
        batches=ImageBatches(bars(), BATCH, seed=0, augmentation=Augment(rotation_degrees=10)),
        objective=objective or objective_of(LOSS),
        schedule=Schedule(epochs=3, batch_size=BATCH, ema_decay=0.8, keep="best"),
        checkpoints=folder,
        identity={"recipe": {"epochs": 3}, "seed": 0},
        device=torch.device("cpu"),
        epsilons=(0.1,),
        validation=bars(),
        version="a",
    )


def by_two(runs: tuple[Run, Run], *, resume: bool = False, timeout_s: float = 60.0) -> tuple[Future[Trained], ...]:
    """Return the outcomes of node 0 and node 1; the second one gets the signals of the test."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Both threads share the generator of torch.
    networks = [small_network("stiefel") for _ in runs]

    def train(rank: int) -> Trained:
        nodes = Nodes(2, rank, "127.0.0.1", port, timeout_s)
        return fit_on(networks[rank], runs[rank], devices=1, threads=1, resume=resume, nodes=nodes)

    second = Future[Trained]()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(train, 0)
        try:
            second.set_result(train(1))
        except (Interrupted, TrainingError) as error:
            second.set_exception(error)
    return first, second


@pytest.fixture(autouse=True)
def port_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the variable that Fabric sets."""
    monkeypatch.setenv("MASTER_PORT", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LipschitzNetwork, Path]:
    """Return the network of an uninterrupted run on two nodes, and the folder of theirs."""
    folder = tmp_path_factory.mktemp("nodes")
    first, second = by_two((run_in(folder / "0"), run_in(folder / "1")))
    assert_equal_networks(first.result().network, second.result().network)
    return first.result().network, folder


def test_two_nodes_train_the_network_of_one_process_and_the_first_alone_writes(
    trained: tuple[LipschitzNetwork, Path], tmp_path: Path
) -> None:
    network, folder = trained
    expected = fit(small_network("stiefel"), run_in(tmp_path)).network.state_dict()
    start = small_network("stiefel").state_dict()
    for name, value in network.state_dict().items():
        assert (value - expected[name]).abs().max() < 1e-5, name
        assert (value - start[name]).abs().max() > 1e-3, name
    one, two = (torch.load(place / "last.pt", weights_only=True) for place in (tmp_path, folder / "0"))
    assert (one["epoch"], one["best"]) == (two["epoch"], two["best"])
    assert not (folder / "1").exists()


def test_signal_of_one_node_stops_both_and_both_resume_from_the_checkpoint_of_the_first(
    trained: tuple[LipschitzNetwork, Path], tmp_path: Path
) -> None:
    first, second = by_two((run_in(tmp_path / "0", interrupted), run_in(tmp_path / "1", interrupted)))
    with pytest.raises(Interrupted, match=r"stopped in epoch 2 after step 2; .*0/last\.pt: .*--resume"):
        first.result()
    with pytest.raises(Interrupted, match=r"the state is in last\.pt of node 0: .*--resume"):
        second.result()
    for outcome in by_two((run_in(tmp_path / "0"), run_in(tmp_path / "1")), resume=True):
        assert_equal_networks(outcome.result().network, trained[0])


def test_node_that_dies_ends_the_other_which_names_its_checkpoint(tmp_path: Path) -> None:
    first, second = by_two((run_in(tmp_path / "0", dying), run_in(tmp_path / "1", dying)))
    # At once, not after the timeout.
    with pytest.raises(
        TrainingError,
        match=r"ended \(.*Connection (closed|reset).*\); .*last\.pt is complete: .*on all nodes with --resume",
    ):
        first.result()
    with pytest.raises(TrainingError, match=r"ended \(.*SIGKILL.*\); if last\.pt is on node 0, .*--resume"):
        second.result()
    assert torch.load(tmp_path / "0" / "last.pt", weights_only=True)["epoch"] == 1


def test_nodes_with_different_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"recipe": {"epochs": 3, "name": "bars"}, "version": "a"}
    theirs = {"recipe": {"epochs": 4, "name": "bars"}, "version": "b"}

    def gather(found: list[Any], given: Any) -> None:
        found[:] = [(0, json.dumps(ours)), given]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    fabric = cast(Fabric, SimpleNamespace(world_size=2, node_rank=1))
    refuse_disagreement(fabric, ours)
    with pytest.raises(
        TrainingError, match=r"node 1 .* \(recipe\.epochs is 4, there 3; version is 'b', there 'a'\): give"
    ):
        refuse_disagreement(fabric, theirs)


def test_node_whose_others_do_not_come_ends_after_the_timeout(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = Nodes(2, 0, "127.0.0.1", port, 1.0)
    with pytest.raises(TrainingError, match=r"the 2 nodes did not meet at 127\.0\.0\.1:\d+ within 1 s \(.*NODE_RANK"):
        fit_on(small_network(), run_in(tmp_path), devices=1, threads=1, resume=False, nodes=nodes)


def test_place_of_a_node_is_read_from_the_variables() -> None:
    assert read_nodes(1, 9.0, {}) == read_nodes(1, 9.0, {"NODE_RANK": "0"}) == ALONE
    for variables in (VARIABLES, TORCHRUN):
        assert read_nodes(2, 9.0, variables) == Nodes(2, 1, "10.0.0.1", 29500, 9.0)


@pytest.mark.parametrize(
    ("count", "variables", "message"),
    [
        (1, {"NODE_RANK": "1"}, "--nodes is 1: give --nodes"),
        (2, {}, "needs MASTER_ADDR"),
        (2, VARIABLES | {"NODE_RANK": "2"}, "below 2, not '2'"),
        (2, VARIABLES | {"NODE_RANK": "-1"}, "below 2, not '-1'"),
        (2, VARIABLES | {"MASTER_ADDR": ""}, "MASTER_ADDR is ''"),
        (2, VARIABLES | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        (1, TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, "--nproc-per-node 1"),
    ],
)
def test_variables_that_are_missing_or_not_valid_are_named(
    count: int, variables: Mapping[str, str], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        read_nodes(count, 9.0, variables)


def test_interface_is_that_of_the_route() -> None:
    assert interface_towards("127.0.0.2") == "lo"
    assert interface_towards("no.such.host.invalid") is None
