"""Certify what `export.py` wrote and compare with the claims: `python -m benchmarks.libraries.certify DIR [--write]`.

For every file: the proved bound, the constant that the library claims, and the largest Jacobian norm that was
measured. `--write` puts the section `libraries` into `benchmarks/SOUNDNESS.md`. Exit status 1 if a bound is below what
was measured; a bound above `WITHIN` times a true claim is called loose in the table and on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.soundness import document
from models.export import code_version
from service.certificate import UnsupportedModelError, certify

WITHIN = 1.02
"""What a bound may be of a true claim."""


@dataclass(frozen=True)
class Result:
    """What came out for one file."""

    form: str
    lipschitz_bound: float | None = None
    margin_bound: float | None = None
    """The largest over pairs of classes."""
    why_not: str = ""
    """Refusals of the certifier, or the exporter's failure."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Row:
    """One network in all of its forms."""

    name: str
    claims: dict[str, Any]
    results: tuple[Result, ...]

    @property
    def proved(self) -> list[Result]:
        return [result for result in self.results if result.lipschitz_bound is not None]

    def within_claims(self, result: Result) -> bool:
        """Whether the bounds of the map and of the margin are what the library says."""
        pairs = ((result.lipschitz_bound, self.claims["claim"]), (result.margin_bound, self.claims["claim_margin"]))
        return all(bound is not None and bound <= WITHIN * claim for bound, claim in pairs)

    @property
    def below_measured(self) -> list[Result]:
        """What must never be: bounds that are none. The Jacobian was measured in float64."""
        estimate = self.claims["lipschitz_estimate"] * (1.0 - 1e-12)
        return [result for result in self.proved if (result.lipschitz_bound or 0.0) < estimate]

    @property
    def loose(self) -> list[Result]:
        """Bounds above a true claim."""
        if self.claims["claim"] is None or not self.claims["holds"]:
            return []
        return [result for result in self.proved if not self.within_claims(result)]


def reasons(error: UnsupportedModelError) -> str:
    """The refusals in short: how often which operator for which reason."""
    counts: Counter[str] = Counter()
    for reason in error.reasons:
        label, _, why = reason.partition(": ")
        operator = re.match(r"([A-Z]\w+) '", label)
        counts[
            f"{operator[1]}: {why.split(',')[0].split(';')[0]}" if operator else re.sub(r"'[^']*' ", "", reason)
        ] += 1
    return "; ".join(f"{n} x {reason}" if n > 1 else reason for reason, n in counts.items())


def _result_of(form: str, folder: Path, entry: dict[str, str]) -> Result:
    """Certify one file."""
    if "exporter_fails" in entry:
        return Result(form, why_not=f"no file, the exporter fails: {entry['exporter_fails'].splitlines()[0]}")
    started = time.perf_counter()
    try:
        certificate = certify((folder / entry["file"]).read_bytes())
    except UnsupportedModelError as error:
        return Result(form, why_not=f"refused: {reasons(error)}", seconds=time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return Result(form, certificate.lipschitz_bound, float(certificate.margin_bounds_KK.max()), seconds=seconds)


def verdict(row: Row) -> str:
    """Last column: claim against bound."""
    if not row.proved:
        return "refused"
    if row.claims["claim"] is None:
        return "no claim"
    if row.claims["holds"]:
        return "**loose**" if row.loose else "proved"
    largest = max(result.lipschitz_bound or 0.0 for result in row.proved)
    measured = row.claims["lipschitz_estimate"] > row.claims["claim"] * (1.0 + 1e-9)
    if measured:
        return "claim is false: measured, and the bound says so"
    return "the layers' claim is false" + (": the bound says so" if largest > row.claims["claim"] else "")


def up(value: float) -> str:
    """A bound must not look smaller than it is."""
    return f"{math.ceil(value * 1e6) / 1e6:.6f}"


def down(value: float) -> str:
    """Neither must what was measured look larger."""
    return f"{math.floor(value * 1e6) / 1e6:.6f}"


def table(rows: list[Row], library: str) -> str:
    """The networks of one library."""
    cells: list[list[str]] = []
    for row in rows:
        claims = row.claims
        if claims["library"] != library:
            continue
        bounds = sorted({up(result.lipschitz_bound or 0.0) for result in row.proved})
        margins = sorted({up(result.margin_bound or 0.0) for result in row.proved})
        claim, claim_margin = (
            "-" if value is None else f"{value:.5g}" for value in (claims["claim"], claims["claim_margin"])
        )
        cells.append(
            [
                row.name,
                claims["what"],
                claim,
                down(claims["lipschitz_estimate"]),
                ", ".join(bounds) or "-",
                f"{', '.join(margins)} ({claim_margin})" if margins else "-",
                verdict(row),
            ]
        )
    return document.table(["network", "layers", "claim", "measured >=", "proved <=", "margin <= (claim)", ""], cells)


def section(rows: list[Row], versions: dict[str, str]) -> str:
    """The block of SOUNDNESS.md."""
    results = [result for row in rows for result in row.results]
    proved = [(row, result) for row in rows for result in row.proved]
    true_claims = [(row, result) for row, result in proved if row.claims["claim"] is not None and row.claims["holds"]]
    within = sum(row.within_claims(result) for row, result in true_claims)
    worst = max(((result.lipschitz_bound or 0.0) / row.claims["claim"] for row, result in true_claims), default=0.0)
    below = sum(len(row.below_measured) for row in rows)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    seconds = max((result.seconds for result in results), default=0.0)
    lines = [
        "## Models of other libraries",
        "",
        f"{len(rows)} networks of {packages}, each exported by both of torch's exporters where they can: "
        f"{len(results)} exports, {len(proved)} certified from their bytes, {len(results) - len(proved)} refused or "
        "not written. `claim` is what the library says of the L2 Lipschitz constant of the map to the logits "
        "(a head with K rows of norm 1 makes that sqrt(K)), `measured` the largest norm of a Jacobian in "
        "float64 at 6 images, rounded down, `proved` the certifier's bound, rounded up, `margin` its largest "
        "bound for the difference of two logits.",
        "",
        f"* Bounds below what was measured: **{below}** of {len(proved)}.",
        f"* True claims: **{within}** of {len(true_claims)} certified files have both bounds within {WITHIN} of the "
        f"claim; the largest bound is {worst:.6f} of it.",
        "* False claims: deel-torchlip divides a k x k kernel by k, for a pixel is in k k patches. Padding `reflect`, "
        "and `replicate` of 5 x 5, put pixels near the border in more: the rows `layer-...` measure it, and their "
        "bounds say the same. True claims hold up to the accuracy of power and Bjorck iterations, about 1e-6.",
        f"* The slowest proof took {seconds:.1f} s.",
    ]
    for library in dict.fromkeys(row.claims["library"] for row in rows):
        version = versions.get(library, "")
        lines += ["", f"### {library} {version}".rstrip(), "", table(rows, library)]
    refused = [(row, result) for row in rows for result in row.results if result.why_not]
    cells = [[row.name, result.form, result.why_not.replace("|", "/")] for row, result in refused]
    lines += ["", "### Not certified", "", document.table(["network", "export", "why"], cells)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--write", action="store_true", help="write the section of benchmarks/SOUNDNESS.md")
    arguments = parser.parse_args()
    claims = json.loads((arguments.folder / "claims.json").read_text(encoding="utf-8"))
    # Before anything is written: the file that is written is part of the tree.
    code = code_version()
    rows: list[Row] = []
    for name, entry in claims["networks"].items():
        results = [_result_of(form, arguments.folder, file) for form, file in entry["files"].items()]
        rows.append(Row(name, entry, tuple(results)))
        print(name, [result.lipschitz_bound or result.why_not[:60] for result in results], flush=True)
    if arguments.write:
        text = section(rows, claims["versions"])
        made = document.provenance("make libraries", code)
        document.write_section("libraries", "libraries", f"{text}\n{made}\n")
    for row in rows:
        for result in row.loose:
            sys.stderr.write(
                f"loose: {row.name} {result.form}: {result.lipschitz_bound}, claim {row.claims['claim']}\n"
            )
        for result in row.below_measured:
            sys.stderr.write(f"NO BOUND: {row.name} {result.form}: {result.lipschitz_bound}\n")
    return int(any(row.below_measured for row in rows))


if __name__ == "__main__":
    sys.exit(main())
