"""`python -m benchmarks.scaling [--seconds 8] [--rounds 3] [--write]`: the figures of docs/scaling.md.

1. *Cost*: images per second of each shipped classifier on one processor, by kind of request, 64 clients.
2. *Model*: the queueing model fitted to a server, and its quantiles beside those of requests that arrive at random at
   50, 80 and 95 % of what the server can answer.
3. *A thousand nodes*: the same model behind a load balancer.

Needs two processors that nothing else uses: the server has one, the clients the other. `--write` replaces the measured
part of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np

from benchmarks.scaling.load import closed_loop, open_loop
from benchmarks.scaling.measure import ROOT, WARM_S, calibrate, requests_of, served
from benchmarks.scaling.queueing import InTurn, Policy, Service, at_random, better_of_two, simulate
from benchmarks.soundness.data import classifiers
from benchmarks.soundness.document import provenance, table, write_measured
from models.export import code_version

PAGE = ROOT / "docs" / "scaling.md"
PORT = 8470
KINDS = {
    "class and radius": "",
    "`proof=best`": "&proof=best",
    "counterfactual": "&counterfactual=true",
}
CLIENTS = 64
MODELLED = ("mnist", "mnist-0-8", "cifar10-cpu")
LOADS = (0.5, 0.8, 0.95)
SIMULATED = 50_000
NODES, OF_NODES = 1000, 300_000
A_DAY = (1e3, 1e6, 1e9)
DAY_S = 86_400.0
PEAK, FULL = 3.0, 0.7
"""Busiest second over the mean one, and the load at which a server is full: assumptions."""


def cost(seconds: float) -> list[list[object]]:
    """Return images per second of each classifier."""
    rows: list[list[object]] = []
    for model in classifiers(ROOT / "models" / "zoo"):
        row: list[object] = [f"`{model}`"]
        with served(model, PORT) as server:
            for query in KINDS.values():
                requests = requests_of(model, query)
                closed_loop(PORT, requests, CLIENTS, WARM_S)
                before = server.usage().cpu_s
                taken = closed_loop(PORT, requests, CLIENTS, seconds)
                used_s = server.usage().cpu_s - before
                row += [f"{len(taken) / seconds:.0f}", f"{1000 * used_s / len(taken):.2f}"]
            row.append(f"{server.usage().pss_mb:.0f}")
        say(f"cost {row}")
        rows.append(row)
    return rows


def compare(model: str, seconds: float, rounds: int) -> tuple[Service, list[list[object]]]:
    """Return the model of a server, and its quantiles beside the measured ones: medians of rounds."""
    rows: list[list[object]] = []
    with served(model, PORT):
        requests = requests_of(model)
        service = calibrate(PORT, requests, seconds)
        capacity = service.capacity
        say(
            f"{model}: {service.fixed_s * 1e3:.3f} ms + {service.each_s * 1e3:.3f} ms an image, {capacity:.0f} a second"
        )
        for load in LOADS:
            seen = [
                np.quantile(open_loop(PORT, requests, load * capacity, 2 * seconds, seed), (0.5, 0.99))
                for seed in range(rounds)
            ]
            measured = np.median(seen, axis=0) * 1e3
            simulated = np.quantile(simulate([service], load * capacity, SIMULATED), (0.5, 0.99)) * 1e3
            off = simulated / measured - 1.0
            rows.append(
                [
                    *(f"`{model}`", f"{capacity:.0f}", f"{load:.0%}"),
                    *(f"{quantile:.2f}" for pair in zip(measured, simulated, strict=True) for quantile in pair),
                    f"{off[0]:+.0%} / {off[1]:+.0%}",
                ]
            )
            say(f"compare {rows[-1]}")
    return service, rows


def thousand(service: Service) -> list[list[object]]:
    """Return the quantiles of a thousand nodes by policy and load, all alike or one of them five times slower."""
    rows: list[list[object]] = []
    slow = replace(service, fixed_s=5 * service.fixed_s, each_s=5 * service.each_s)
    cases = {"all alike": [service] * NODES, "1 % of them five times slower": [service] * (NODES - 10) + [slow] * 10}
    policies: dict[str, Policy] = {"at random": at_random, "in turn": InTurn(), "better of two": better_of_two}
    for case, services in cases.items():
        for load in (0.5, 0.8):
            for name, policy in policies.items():
                taken = simulate(services, load * NODES * service.capacity, OF_NODES, policy)
                p50, p99, p999 = np.quantile(taken, (0.5, 0.99, 0.999)) * 1e3
                rows.append([case, f"{load:.0%}", name, f"{p50:.2f}", f"{p99:.2f}", f"{p999:.2f}"])
                say(f"thousand {rows[-1]}")
    return rows


def needed(costs: list[list[object]]) -> list[list[object]]:
    """Return the processors that each number of images a day needs."""
    rows = []
    for row in costs:
        rates = [float(str(row[1 + 2 * k])) for k in range(len(KINDS))]
        found = [[int(np.ceil(PEAK * day / DAY_S / (FULL * rate))) for day in A_DAY] for rate in rates]
        rows.append([row[0], *(" / ".join(f"{count:,}" for count in counts) for counts in found)])
    return rows


def main() -> None:
    """Measure, simulate, print; on request write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"replace the measured part of {PAGE.name}")
    arguments = parser.parse_args()
    code = code_version()
    costs = cost(arguments.seconds)
    compared = [compare(model, arguments.seconds, arguments.rounds) for model in MODELLED]
    kinds = [cell for kind in KINDS for cell in (f"{kind}: images/s", "CPU ms an image")]
    quantiles = ["p50 ms measured", "simulated", "p99 ms measured", "simulated"]
    text = "\n\n".join(
        [
            "### One processor",
            table(["model", *kinds, "memory MB"], costs),
            "### Images a day",
            table(["model", *KINDS], needed(costs)),
            "### The model beside the server",
            table(["model", "capacity/s", "load", *quantiles, "off"], [row for _, rows in compared for row in rows]),
            "### A thousand nodes",
            table(["nodes", "load", "balancing", "p50 ms", "p99 ms", "p99.9 ms"], thousand(compared[0][0])),
            provenance(
                f"python -m benchmarks.scaling --seconds {arguments.seconds:g} --rounds {arguments.rounds}", code
            ),
        ]
    )
    sys.stdout.write(text + "\n")
    if arguments.write:
        write_measured(PAGE, text)


def say(line: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    main()
