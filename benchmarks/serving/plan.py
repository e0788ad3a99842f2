"""Which cells are measured: contestant x artefact x load x clients, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.artefacts import REFERENCE_CHANNELS, SHIPPED
from benchmarks.serving.contestants import LOADS, Contestant, LoadName

CLIENTS = (1, 16, 64, 256)
MANY = 256
ZOO = "zoo"
"""Not an artefact: all shipped ones in one server, for its memory and its start."""
GROWN = tuple(name for name in REFERENCE_CHANNELS if name != "reference")


@dataclass(frozen=True)
class Cell:
    """One kind of load on one server."""

    load: LoadName
    clients: int


@dataclass(frozen=True)
class Instance:
    """A server that is started once in each round, and its cells in order."""

    contestant: Contestant
    subject: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Effort:
    """How long everything takes."""

    rounds: int
    grown_rounds: int
    """Of these, in how many the grown artefacts take part."""
    seconds: int
    """Of each cell; twice that for `MANY` clients, who all have to be answered some times."""
    raw_s: float
    """Of the raw measurement before and after each cell."""

    def seconds_of(self, cell: Cell) -> int:
        """How long the clients of a cell send."""
        return self.seconds * (2 if cell.clients >= MANY else 1)

    def takes_part(self, subject: str, round_: int) -> bool:
        """Whether an artefact is measured in this round."""
        return subject not in GROWN or round_ < self.grown_rounds


FULL = Effort(rounds=5, grown_rounds=3, seconds=2, raw_s=0.3)
QUICK = Effort(rounds=1, grown_rounds=1, seconds=1, raw_s=0.3)


def instances(
    contestants: Sequence[Contestant],
    *,
    quick: bool = False,
    only: Sequence[str] = (),
    clients: Sequence[int] = (),
) -> list[Instance]:
    """All servers of a round.

    Args:
        contestants: who takes part.
        quick: leave out what is not needed to see the effect of a change: grown artefacts and the whole zoo.
        only: names of contestants, artefacts and loads; where some of a kind are named, the others are left out.
        clients: numbers of clients to keep; empty keeps all.

    Raises:
        ValueError: a name in `only` is none of these, or nothing is left.
    """
    kinds: list[set[str]] = [
        {contestant.name for contestant in contestants},
        {*REFERENCE_CHANNELS, *SHIPPED, ZOO},
        set(LOADS),
    ]
    unknown = sorted(set(only) - set[str]().union(*kinds))
    if unknown:
        known = ", ".join(sorted(set[str]().union(*kinds)))
        raise ValueError(f"{', '.join(unknown)}: neither contestant, artefact nor load; there are {known}")
    names, subjects, loads = (kind & set(only) or kind for kind in kinds)
    subjects_asked = bool(kinds[1] & set(only))
    result: list[Instance] = []
    for subject in (*REFERENCE_CHANNELS, *SHIPPED, ZOO):
        for contestant in contestants:
            left_out = quick and not subjects_asked and subject in (*GROWN, ZOO)
            if contestant.name not in names or subject not in subjects or left_out:
                continue
            cells = tuple(
                cell
                for cell in _cells(contestant, subject)
                if cell.load in loads and (not clients or cell.clients in clients)
            )
            if cells or (subject == ZOO and contestant.kind == "ours"):
                result.append(Instance(contestant, subject, cells))
    if not result:
        raise ValueError("nothing is left to measure")
    return result


def _cells(contestant: Contestant, subject: str) -> list[Cell]:
    is_ours = contestant.kind == "ours"
    if subject == ZOO:
        return []
    single = [Cell("single", clients) for clients in CLIENTS]
    if subject in GROWN:
        return [] if contestant.kind == "echo" else [Cell("single", 64)]
    if subject in SHIPPED:
        return [*single, Cell("counterfactual", 16)] if is_ours else []
    if not is_ours:
        return single
    return [
        *single,
        Cell("base64", 16),
        Cell("base64", 64),
        Cell("batch", 1),
        Cell("batch", 4),
        Cell("counterfactual", 16),
    ]
