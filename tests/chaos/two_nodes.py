"""Train on two nodes in two network namespaces; kill one, stop one, cut the cable, and resume each time.

`python tests/chaos/two_nodes.py` (`make two-nodes`); needs root and `ip` (iproute2). Where network namespaces are not
permitted, the nodes are two processes at 127.0.0.2, no cable is cut, and the report says so. Exit status 1: a claim
does not hold.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("lipcert-node-0", "lipcert-node-1")
ADDRESSES = ("10.199.0.1", "10.199.0.2")
PORT = 29411
TIMEOUT_S = 30.0
"""Of `--node-timeout`."""
PATIENCE_S = 300.0
EPOCHS = 60
CHANGES = (
    'network.stem=[{"channels":8}]',
    "network.pool=none",
    "network.widths=[16]",
    f"schedule.epochs={EPOCHS}",
    "schedule.batch_size=15",
    "schedule.precision=32-true",
    "schedule.patience=null",
    "validation_images=10",
    "name=small",
)
ROUNDING = 1e-3
"""Of weights after all epochs, between one process and two."""


STARTED: list[subprocess.Popen[bytes]] = []


class Failure(Exception):
    """A claim does not hold."""


@dataclass
class Node:
    """A command that runs, and the file of its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, text: str) -> None:
        """Wait until the output has a text.

        Raises:
            Failure: the command ended, or the patience.
        """
        end_s = time.monotonic() + PATIENCE_S
        while text not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise Failure(f"{text!r} was not in the output:\n{self.log.read_text()}")
            time.sleep(0.02)

    def ends(self, status: int, pattern: str) -> str:
        """Wait for the end, and return what the pattern found in the output.

        Raises:
            Failure: status or output differ.
        """
        ended = self.process.wait(PATIENCE_S)
        found = re.search(pattern, self.log.read_text())
        if ended != status or found is None:
            raise Failure(f"status {ended} instead of {status}, or no {pattern!r}:\n{self.log.read_text()}")
        return found[0]


@dataclass(frozen=True)
class Pair:
    """Two nodes with the same images, each with results of its own."""

    folder: Path
    apart: bool
    """Whether they are in network namespaces."""

    def start(self, out: str, *options: str) -> list[Node]:
        """Start the command on both nodes."""
        return [
            start(
                self.folder,
                f"{out}-{rank}",
                ["--nodes", "2", "--node-timeout", f"{TIMEOUT_S:g}", *options],
                {
                    "MASTER_ADDR": ADDRESSES[0] if self.apart else "127.0.0.2",
                    "MASTER_PORT": str(PORT),
                    "NODE_RANK": str(rank),
                },
                ("ip", "netns", "exec", NAMES[rank]) if self.apart else (),
            )
            for rank in (0, 1)
        ]


def start(
    folder: Path,
    out: str,
    options: Sequence[str] = (),
    variables: dict[str, str] | None = None,
    before: Sequence[str] = (),
) -> Node:
    """Start a training.

    Args:
        folder: of images and results.
        out: name of the folder of the results.
        options: of the command.
        variables: of the environment.
        before: words before the command.
    """
    words = [*before, sys.executable, "-m", "models", "train", "image-folder", "--device", "cpu", "--threads", "1"]
    words += ["--data", str(folder / "images"), "--out", str(folder / out), *options]
    words += [word for change in CHANGES for word in ("--set", change)]
    log = folder / f"{out}-{time.monotonic_ns()}.log"
    with log.open("wb") as file:
        environment = {**os.environ, **(variables or {})}
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    STARTED.append(process)
    return Node(process, log)


def ip(*words: str) -> None:
    """Run `ip`, of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def join_namespaces() -> bool:
    """Make two network namespaces joined by a pair of virtual interfaces; return whether that is permitted."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "lipcert0", "netns", NAMES[0], "type", "veth", "peer", "name", "lipcert1", "netns", NAMES[1])
        for k, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"lipcert{k}")
            for interface in ("lo", f"lipcert{k}"):
                ip("-n", name, "link", "set", interface, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"no network namespaces here ({str(reason).strip()}): two processes at 127.0.0.2")
        return False
    return True


def remove_namespaces() -> None:
    """Remove the namespaces, and with them the interfaces."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def write_images(folder: Path) -> None:
    """Write 100 images with a bright bar whose place decides the class."""
    random = np.random.default_rng(0)
    for k, (label, count) in enumerate({"low": 60, "high": 40}.items()):
        (folder / label).mkdir(parents=True)
        for n in range(count):
            pixels = random.integers(0, 60, (13, 18)).astype(np.uint8)
            pixels[4 * k : 4 * k + 4] += 180
            Image.fromarray(pixels).save(folder / label / f"{n}.png")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights in the last checkpoint below a folder of results."""
    return torch.load(folder / ".checkpoints" / "small" / "last.pt", weights_only=True)["network"]


def check(pair: Pair) -> None:
    """Check the claims, and print each.

    Raises:
        Failure: a claim does not hold.
    """
    folder, digest = pair.folder, r"weights sha256:\w+"
    start(folder, "one").ends(0, "accuracy")
    first, second = pair.start("whole")
    undisturbed = first.ends(0, digest)
    if second.ends(0, digest) != undisturbed:
        raise Failure("the nodes end with different weights")
    artefacts = sorted(path.parent.parent.name for path in folder.glob("*/small/model.onnx"))
    if artefacts != ["one", "whole-0"] or list((folder / "whole-1").iterdir()):
        raise Failure(f"artefacts of {artefacts}, and node 1 wrote {list((folder / 'whole-1').iterdir())}")
    one, two = weights(folder / "one"), weights(folder / "whole-0")
    difference = max(float((one[name] - two[name]).abs().max()) for name in one)
    if difference > ROUNDING:
        raise Failure(f"the weights differ from those of one process by {difference}")
    print(f"two nodes: the same {undisturbed[:26]}..., one artefact, by {difference:.1e} from one process")

    first, second = pair.start("disturbed")
    first.wait_for(f"epoch {EPOCHS // 6}/")
    os.killpg(second.process.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    line = first.ends(1, r"error: a process of the training ended \(.*last\.pt is complete.*--resume.*")
    print(f"node 1 killed, node 0 after {time.monotonic() - killed_s:.1f} s: {line}")

    first, second = pair.start("disturbed", "--resume")
    first.wait_for(f"epoch {EPOCHS // 3}/")
    second.process.send_signal(signal.SIGTERM)
    print(f"SIGTERM to node 1, node 0: {first.ends(130, 'stopped in epoch .* --resume to continue')}")
    print(f"  node 1: {second.ends(130, 'stopped in epoch .* of node 0: .*')}")

    if pair.apart:
        first, second = pair.start("disturbed", "--resume")
        first.wait_for(f"epoch {EPOCHS // 2}/")
        ip("-n", NAMES[1], "link", "set", "lipcert1", "down")
        cut_s = time.monotonic()
        first.ends(1, r"error: a process of the training ended \(.*last\.pt is complete")
        second.ends(1, r"error: a process of the training ended \(.*if last\.pt is on node 0")
        ip("-n", NAMES[1], "link", "set", "lipcert1", "up")
        print(f"cable cut: both ended after {time.monotonic() - cut_s:.1f} s, of --node-timeout {TIMEOUT_S:g}")

    first, second = pair.start("disturbed", "--resume")
    if {first.ends(0, digest), second.ends(0, digest)} != {undisturbed}:
        raise Failure("the resumed training ends with other weights")
    print("resumed to the end: bit for bit the weights of the undisturbed training")


def main() -> int:
    """Return the exit status."""
    remove_namespaces()
    apart = join_namespaces()
    try:
        with tempfile.TemporaryDirectory(prefix="lipcert-nodes-") as name:
            write_images(Path(name) / "images")
            check(Pair(Path(name), apart))
    except (Failure, subprocess.TimeoutExpired) as error:
        print(error)
        return 1
    finally:
        for process in STARTED:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        remove_namespaces()
    return 0


if __name__ == "__main__":
    sys.exit(main())
