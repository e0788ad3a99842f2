"""The figures that the service has to reach: floor, aim, measured value and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.serving.contestants import Contestant
from benchmarks.serving.results import Results

REFERENCE = "reference"
SMALL = "mnist-0-8"
ZOO = "zoo"


@dataclass(frozen=True)
class Figure:
    """A number with its floor and aim."""

    name: str
    floor: float
    aim: float
    got: float | None
    """Absent if not measured."""
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"

    @property
    def verdict(self) -> str:
        """One of `aim met`, `floor met`, `not met`, `not measured`."""
        if self.got is None:
            return "not measured"
        sign = 1.0 if self.better == "higher" else -1.0
        if sign * self.got >= sign * self.aim:
            return "aim met"
        return "floor met" if sign * self.got >= sign * self.floor else "not met"


@dataclass(frozen=True)
class Claim:
    """A row of the table: its figures and a note on them."""

    title: str
    figures: tuple[Figure, ...]
    note: str = ""


def claims(results: Results, contestants: Sequence[Contestant]) -> list[Claim]:
    """Return all rows, from the medians of the rounds."""
    tail = results.median(lambda cell: cell.p99_ms / cell.p50_ms, "ours", REFERENCE, "single", 64)
    return [
        _singles(results),
        Claim(
            "the same with all cores of the machine, 64 clients",
            tuple(
                Figure(form, 1.0, 1.5, results.median(lambda cell: cell.ratio, "ours-all", REFERENCE, load, 64))
                for form, load in (("raw image", "single"), ("base64", "base64"))
            ),
            "a process for each CPU: `LIPCERT_PROCESSES=0`",
        ),
        _against_peers(results, contestants),
        _against_echo(results),
        Claim(
            "`/predict/batch`, 32 images, npy in and out, over raw",
            (Figure("one client", 0.85, 0.95, results.median(lambda cell: cell.ratio, "ours", REFERENCE, "batch", 1)),),
            _batch_note(results),
        ),
        _overhead(results),
        Claim("p99 over p50 at 64 clients", (Figure("", 3.0, 2.0, tail, better="lower"),)),
        _counterfactuals(results),
        _memory_and_start(results),
        Claim(
            "cost per image from 1 to 256 clients: grows by",
            (Figure("processor time", 10.0, 0.0, growth_of_cost(results, "ours"), " %", "lower"),),
        ),
        Claim(
            "GPU: `/predict/batch` of 256 over raw on the same GPU",
            (Figure("", 0.6, 0.9, None),),
            "this command measures the CPU alone",
        ),
    ]


def _singles(results: Results) -> Claim:
    figures = [
        Figure(
            f"{form}, {clients} clients",
            floor,
            aim,
            results.median(lambda cell: cell.ratio, "ours", REFERENCE, load, clients),
        )
        for form, load in (("raw image", "single"), ("base64", "base64"))
        for clients, floor, aim in ((16, 0.5, 0.7), (64, 0.6, 0.9))
    ]
    return Claim("single-image requests, images/s over raw, one process", tuple(figures))


def fastest_packaged(results: Results, contestants: Sequence[Contestant], clients: int) -> tuple[str, float] | None:
    """Return name and median images a second of the fastest packaged peer on the reference.

    Args:
        results: all measurements.
        contestants: the servers.
        clients: number of concurrent clients.
    """
    rates = [
        (contestant.name, rate)
        for contestant in contestants
        if contestant.packaged
        and (rate := results.median(lambda cell: cell.images_per_s, contestant.name, REFERENCE, "single", clients))
    ]
    return max(rates, key=lambda item: item[1], default=None)


def _against_peers(results: Results, contestants: Sequence[Contestant]) -> Claim:
    titles = {contestant.name: contestant.title for contestant in contestants}
    figures: list[Figure] = []
    for clients, floor, aim in ((16, 2.0, 3.0), (64, 2.0, 4.0)):
        fastest = fastest_packaged(results, contestants, clients)
        got = None
        if fastest is not None:
            cells = (REFERENCE, "single", clients)
            got = results.quotient(lambda cell: cell.images_per_s, ("ours-all", *cells), (fastest[0], *cells))
        beside = f", {titles[fastest[0]]}" if fastest else ""
        figures.append(Figure(f"{clients} clients{beside}", floor, aim, got, " x"))
    note = "both with a process for each CPU"
    return Claim("against the fastest packaged peer, which answers logits only", tuple(figures), note)


def _against_echo(results: Results) -> Claim:
    def quotient(ours: str, echo: str, subject: str, clients: int) -> float | None:
        above, below = (ours, subject, "single", clients), (echo, REFERENCE, "single", clients)
        return results.quotient(lambda cell: cell.images_per_s, above, below)

    figures = tuple(
        Figure(f"`{SMALL}`, {how}, {clients} clients", 0.5, 0.8, quotient(ours, echo, SMALL, clients))
        for how, ours, echo in (("one process each", "ours", "echo"), ("all cores each", "ours-all", "echo-all"))
        for clients in (16, 64)
    )
    beside = [
        f"{title}: {got:.2f}"
        for title, got in (
            ("`mnist`, one process each, 64 clients", quotient("ours", "echo", "mnist", 64)),
            (
                "`mnist-0-8`, all cores against an echo of one process, 64 clients",
                quotient("ours-all", "echo", SMALL, 64),
            ),
        )
        if got is not None
    ]
    title = "small shipped artefact against an endpoint of the same framework that only echoes the body"
    return Claim(title, figures, "; ".join(beside))


def _batch_note(results: Results) -> str:
    four = results.median(lambda cell: cell.ratio, "ours", REFERENCE, "batch", 4)
    cells = results.of("ours", REFERENCE, "batch", 1)
    form = "" if not cells or all(cell.answers_npy for cell in cells) else "the answers were JSON; "
    return form + ("" if four is None else f"4 clients: {four:.2f}")


def _overhead(results: Results) -> Claim:
    def over(milliseconds: str) -> float | None:
        return results.median(
            lambda cell: None if cell.raw_one_ms is None else getattr(cell, milliseconds) - cell.raw_one_ms,
            "ours",
            REFERENCE,
        )

    return Claim(
        "overhead of one request on an idle server over the model's own time",
        (
            Figure("p50", 1.5, 0.6, over("p50_ms"), " ms", "lower"),
            Figure("p99", 4.0, 2.0, over("p99_ms"), " ms", "lower"),
        ),
        "the model's own time is the median raw run of one image, for both",
    )


def _counterfactuals(results: Results) -> Claim:
    def runs_over_raw(contestant: str, subject: str) -> float | None:
        facts = results.facts(subject)
        ratio = results.median(lambda cell: cell.ratio, contestant, subject, "counterfactual", 16)
        return None if ratio is None or facts is None or facts.mean_steps is None else ratio * facts.mean_steps

    figures: list[Figure] = []
    for subject in (REFERENCE, "mnist"):
        facts = results.facts(subject)
        steps = None if facts is None else facts.mean_steps
        figures += [
            Figure(f"`{subject}`", 0.5, 0.8, runs_over_raw("ours", subject)),
            Figure(f"`{subject}`, mean steps", 4.0, 2.5, steps, "", "lower"),
        ]
    several = [
        f"`{subject}` {got:.2f}" for subject in (REFERENCE, "mnist") if (got := runs_over_raw("ours-all", subject))
    ]
    return Claim(
        "counterfactual requests, 16 clients: images/s over raw runs of the gradient graph for the same number of "
        "steps; mean steps",
        tuple(figures),
        f"a process for each CPU: {', '.join(several)}" if several else "",
    )


def _memory_and_start(results: Results) -> Claim:
    figures: list[Figure] = []
    for subject, name in ((REFERENCE, "reference alone"), (ZOO, "all shipped models")):
        memory_mb = results.start(lambda start: max(start.idle_rss_mb, start.loaded_rss_mb), "ours", subject)
        ready_s = results.start(lambda start: start.ready_s, "ours", subject)
        figures += [
            Figure(f"{name}, memory", 200.0, 140.0, memory_mb, " MB", "lower"),
            Figure(f"{name}, ready", 2.0, 1.0, ready_s, " s", "lower"),
        ]
    return Claim("resident memory of one process; ready after start, warm-up included", tuple(figures))


def growth_of_cost(results: Results, contestant: str) -> float | None:
    """Return the growth of the processor time of an image from 1 to 256 clients, in percent."""
    many, one = (contestant, REFERENCE, "single", 256), (contestant, REFERENCE, "single", 1)
    quotient = results.quotient(lambda cell: cell.cpu_ms_per_image, many, one)
    return None if quotient is None else 100.0 * (quotient - 1.0)
