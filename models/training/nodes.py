"""Machines that train together: their variables (`env://` of torch.distributed), and whether they agree about the run.

Each node runs the same command and starts its own processes; the first node (`NODE_RANK=0`) alone writes files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from models.training.checkpoints import differences
from models.training.errors import TrainingError

_SIOCGIFADDR = 0x8915
_WANTED = "--nodes {} needs MASTER_ADDR and MASTER_PORT of the first node in the environment of all, and NODE_RANK: {}"


@dataclass(frozen=True)
class Nodes:
    """The nodes of a training, seen from one of them."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    """Of the first node."""
    port: int = 0
    """Of the rendezvous there; 0: a free one."""
    timeout_s: float = 1800.0
    """Time that a process waits for the others, at the start and at each step; default: that of torch."""

    @property
    def is_first(self) -> bool:
        """Whether this node writes checkpoints, report and artefact."""
        return self.rank == 0


ALONE = Nodes()
"""One machine."""


def read_nodes(count: int, timeout_s: float, variables: Mapping[str, str] = os.environ) -> Nodes:
    """Return the place of this machine among `count` nodes.

    Args:
        count: number of nodes.
        timeout_s: see `Nodes`.
        variables: `MASTER_ADDR`, `MASTER_PORT` and `NODE_RANK`, or those that torchrun sets.

    Raises:
        TrainingError: a variable is missing or not valid, or torchrun started several processes on this machine.
    """
    if int(variables.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise TrainingError("torchrun started several processes here: use --nproc-per-node 1 and --devices N")
    text = variables.get("NODE_RANK", variables.get("GROUP_RANK", "0" if count == 1 else ""))
    if not (text.isdecimal() and int(text) < count):
        raise TrainingError(
            _WANTED.format(count, f"a number below {count}, not {text!r}")
            if count > 1
            else f"NODE_RANK is {text!r}, and --nodes is 1: give --nodes M, or remove the variable"
        )
    if count == 1:
        return ALONE
    address, port = variables.get("MASTER_ADDR", ""), variables.get("MASTER_PORT", "")
    if not address or not (port.isdecimal() and 0 < int(port) < 2**16):
        raise TrainingError(_WANTED.format(count, f"MASTER_ADDR is {address!r}, MASTER_PORT is {port!r}"))
    return Nodes(count, int(text), address, int(port), timeout_s)


def interface_towards(address: str) -> str | None:
    """Return the network interface through which an IPv4 address is reached; null where that is not known.

    Gloo would otherwise listen at the address of this machine's name, which is often one of the loopback.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Of UDP: no packet is sent.
        probe.connect((address, 9))
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            # An interface without an address is an error.
            with contextlib.suppress(OSError):
                if fcntl.ioctl(probe, _SIOCGIFADDR, name.encode().ljust(256, b"\0"))[20:24] == own:
                    return name
    return None


def refuse_disagreement(fabric: Fabric, given: Mapping[str, Any]) -> None:
    """Refuse nodes with different runs, in all processes.

    Args:
        fabric: of several processes, which all call this function.
        given: JSON-like description of the run.

    Raises:
        TrainingError: a node has another description than the first; the message names the differences.
    """
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, (fabric.node_rank, json.dumps(given)))
    first = json.loads(found[0][1])
    for node, text in found:
        changes = [f"{field} is {its!r}, there {ours!r}" for field, ours, its in differences(first, json.loads(text))]
        if changes:
            raise TrainingError(
                f"node {node} was given another run than node 0 ({'; '.join(changes)}): "
                "give the same command, images and version on all nodes"
            )


def weights_digest(network: nn.Module) -> str:
    """Return `sha256:<hex>` of names and values of all weights."""
    state = hashlib.sha256()
    for name, value in network.state_dict().items():
        state.update(name.encode())
        state.update(value.cpu().numpy().tobytes())
    return f"sha256:{state.hexdigest()}"
