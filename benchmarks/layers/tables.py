"""The generated part of `docs/layers.md`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.layers.training import Budget, Row
from benchmarks.soundness import document


def section(budgets: Sequence[Budget], rows: Sequence[Row], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """One table for each budget, how far rows of other seeds are from those of seed 0, and rows of other epochs.

    Args:
        budgets: in the order of the tables.
        rows: of any seed; a method without a row of seed 0 is left out.
        seconds: budget -> method -> processor seconds of an epoch.
    """
    parts: list[str] = []
    for budget in budgets:
        own = [row for row in rows if row.epochs == budget.epochs]
        parts += [table(budget, own, seconds[budget.name])]
        if others := spread(budget, own):
            parts.append(others)
        if any(row.epochs != budget.epochs and row.method in seconds[budget.name] for row in rows):
            parts.append(longer(budget, rows, seconds[budget.name]))
    return "\n\n".join(parts)


def table(budget: Budget, rows: Sequence[Row], seconds: Mapping[str, float]) -> str:
    """Best certified accuracy at the second epsilon first."""
    by_name = {row.method: row for row in rows if row.seed == 0}
    methods = sorted(
        (method for method in budget.methods if method.name in by_name),
        key=lambda method: -by_name[method.name].certified[1],
    )
    cells: list[list[str]] = []
    for method in methods:
        row = by_name[method.name]
        cells.append(
            [
                method.title,
                method.source,
                f"{seconds[method.name]:.1f}",
                f"{row.multiply_adds / 1e6:.2f}",
                f"{row.parameters / 1e6:.2f}",
                f"{row.rate:g}",
                percent(row.accuracy),
                *(percent(value) for value in row.certified),
                bound_text(row.proved_bound),
                f"{row.slope:.2f}",
            ]
        )
    n = {row.n for row in by_name.values() if row.method in {method.name for method in methods}}
    header = [
        "weights",
        "from",
        "s an epoch",
        "10^6 multiply-adds",
        "10^6 parameters",
        "rate",
        "clean",
        *(f"certified at {name}" for name in budget.names),
        "bound <=",
        "slope",
    ]
    count = ", ".join(f"{value:,}" for value in sorted(n))
    title = f"### {budget.name.capitalize()}: {budget.dataset}, test set, n = {count}"
    return f"{title}\n\n{document.table(header, cells)}"


def spread(budget: Budget, rows: Sequence[Row]) -> str:
    """The figures of every method that ran with several seeds."""
    lines: list[str] = []
    for method in budget.methods:
        own = [row for row in rows if row.method == method.name]
        if len(own) < 2:
            continue
        columns = [
            [row.accuracy for row in own],
            *([row.certified[k] for row in own] for k in range(len(budget.names))),
        ]
        texts = [", ".join(percent(value) for value in column) for column in columns]
        named = zip(("clean", *(f"at {name}" for name in budget.names)), texts, strict=True)
        lines.append(f"* {method.title}, {len(own)} seeds: " + "; ".join(f"{name} {text}" for name, text in named))
    return "\n".join(lines)


def longer(budget: Budget, rows: Sequence[Row], seconds: Mapping[str, float]) -> str:
    """All rows of seed 0, of whatever number of epochs, in the order of their processor time."""
    titles = {method.name: method.title for method in budget.methods}
    first = [row for row in rows if row.seed == 0 and row.method in titles]
    cells = [
        [
            titles[row.method],
            str(row.epochs),
            f"{row.epochs * seconds[row.method]:.0f}",
            percent(row.accuracy),
            *(percent(value) for value in row.certified),
        ]
        for row in sorted(first, key=lambda row: row.epochs * seconds[row.method])
    ]
    header = ["weights", "epochs", "s in all", "clean", *(f"certified at {name}" for name in budget.names)]
    return f"By processor time, with rows of other numbers of epochs:\n\n{document.table(header, cells)}"


def percent(share: float) -> str:
    """Two decimals: of 10,000 images that is exact."""
    return f"{100.0 * share:.2f}"


def bound_text(bound: float) -> str:
    """A bound must not look smaller than it is."""
    return f"{math.ceil(bound * 1e7) / 1e7:.7f}"
