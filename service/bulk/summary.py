"""Counts of a complete run, and the share of inputs that is certified at each radius."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from service.bulk.tables import GRID, Record

_ROWS = 20
"""Of the table of a terminal, at most."""
_BAR = 40


def summarise(manifest: dict[str, Any], records: Iterable[Record]) -> dict[str, Any]:
    """Return the summary of a run as JSON.

    Args:
        manifest: of the run.
        records: of all its parts.
    """
    answered = errors = certified = robust = 0
    radii: Counter[int] = Counter()
    for record in records:
        answered, errors = answered + record.answered, errors + record.errors
        certified, robust = certified + record.certified, robust + record.robust
        radii.update({int(step): count for step, count in record.radii.items()})
    curve: list[dict[str, float]] = []
    left = certified
    for step in range(max(radii, default=0) + 1):
        curve.append({"epsilon": step / GRID, "certified": left, "share": left / max(1, answered)})
        left -= radii[step]
    summary = {name: manifest[name] for name in ("model", "digest", "options", "sources", "inputs")}
    summary |= {"answered": answered, "errors": errors, "certified": certified}
    if manifest["options"].get("epsilon") is not None:
        summary["robust_at_epsilon"] = robust
    histogram = [{"from": step / GRID, "below": (step + 1) / GRID, "answers": radii[step]} for step in sorted(radii)]
    return {**summary, "certified_share": curve, "radii": histogram}


def in_words(summary: dict[str, Any]) -> str:
    """Return the summary as text, with the certified share at some twenty radii."""
    lines = [f"{summary['model']} {summary['digest']}", counted(summary), ""]
    if "robust_at_epsilon" in summary:
        lines[1] += f"; robust at epsilon {summary['options']['epsilon']}: {summary['robust_at_epsilon']}"
    curve = summary["certified_share"]
    step = max(1, -(-len(curve) // _ROWS))
    lines.append("epsilon  certified  share of the answers with this radius or a larger one")
    for point in curve[::step]:
        bar = "#" * round(_BAR * point["share"])
        lines.append(f"{point['epsilon']:7.2f}  {point['certified']:9d}  {100 * point['share']:6.2f}%  {bar}".rstrip())
    return "\n".join(lines) + "\n"


def counted(summary: dict[str, Any]) -> str:
    """Return the counts in one line."""
    abstained = summary["answered"] - summary["certified"]
    return (
        f"{summary['inputs']} inputs: {summary['certified']} certified, {abstained} abstained, "
        f"{summary['errors']} not answered"
    )
