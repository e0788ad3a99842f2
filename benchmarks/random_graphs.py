"""The certifier against many random graphs: `python benchmarks/random_graphs.py [--write]`, or `make random-graphs`.

The checks are those of the test suite (`tests/graph_checks.py`), on graphs of fixed seeds. Lipschitz bounds of the
logits, of each margin and of every tensor inside are compared with Jacobians and secants, decided in exact arithmetic;
computed tensors are compared with exact ones. Graphs that the certifier refuses do not count. `--write` replaces the
section "Random graphs" of `benchmarks/SOUNDNESS.md`. Exit status 1: a violation was found.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

# Each process is one thread.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from graph_checks import Bounds, Search, error_findings, runnable  # noqa: E402
from random_graphs import ARITHMETIC, FREQUENT, JOINT, REARRANGED, STEPS, Graph, seeded_graph  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.soundness.document import provenance, table, write_section  # noqa: E402
from models.export import code_version  # noqa: E402

NAME = "random graphs"
FIRST_OF_ERRORS = 10_000_000
"""First seed of the second row."""


@dataclass(frozen=True)
class Result:
    """Result of one seed; no tensors if the certifier refused the graph."""

    seed: int
    tensors: int = 0
    tight: bool = False
    findings: tuple[str, ...] = ()
    operators: frozenset[str] = frozenset()


def look_at_slopes(seed: int) -> Result:
    """Lipschitz bounds of the graph of a seed: all steps, linear steps in a row, rearranged elements by turns."""
    steps, most = ((FREQUENT, 6), (JOINT, 4), (REARRANGED, 4))[seed % 3]
    graph = seeded_graph(seed, steps, most)
    bounds = Bounds.of(graph.model)
    if bounds is None:
        return Result(seed)
    search = Search(graph, bounds, seed)
    found = tuple(search.findings)
    return Result(seed, search.tensors, search.tightness > 1.0 - 1e-6, found, frozenset(graph.operators))


def look_at_errors(seed: int) -> Result:
    """Rounding errors of the graph of a seed: single steps, arithmetic, all steps by turns."""
    single = (tuple(STEPS)[seed // 3 % len(STEPS)],)
    steps, most = ((single, 1), (ARITHMETIC, 4), (FREQUENT, 6))[seed % 3]
    graph: Graph = runnable(seeded_graph(seed, steps, most))
    bounds = Bounds.of(graph.model)
    if bounds is None:
        return Result(seed)
    tensors = len(bounds.certificates[0].nodes)
    return Result(seed, tensors, False, tuple(error_findings(graph, bounds, seed)), frozenset(graph.operators))


@dataclass
class Tally:
    """Results of all seeds of one kind."""

    first: int
    graphs: int = 0
    refused: int = 0
    tensors: int = 0
    tight: int = 0
    last: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.violations: list[Result] = []
        self.operators: Counter[str] = Counter()

    def see(self, result: Result) -> None:
        self.last = max(self.last, result.seed)
        if not result.tensors:
            self.refused += 1
            return
        self.graphs += 1
        self.tensors += result.tensors
        self.tight += result.tight
        self.operators.update(result.operators)
        if result.findings:
            self.violations.append(result)
            tqdm.write(f"seed {result.seed}: {'; '.join(result.findings[:3])}")


def _tallied(look: Callable[[int], Result], first: int, wanted: int, processes: int, title: str) -> Tally:
    """Run seeds from `first` until `wanted` graphs are certified."""
    tally = Tally(first)
    started = perf_counter()
    with get_context("spawn").Pool(processes) as pool, tqdm(total=wanted, desc=title, unit="graph") as progress:
        # In blocks: a pool would draw an endless sequence of seeds at once.
        for block in itertools.count(first, 500):
            for result in pool.imap(look, range(block, block + 500), chunksize=10):
                if tally.graphs == wanted:
                    break
                tally.see(result)
                progress.set_postfix(violations=len(tally.violations), refused=tally.refused, refresh=False)
                progress.update(tally.graphs - progress.n)
            if tally.graphs >= wanted:
                break
    tally.seconds = perf_counter() - started
    return tally


def _section(slopes: Tally, errors: Tally, processes: int, code: str) -> str:
    """The results as Markdown."""
    rows = [
        [
            violation,
            f"{tally.graphs:,}",
            f"{tally.tensors:,}",
            f"**{len(tally.violations)}**",
            f"{tally.refused:,}",
            f"{tally.first:,} to {tally.last:,}",
            f"{tally.seconds / 60:.0f} min",
        ]
        for violation, tally in (
            ("Lipschitz bound below a Jacobian or secant", slopes),
            ("computed logits or tensors further from the exact ones than their error bound", errors),
        )
    ]
    header = ["violation", "graphs", "tensors compared", "found", "refused, not counted", "seeds", "time"]
    operators = slopes.operators + errors.operators
    rare = sorted(operators.items(), key=lambda item: item[1])
    return f"""## Random graphs

Graphs of one to six random steps, each of one or more operators, with adversarial weights (equal, of rank one,
orthogonal, huge, tiny, nearly cancelling), in float64 and float32. Each tensor that the certificate reports on has its
Lipschitz bound compared with Jacobians at 18 images (the centre, corners, ties, and uphill from the steepest) and with
secants between all of them, the logits also pair by pair; exact rational or 320-bit ball arithmetic decides, without a
tolerance. Of the graphs, {slopes.tight / slopes.graphs:.0%} have a slope within 1e-6 of their bound. Rounding errors:
ONNX Runtime as the service runs it on three 8-bit images, against exact arithmetic.

{table(header, rows)}

{len(operators)} operators; the rarest are {", ".join(f"{name} ({count} graphs)" for name, count in rare[:6])}.
{processes} processes.

{provenance("make random-graphs", code)}
"""


def main() -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slopes", type=int, default=20_000, help="graphs whose Lipschitz bounds are looked at")
    parser.add_argument("--errors", type=int, default=5_000, help="graphs whose rounding errors are looked at")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true", help="write the section of benchmarks/SOUNDNESS.md")
    arguments = parser.parse_args()
    # Read now, since the tree may change during the run.
    code = code_version()
    errors = _tallied(look_at_errors, FIRST_OF_ERRORS, arguments.errors, arguments.processes, "errors")
    slopes = _tallied(look_at_slopes, 0, arguments.slopes, arguments.processes, "slopes")
    text = _section(slopes, errors, arguments.processes, code)
    print(text)
    if arguments.write:
        write_section(NAME, "random-graphs", text)
    return 1 if slopes.violations or errors.violations else 0


if __name__ == "__main__":
    sys.exit(main())
