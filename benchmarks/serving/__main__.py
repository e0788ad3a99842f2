"""`python -m benchmarks.serving [--write]`: throughput, latency, cost, memory and start of the service and its peers.

Raw ONNX Runtime in process is measured beside every figure. Results are kept in `build/bench/results.json`: a later run
with `--only` replaces what it measures again, and `--write --render` writes `benchmarks/RESULTS.md` from the file alone.

    python -m benchmarks.serving --quick --only ours,echo
    python -m benchmarks.serving --quick --only ours,reference,single --clients 16,64
    python -m benchmarks.serving --quick --only ours,two --variant two:LIPCERT_THREADS=2 --clients 16
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.serving import plan as planning
from benchmarks.serving.artefacts import Subject, payloads, prepare
from benchmarks.serving.contestants import ROOT, Contestant, all_contestants, ours
from benchmarks.serving.load import LoadError, find_wrk
from benchmarks.serving.measure import measure
from benchmarks.serving.processes import ServerError

BUILD = ROOT / "build" / "bench"
SHIPPED = ROOT / "models" / "zoo"


def main() -> None:
    """Measure, keep, and on request write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with the MNIST idx files")
    parser.add_argument("--quick", action="store_true", help="one short round, without grown artefacts")
    parser.add_argument("--only", type=_words, default=[], metavar="NAMES", help="contestants, artefacts and loads")
    parser.add_argument("--clients", type=_numbers, default=[], metavar="N,N", help="numbers of clients to keep")
    parser.add_argument("--rounds", type=int, help="instead of 5 (1 with --quick)")
    parser.add_argument("--seconds", type=int, help="of each cell, instead of 2 (1 with --quick)")
    parser.add_argument(
        "--variant",
        type=_variant,
        action="append",
        default=[],
        metavar="NAME:SETTING=VALUE,...",
        help="another contestant: this service with other LIPCERT_ settings",
    )
    arguments = parser.parse_args()
    contestants = [*all_contestants(), *arguments.variant]
    effort = planning.QUICK if arguments.quick else planning.FULL
    effort = replace(effort, rounds=arguments.rounds or effort.rounds, seconds=arguments.seconds or effort.seconds)
    try:
        instances = planning.instances(
            contestants, quick=arguments.quick, only=arguments.only, clients=arguments.clients
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        find_wrk()
        subjects = {instance.subject: _subject(instance.subject) for instance in instances}
        measure(instances, effort, subjects, payloads(arguments.data), BUILD / "logs")
    except (LoadError, ServerError) as error:
        raise SystemExit(f"benchmarks.serving: {error}") from None


def _subject(name: str) -> Subject:
    if name == planning.ZOO:
        return Subject("mnist", SHIPPED)
    return prepare(name, BUILD, SHIPPED)


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _variant(text: str) -> Contestant:
    name, _, settings = text.partition(":")
    pairs = dict(word.split("=", 1) for word in _words(settings))
    return ours(name, f"lipcert, {name}", pairs)


if __name__ == "__main__":
    sys.exit(main())
