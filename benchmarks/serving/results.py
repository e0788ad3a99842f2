"""What was measured, as one JSON file that later runs add to, and the medians that are reported."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.serving.measure import CellResult, StartResult
from models.export import environment

LIBRARIES = ("onnxruntime", "numpy", "pillow", "fastapi", "uvicorn", "uvloop", "httptools", "pydantic")


@dataclass(frozen=True)
class Run:
    """One call of the command."""

    id: str
    """When it began, UTC."""
    command: str
    code: str
    """Version of the source tree."""
    rounds: int
    seconds: int
    cpu: str
    cpus: int
    machine: str
    versions: dict[str, str]
    load_average: float
    """Of the machine before the run."""


@dataclass(frozen=True)
class SubjectFacts:
    """An artefact, and ONNX Runtime alone on it."""

    name: str
    multiply_adds: int
    model_mb: float
    raw_one_ms: float
    raw_batch_ms: float
    """Of 32 images."""
    mean_steps: float | None
    """Linearisations of one counterfactual search, mean over the test images."""


@dataclass
class Results:
    """Everything that is known; `merge` replaces what was measured again."""

    runs: list[Run] = field(default_factory=list[Run])
    subjects: list[SubjectFacts] = field(default_factory=list[SubjectFacts])
    cells: list[CellResult] = field(default_factory=list[CellResult])
    starts: list[StartResult] = field(default_factory=list[StartResult])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Contestant -> why it could not be measured."""

    def merge(self, new: Results) -> Results:
        """This, with the cells, starts, artefacts and failures of `new` in place of older ones of the same names."""
        cells = {_cell_key(cell) for cell in new.cells}
        starts = {(start.contestant, start.subject) for start in new.starts}
        subjects = {subject.name for subject in new.subjects}
        measured = {start.contestant for start in new.starts}
        kept_cells = [cell for cell in self.cells if _cell_key(cell) not in cells]
        kept = {cell.run for cell in kept_cells}
        return Results(
            runs=[*(run for run in self.runs if run.id in kept), *new.runs],
            subjects=[*(subject for subject in self.subjects if subject.name not in subjects), *new.subjects],
            cells=[*kept_cells, *new.cells],
            starts=[*(start for start in self.starts if (start.contestant, start.subject) not in starts), *new.starts],
            failed={name: why for name, why in self.failed.items() if name not in measured} | new.failed,
        )

    def median(
        self,
        value: Callable[[CellResult], float | None],
        contestant: str,
        subject: str,
        load: str = "single",
        clients: int = 1,
    ) -> float | None:
        """Median over the rounds of a figure of one cell; None where it was not measured."""
        return median_of(value(cell) for cell in self.of(contestant, subject, load, clients))

    def of(self, contestant: str, subject: str, load: str, clients: int) -> list[CellResult]:
        """The rounds of one cell, in order."""
        wanted = (contestant, subject, load, clients)
        return sorted((cell for cell in self.cells if _cell_key(cell) == wanted), key=lambda cell: cell.round)

    def start(self, value: Callable[[StartResult], float], contestant: str, subject: str) -> float | None:
        """Median over the starts of a server."""
        return median_of(
            value(start) for start in self.starts if (start.contestant, start.subject) == (contestant, subject)
        )

    def quotient(
        self,
        value: Callable[[CellResult], float],
        above: tuple[str, str, str, int],
        below: tuple[str, str, str, int],
    ) -> float | None:
        """Median over the rounds of the quotient of a figure of two cells, each pair from one round of one run."""
        others = {(cell.run, cell.round): cell for cell in self.of(*below)}
        pairs = ((cell, others.get((cell.run, cell.round))) for cell in self.of(*above))
        return median_of(value(one) / value(other) for one, other in pairs if other is not None)

    def facts(self, subject: str) -> SubjectFacts | None:
        """What is known of the artefact of this name."""
        return next((facts for facts in self.subjects if facts.name == subject), None)

    def save(self, file: Path) -> None:
        """Write everything as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Results:
        """Read what `save` wrote; nothing where there is no file."""
        if not file.exists():
            return cls()
        content = json.loads(file.read_text(encoding="utf-8"))
        return cls(
            runs=[Run(**run) for run in content["runs"]],
            subjects=[SubjectFacts(**subject) for subject in content["subjects"]],
            cells=[CellResult(**cell) for cell in content["cells"]],
            starts=[StartResult(**start) for start in content["starts"]],
            failed=content["failed"],
        )


def median_of(values: Any) -> float | None:
    """Median of the numbers, those that are None left out; None of none."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def describe_run(id_: str, command: Sequence[str], code: str, rounds: int, seconds: int) -> Run:
    """Hardware and versions of this machine; no host name, no path."""
    made = environment(0.0)
    return Run(
        id=id_,
        command=" ".join(command),
        code=code,
        rounds=rounds,
        seconds=seconds,
        cpu=str(made["cpu"]),
        cpus=len(os.sched_getaffinity(0)),
        machine=platform.machine(),
        versions={"Python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}},
        load_average=os.getloadavg()[0],
    )


def _cell_key(cell: CellResult) -> tuple[str, str, str, int]:
    return (cell.contestant, cell.subject, cell.load, cell.clients)
