"""Rows as a readable table, and as CSV, JSON lines or Parquet; each row is written when it is there."""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_FLOOR, Decimal
from typing import IO, Any, TextIO

from service.sheets.rows import COLUMNS, Row, flat

_GROUP = 1000
"""Rows that are written to a Parquet file together."""
_LARGEST_SHOWN = Decimal("99999.9999")
_WIDEST = 60
"""Width of the column of files; longer names are cut in the middle."""


class Table:
    """Aligned columns on a terminal."""

    def __init__(
        self,
        out: TextIO,
        files: Sequence[str],
        labels: Sequence[str],
        with_epsilon: bool,
        with_other: bool,
        with_novelty: bool,
    ):
        """Write the head.

        Args:
            out: text stream.
            files: all files, for the width of their column.
            labels: those of the model, likewise.
            with_epsilon: whether there is a column `robust`.
            with_other: whether there are columns about counterfactuals.
            with_novelty: whether there is a column `novel`.
        """
        file = min(_WIDEST, max([len("file"), *map(_width, files)]))
        label = max(len("runner-up"), *map(_width, labels))
        self._out = out
        self._columns = {"file": -file, "label": -label, "radius": 10, "certified": -9, "runner-up": -label}
        if with_epsilon:
            self._columns["robust"] = -6
        if with_other:
            self._columns |= {"other": -label, "distance": 10}
        if with_novelty:
            self._columns["novel"] = -5
        self._line(dict(zip(self._columns, self._columns, strict=True)))

    def add(self, row: Row) -> None:
        """Write a row."""
        if row.answer is None:
            self._line({"file": row.file, "label": f"error: {row.error}"})
            return
        certificate, counterfactual = row.answer.certificate, row.answer.counterfactual
        cells = {
            "file": row.file,
            "label": row.answer.label,
            "radius": rounded_down(certificate.radius),
            "certified": "yes" if certificate.certified else "no",
            "runner-up": certificate.runner_up.label,
            "robust": "yes" if certificate.robust_at_epsilon else "no",
        }
        if counterfactual is not None:
            cells |= {
                "other": counterfactual.label if counterfactual.reached else "not found",
                "distance": f"{counterfactual.distance:.4f}" if counterfactual.reached else "",
            }
        if row.answer.novelty is not None:
            cells["novel"] = "yes" if row.answer.novelty.novel else "no"
        self._line(cells)

    def _line(self, cells: dict[str, str]) -> None:
        """Write the cells, of which the last may be wider than its column."""
        texts: list[str] = []
        for name, width in self._columns.items():
            cell = printable(cells.get(name, ""))
            if name == "file" and _width(cell) > abs(width):
                cell = f"{cell[: abs(width) // 2 - 2]}...{cell[-(abs(width) // 2 - 1) :]}"
            gap = " " * (abs(width) - _width(cell))
            texts.append(cell + gap if width < 0 else gap + cell)
        self._out.write("  ".join(texts).rstrip() + "\n")
        self._out.flush()


def rounded_down(radius: float) -> str:
    """Return a radius with four decimals, never larger than it is."""
    if not math.isfinite(radius):
        return str(radius)
    return str(min(Decimal(radius), _LARGEST_SHOWN).quantize(Decimal("0.0001"), ROUND_FLOOR))


def printable(text: str) -> str:
    """Return text without characters that move the cursor or change the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _width(text: str) -> int:
    """Return the cells of a terminal that a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def write_csv(file: IO[bytes], rows: Iterable[Row]) -> None:
    """Write a CSV file (RFC 4180) in UTF-8 with the columns of `COLUMNS`; a value that is absent is empty."""
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows:
        # As in JSON: floats with the fewest digits that read back the same.
        values = {name: json.dumps(value) if isinstance(value, bool) else value for name, value in flat(row).items()}
        writer.writerow(values)
    text.flush()
    text.detach()


def write_jsonl(file: IO[bytes], rows: Iterable[Row]) -> None:
    """Write one object on each line: `file`, `error`, `counterfactual_file`, and `answer` as it was answered."""
    for row in rows:
        head = json.dumps({"file": row.file, "error": row.error, **_saved(row)}, ensure_ascii=False)
        answer = "null" if row.answer is None else row.answer.model_dump_json()
        file.write(f'{head[:-1]}, "answer": {answer}}}\n'.encode())


def _saved(row: Row) -> dict[str, str | None]:
    return {"counterfactual_file": flat(row)["counterfactual_file"]}


def write_parquet(file: IO[bytes], rows: Iterable[Row]) -> None:
    """Write a Parquet file with the columns of `COLUMNS`.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    schema = arrow.schema([(name, getattr(arrow, kind.replace("bool", "bool_"))()) for name, kind in COLUMNS.items()])
    with parquet.ParquetWriter(file, schema) as writer:
        remaining = map(flat, rows)
        while group := list(itertools.islice(remaining, _GROUP)):
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))


WRITERS: dict[str, Callable[[IO[bytes], Iterable[Row]], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}
"""Writers by the name of their option."""
