"""Kill one node of a local Ray cluster of three under load, and compare every answer with direct computation.

`python tests/chaos/ray_node.py [--seconds 30] [--clients 16]` (`make ray-chaos`); needs the extra `ray`. A request may
end with an error status or a closed connection, which the client sees. Exit status 1: an answer was wrong, a request
got neither answer nor error, or the service did not answer again after the node was killed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exchanges import read_answer  # noqa: E402
from rolling import connected  # noqa: E402

from service.cluster.command import DEFAULTS  # noqa: E402
from service.inference.classifier import Classifier, Prediction  # noqa: E402

FILES = [file.read_bytes() for file in sorted((ROOT / "service" / "static" / "samples").glob("mnist-*.png"))]
HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
PATIENCE_S = 90.0
"""Above the deadline of the service: a request that takes longer is lost."""
PORT = 8317


@dataclass
class Report:
    """Figures of a run."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    after: int = 0
    """Answers in the last third of the run."""

    @property
    def is_well(self) -> bool:
        """Whether no answer was wrong, no request lost, and the service went on."""
        return not self.wrong and not self.counts["lost"] and self.after > 0

    def lines(self) -> list[str]:
        """Return the report."""
        counted = ", ".join(f"{name}: {count}" for name, count in sorted(self.counts.items()))
        return [
            f"{counted}; answered in the last third: {self.after}",
            f"requests lost without an error / wrong answers: {self.counts['lost']} / {len(self.wrong)}",
            *self.wrong[:20],
        ]


def expected() -> list[Prediction]:
    """Return the prediction of each image, computed in this process."""
    classifier = Classifier.load(ROOT / "models" / "zoo" / "mnist", "cpu", 1)
    images = [np.array(Image.open(io.BytesIO(file)), dtype=np.float64)[None, None] / 255.0 for file in FILES]
    return [classifier.predict(image_NCHW)[0] for image_NCHW in images]


def fault_of(body: bytes, prediction: Prediction) -> str | None:
    """Return why an answer is not that prediction, beyond the proved rounding error of both; null if it is."""
    answer = json.loads(body)
    tolerance = 4.0 * answer["certificate"]["logit_error"]
    differs = np.abs(np.array(answer["logits"]) - prediction.logits_K).max()
    if answer["class_id"] != prediction.class_id or differs > tolerance:
        return f"class {answer['class_id']} instead of {prediction.class_id}, logits differ by {differs}"
    if abs(answer["certificate"]["radius"] - prediction.radius) > tolerance:
        return f"radius {answer['certificate']['radius']} instead of {prediction.radius}"
    return None


async def run(kill: Any, seconds: float, n_clients: int) -> Report:
    """Send requests, kill a node after a third of the time, and return the report.

    Args:
        kill: ends the node; called on a thread.
        seconds: of the load.
        n_clients: each with a kept connection.
    """
    report, known = Report(), expected()
    start_s = time.monotonic()
    clients = [asyncio.create_task(_client(n, known, start_s, seconds, report)) for n in range(n_clients)]
    await asyncio.sleep(seconds / 3.0)
    await asyncio.to_thread(kill)
    await asyncio.gather(*clients)
    return report


async def _client(n: int, known: Sequence[Prediction], start_s: float, seconds: float, report: Report) -> None:
    while (elapsed_s := time.monotonic() - start_s) < seconds:
        try:
            async with asyncio.timeout(PATIENCE_S), connected(PORT) as (reader, writer):
                while elapsed_s < seconds:
                    n = (n + 1) % len(FILES)
                    writer.write(HEAD % len(FILES[n]) + FILES[n])
                    answer = await read_answer(reader, is_head=False)
                    elapsed_s = time.monotonic() - start_s
                    if answer.status != 200:
                        report.counts[f"status {answer.status}"] += 1
                        await asyncio.sleep(0.05)
                    else:
                        report.counts["answered"] += 1
                        report.after += elapsed_s > seconds * 2.0 / 3.0
                        if fault := fault_of(answer.body, known[n]):
                            report.wrong.append(fault)
                    if answer.closes:
                        break
        except TimeoutError:
            report.counts["lost"] += 1
        except (OSError, EOFError, ValueError):
            report.counts["connection closed"] += 1
            await asyncio.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory(prefix="lipcert-ray-") as folder:
        (Path(folder) / "mnist").symlink_to(ROOT / "models" / "zoo" / "mnist")
        variables = {"LIPCERT_MODELS": folder, "LIPCERT_PROVIDER": "cpu", "LIPCERT_CLIENT_SHARE": "1"}
        # The nodes inherit them.
        os.environ.update(variables, PYTHONPATH=str(ROOT))
        report = _with_cluster(options.seconds, options.clients)
    print(*report.lines(), sep="\n")
    return not report.is_well


def _with_cluster(seconds: float, n_clients: int) -> Report:
    ray: Any = importlib.import_module("ray")
    serve: Any = importlib.import_module("ray.serve")
    utils: Any = importlib.import_module("ray.cluster_utils")
    from service.cluster.ray import app

    cluster = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False)
    try:
        # The nodes share this machine, so that one of them has the port.
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(app({"replicas": 3}), name="lipcert", logging_config={"enable_access_log": False})
        return asyncio.run(run(lambda: cluster.remove_node(nodes[0], allow_graceful=False), seconds, n_clients))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())
