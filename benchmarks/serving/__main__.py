"""`python -m benchmarks.serving [--write]`: throughput, latency, cost, memory and start of the service and its peers.

Raw ONNX Runtime in process is measured beside every figure. Results are kept in `build/bench/results.json` (those of
`--quick` in `quick.json`): a run with `--only` replaces there what it measures, and `--render --write` writes
`benchmarks/RESULTS.md` and the plots from the file alone.

    python -m benchmarks.serving --quick --only ours,echo
    python -m benchmarks.serving --quick --only ours,reference,single --clients 16,64
    python -m benchmarks.serving --quick --only ours,two --variant two:LIPCERT_THREADS=2 --clients 16
    python -m benchmarks.serving --only ours,batch --write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from benchmarks.serving import figures, report
from benchmarks.serving import plan as planning
from benchmarks.serving.artefacts import BATCH, Payloads, Subject, multiply_adds, payloads, prepare
from benchmarks.serving.claims import claims
from benchmarks.serving.contestants import ROOT, Contestant, all_contestants, ours
from benchmarks.serving.load import LoadError, find_wrk
from benchmarks.serving.measure import measure, stamp
from benchmarks.serving.processes import ServerError
from benchmarks.serving.raw import Raw
from benchmarks.serving.results import Results, SubjectFacts, describe_run
from models.export import code_version
from service.inference.classifier import Classifier

BUILD = ROOT / "build" / "bench"
SHIPPED = ROOT / "models" / "zoo"
DOCUMENT = ROOT / "benchmarks" / "RESULTS.md"
_RAW_S = 1.0


def main() -> None:
    """Measure, keep, print the claims, and on request write."""
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
    parser.add_argument("--render", action="store_true", help="measure nothing, take the results that are there")
    parser.add_argument(
        "--write", action="store_true", help=f"write benchmarks/{DOCUMENT.name} and the plots beside it"
    )
    arguments = parser.parse_args()
    contestants = [*all_contestants(), *arguments.variant]
    file = BUILD / ("quick.json" if arguments.quick else "results.json")
    results = Results.load(file)
    if not arguments.render:
        try:
            results = results.merge(_measured(arguments, contestants))
        except (LoadError, ServerError) as error:
            raise SystemExit(f"benchmarks.serving: {error}") from None
        except ValueError as error:
            parser.error(str(error))
        results.save(file)
    print(report.must_show(claims(results, contestants)))
    if arguments.write:
        DOCUMENT.write_text(report.document(results, contestants), encoding="utf-8")
        figures.draw(results, contestants, DOCUMENT.parent)


def _measured(arguments: argparse.Namespace, contestants: Sequence[Contestant]) -> Results:
    effort = planning.QUICK if arguments.quick else planning.FULL
    effort = replace(effort, rounds=arguments.rounds or effort.rounds, seconds=arguments.seconds or effort.seconds)
    instances = planning.instances(contestants, quick=arguments.quick, only=arguments.only, clients=arguments.clients)
    find_wrk()
    # Before anything is written: the file that is written is part of the tree.
    command = ["python", "-m", "benchmarks.serving", *_public(sys.argv[1:])]
    run = describe_run(stamp(), command, code_version(), effort.rounds, effort.seconds)
    sent = payloads(arguments.data)
    subjects = {instance.subject: _subject(instance.subject) for instance in instances}
    with_counterfactuals = {
        instance.subject for instance in instances if any(cell.load == "counterfactual" for cell in instance.cells)
    }
    facts = [
        _facts(name, subject, sent, name in with_counterfactuals)
        for name, subject in subjects.items()
        if name != planning.ZOO
    ]
    cells, starts, failed = measure(instances, effort, subjects, sent, BUILD / "logs", run.id)
    return Results(runs=[run], subjects=facts, cells=cells, starts=starts, failed=failed)


def _subject(name: str) -> Subject:
    if name == planning.ZOO:
        return Subject("mnist", SHIPPED)
    return prepare(name, BUILD, SHIPPED)


def _facts(name: str, subject: Subject, sent: Payloads, with_counterfactuals: bool) -> SubjectFacts:
    raw = Raw(subject, sent.image_NCHW)
    content = subject.model.read_bytes()
    return SubjectFacts(
        name=name,
        multiply_adds=multiply_adds(onnx.load_model_from_string(content)),
        model_mb=len(content) / 1e6,
        raw_one_ms=raw.run_ms(1, _RAW_S),
        raw_batch_ms=raw.run_ms(BATCH, _RAW_S),
        mean_steps=_mean_steps(subject, sent.image_NCHW) if with_counterfactuals else None,
    )


def _mean_steps(subject: Subject, image_NCHW: np.ndarray) -> float:
    """Linearisations of the service's own search, mean over the test images."""
    classifier = Classifier.load(subject.zoo / subject.name, "cpu", 1)
    predictions = classifier.predict(image_NCHW)
    found = classifier.counterfactual(image_NCHW, predictions, [None] * len(predictions))
    return float(np.mean([answer.steps for answer in found]))


def _public(arguments: Sequence[str]) -> list[str]:
    """The arguments as they are printed, without the folder of the data."""
    shown: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith("--data"):
            shown.append(argument)
        skip = argument == "--data"
    return shown


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def _variant(text: str) -> Contestant:
    name, _, settings = text.partition(":")
    try:
        pairs = dict(word.split("=", 1) for word in _words(settings))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME:SETTING=VALUE,SETTING=VALUE") from None
    return ours(name, f"lipcert, {name}", pairs)


if __name__ == "__main__":
    main()
