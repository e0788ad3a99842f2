"""The content of `benchmarks/RESULTS.md`, from the results alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.serving.artefacts import BATCH, IMAGES, REFERENCE_CHANNELS, SHIPPED
from benchmarks.serving.claims import REFERENCE, ZOO, Claim, claims, growth_of_cost
from benchmarks.serving.contestants import Contestant
from benchmarks.serving.measure import CellResult, StartResult
from benchmarks.serving.plan import CLIENTS, MANY
from benchmarks.serving.results import Results
from benchmarks.soundness.document import table

THROUGHPUT_PLOT = "throughput.svg"
GROWTH_PLOT = "growth.svg"
_COLUMNS = tuple(f"{clients} client{'s' if clients > 1 else ''}" for clients in CLIENTS)


def document(results: Results, contestants: Sequence[Contestant]) -> str:
    """Return the whole file."""
    measured = [one for one in contestants if any(cell.contestant == one.name for cell in results.cells)]
    parts = [
        "# Benchmark results\n\nWritten by `make bench`. The network is the loopback interface, and the limit is "
        "ONNX Runtime alone on the same graph.",
        _made(results),
        "## Must show\n\n" + must_show(claims(results, contestants)),
        _artefacts(results),
        _servers(results, contestants),
        _reference(results, measured),
        _other_loads(results, measured),
        _small(results, measured),
        _grown(results, measured),
        _memory(results, measured),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def must_show(rows: Sequence[Claim]) -> str:
    """Return the table of claims: one line for each figure."""
    body: list[Sequence[object]] = []
    for claim in rows:
        for index, figure in enumerate(claim.figures):
            title, note = (claim.title, claim.note) if index == 0 else ("", "")
            got = "-" if figure.got is None else f"**{_number(figure.got)}{figure.unit}**"
            limits = [f"{_number(limit)}{figure.unit}" for limit in (figure.floor, figure.aim)]
            body.append([title, figure.name, *limits, got, figure.verdict, note])
    return table(["", "", "floor", "aim", "got", "", "note"], body)


def _number(value: float) -> str:
    """Return three significant digits, never in powers of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _made(results: Results) -> str:
    lines: list[str] = []
    for run in results.runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        lines.append(
            f"{run.id}: `{run.command}`, code {run.code}; {run.rounds} round{'s' if run.rounds != 1 else ''}, "
            f"{run.seconds} s for each cell and round, "
            f"twice that for {MANY} clients. {run.cpu}, {run.cpus} CPUs, {run.machine}; {versions}. Load "
            f"average of the machine before: {run.load_average:.1f}."
        )
    if len(lines) > 1:
        lines.insert(0, "Measured in more than one run; quotients of two figures are taken within one run alone.")
    lines.append(
        f"Load: `wrk`, one thread, on the same CPUs as the server; {IMAGES} MNIST test images in turn, every answer "
        "200. Before each load the logits in the answers are compared with raw ones. The figures are medians of the "
        "rounds, in which all servers take turns; one server runs at a time. Raw is ONNX Runtime in process, one "
        f"thread, batches of {BATCH}, its own default options, measured just before and after each cell; a ratio is "
        "images a second over it. wrk's percentiles include the samples that a stalled connection could not take."
    )
    return "\n\n".join(lines)


def _artefacts(results: Results) -> str:
    rows = [
        [
            f"`{facts.name}`",
            f"{facts.multiply_adds / 1e6:.2f}",
            f"{facts.model_mb:.1f}",
            f"{facts.raw_one_ms:.3f}",
            f"{facts.raw_batch_ms:.2f}",
            f"{1e3 * BATCH / facts.raw_batch_ms:,.0f}",
            None if facts.mean_steps is None else f"{facts.mean_steps:.2f}",
        ]
        for name in (*REFERENCE_CHANNELS, *SHIPPED)
        if (facts := results.facts(name)) is not None
    ]
    if not rows:
        return ""
    header = ["artefact", "10^6 multiply-adds", "MB", "raw, 1 image, ms", f"raw, {BATCH} images, ms", "images/s"]
    return (
        "## Artefacts\n\nThe reference has random weights and is proved like any other: windows of 7 x 7 become "
        "channels of 4 x 4 pixels, then three shift-and-mix convolutions with GroupSort2 and a dense head, "
        "float64. Multiply-adds are counted from the graph; nearly all are in three matrix products. x4 and x16 have "
        "twice and four times the channels.\n\n" + table([*header, "mean steps of a counterfactual"], rows)
    )


def _servers(results: Results, contestants: Sequence[Contestant]) -> str:
    rows: list[Sequence[object]] = []
    for one in contestants:
        why = results.failed.get(one.name)
        rows.append([one.title, one.note, "" if why is None else f"not measured: `{_one_line(why)}`"])
    return (
        "## Servers\n\nThis service answers class, certified radius and logits; the peers logits alone. Programs: "
        "`benchmarks/serving/peers`; versions: `benchmarks/serving/requirements*.txt`.\n\n"
        + table(["", "configuration", ""], rows)
    )


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}")[:300].replace("|", "\\|").replace("`", "'")


def _reference(results: Results, contestants: Sequence[Contestant]) -> str:
    if not any(cell.subject == REFERENCE for cell in results.cells):
        return ""

    def by_clients(figure: Callable[[CellResult], str]) -> str:
        rows = [
            [one.title, *(_cell(results, figure, one.name, REFERENCE, "single", clients) for clients in CLIENTS)]
            for one in contestants
        ]
        return table(["", *_COLUMNS], rows)

    growth = [(one.title, growth_of_cost(results, one.name)) for one in contestants]
    grown = "; ".join(f"{title} {value:+.0f} %" for title, value in growth if value is not None)
    return "\n\n".join(
        [
            "## Single images on the reference",
            "Images a second (and over raw):",
            by_clients(lambda cell: f"{cell.images_per_s:,.0f} ({cell.ratio:.2f})"),
            f"![throughput against clients]({THROUGHPUT_PLOT})",
            "Latency p50 / p99 in ms (p99 over p50):",
            by_clients(lambda cell: f"{cell.p50_ms:.2f} / {cell.p99_ms:.2f} ({cell.p99_ms / cell.p50_ms:.1f})"),
            "Processor time of the server, ms for each image:",
            by_clients(lambda cell: f"{cell.cpu_ms_per_image:.2f}"),
            f"From 1 to 256 clients it grows by: {grown}." if grown else "",
            *_spread(results, contestants),
        ]
    )


def _cell(
    results: Results, figure: Callable[[CellResult], str], contestant: str, subject: str, load: str, clients: int
) -> str | None:
    """Return the figure of the round with the median throughput."""
    cells = sorted(results.of(contestant, subject, load, clients), key=lambda cell: cell.images_per_s)
    return figure(cells[len(cells) // 2]) if cells else None


def _spread(results: Results, contestants: Sequence[Contestant]) -> list[str]:
    rows: list[Sequence[object]] = []
    most = 0
    for one in contestants:
        row: list[object] = [one.title]
        for clients in CLIENTS:
            ratios = [cell.ratio for cell in results.of(one.name, REFERENCE, "single", clients)]
            most = max(most, len(ratios))
            row.append(f"{min(ratios):.2f} - {max(ratios):.2f} (n = {len(ratios)})" if ratios else None)
        rows.append(row)
    return ["Smallest and largest ratio to raw among the rounds:", table(["", *_COLUMNS], rows)] if most > 1 else []


def _other_loads(results: Results, contestants: Sequence[Contestant]) -> str:
    seen = sorted({(cell.load, cell.subject, cell.clients) for cell in results.cells if cell.load != "single"})
    rows: list[Sequence[object]] = []
    for load, subject, clients in seen:
        for one in contestants:
            cells = results.of(one.name, subject, load, clients)
            if not cells:
                continue
            facts = results.facts(subject)
            steps = facts.mean_steps if facts and load == "counterfactual" else 1.0
            ratio = results.median(lambda cell: cell.ratio, one.name, subject, load, clients)
            form = {"base64": "base64 in JSON", "batch": f"batches of {BATCH}, npy in"}.get(load, load)
            if load == "batch":
                form += ", npy out" if all(cell.answers_npy for cell in cells) else ", JSON out"
            figures = (
                lambda cell: f"{cell.images_per_s:,.0f}",
                lambda cell: f"{cell.p50_ms:.1f} / {cell.p99_ms:.1f}",
                lambda cell: f"{cell.cpu_ms_per_image:.2f}",
            )
            rate, latency, cost = (_cell(results, figure, one.name, subject, load, clients) for figure in figures)
            over_raw = None if steps is None or ratio is None else f"{ratio * steps:.2f}"
            rows.append([form, f"`{subject}`", one.title, clients, rate, over_raw, latency, cost])
    if not rows:
        return ""
    header = ["", "artefact", "", "clients", "images/s", "over raw", "p50 / p99, ms", "CPU ms/image"]
    return (
        "## Other requests\n\nFor counterfactuals raw is a run of the gradient graph (logits and gradient) for each of "
        "the search's steps, mean over the test images; what the search classifies besides is not in it.\n\n"
        + table(header, rows)
    )


def _small(results: Results, contestants: Sequence[Contestant]) -> str:
    def rates(contestant: str, subject: str) -> list[str | None]:
        def figure(cell: CellResult) -> str:
            return f"{cell.images_per_s:,.0f} ({cell.p50_ms:.2f} / {cell.p99_ms:.2f})"

        return [_cell(results, figure, contestant, subject, "single", clients) for clients in CLIENTS]

    rows: list[Sequence[object]] = [
        [f"`{subject}`", one.title, *cells]
        for subject in SHIPPED
        for one in contestants
        if any(cells := rates(one.name, subject))
    ]
    if not rows:
        return ""
    if any(echo := rates("echo", REFERENCE)):
        rows.append(["none", "echo of the body", *echo])
    return "## Shipped artefacts\n\nImages a second (p50 / p99 in ms), single images:\n\n" + table(
        ["artefact", "", *_COLUMNS], rows
    )


def _grown(results: Results, contestants: Sequence[Contestant]) -> str:
    grown = [name for name in REFERENCE_CHANNELS if any(cell.subject == name for cell in results.cells)]
    if len(grown) < 2:
        return ""

    def figure(cell: CellResult) -> str:
        return f"{cell.images_per_s:,.0f} ({cell.ratio:.2f}), {cell.cpu_ms_per_image:.2f}"

    rows = [
        [one.title, *(_cell(results, figure, one.name, subject, "single", 64) for subject in grown)]
        for one in contestants
        if any(results.of(one.name, subject, "single", 64) for subject in grown[1:])
    ]
    rounds = max(len(results.of(one.name, grown[-1], "single", 64)) for one in contestants)
    return (
        "## Cost as the model grows\n\n64 clients, single images: images a second (over raw), processor time of the "
        f"server in ms for each image. {grown[-1]}: n = {rounds}.\n\n"
        + table(["", *(f"`{name}`" for name in grown)], rows)
    ) + f"\n\n![cost against size of the model]({GROWTH_PLOT})"


def _memory(results: Results, contestants: Sequence[Contestant]) -> str:
    rows = [
        _start_row(one, subject, starts)
        for subject in (*REFERENCE_CHANNELS, *SHIPPED, ZOO)
        for one in contestants
        if (starts := [start for start in results.starts if (start.contestant, start.subject) == (one.name, subject)])
        and (subject == REFERENCE or one.kind == "ours")
    ]
    memory = ["resident, MB: idle / after load", "shared pages once, MB", "processes", "n"]
    return (
        "## Memory and start\n\nFrom the start of the process to the first 200 of its readiness path; proof, loading "
        "and warm-up included. Resident memory is the sum over the processes of a server.\n\n"
        + table(["", "artefact", "ready after, s", *memory], rows)
    )


def _start_row(one: Contestant, subject: str, starts: Sequence[StartResult]) -> list[object]:
    def mid(value: Callable[[StartResult], float]) -> float:
        return statistics.median(value(start) for start in starts)

    return [
        one.title,
        "all shipped" if subject == ZOO else f"`{subject}`",
        f"{mid(lambda start: start.ready_s):.2f}",
        f"{mid(lambda start: start.idle_rss_mb):.0f} / {mid(lambda start: start.loaded_rss_mb):.0f}",
        f"{mid(lambda start: start.idle_pss_mb):.0f} / {mid(lambda start: start.loaded_pss_mb):.0f}",
        f"{mid(lambda start: start.processes):.0f}",
        len(starts),
    ]
