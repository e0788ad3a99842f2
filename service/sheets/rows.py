"""One row for each file: its answer, or the reason why there is no answer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.api.schema import PredictAnswer


@dataclass(frozen=True)
class Row:
    """The result for one file: an answer, an error, or both where the counterfactual cannot be written."""

    path: Path
    answer: PredictAnswer | None
    error: str | None
    counterfactual_file: Path | None = None
    """Where `--save` has written the image."""

    @property
    def file(self) -> str:
        """The path as text; bytes that are not UTF-8 are replaced."""
        return text_of(self.path)


COLUMNS: dict[str, str] = {
    "file": "string",
    "error": "string",
    "model": "string",
    "digest": "string",
    "class_id": "int64",
    "label": "string",
    "radius": "float64",
    "certified": "bool",
    "runner_up": "string",
    "epsilon": "float64",
    "robust_at_epsilon": "bool",
    "proof": "string",
    "lipschitz_bound": "float64",
    "logit_error": "float64",
    "image_digest": "string",
    "resized": "bool",
    "counterfactual_label": "string",
    "counterfactual_distance": "float64",
    "counterfactual_reached": "bool",
    "counterfactual_file": "string",
    "novel": "bool",
    "novelty_radius": "float64",
}
"""Names and types of the columns of a flat file; every value but `file` may be absent."""


def flat(row: Row) -> dict[str, Any]:
    """Return the values of `COLUMNS`; those without a value are null."""
    values: dict[str, Any] = dict.fromkeys(COLUMNS)
    values |= {"file": row.file, "error": row.error}
    if row.answer is None:
        return values
    answer, certificate, counterfactual = row.answer, row.answer.certificate, row.answer.counterfactual
    values |= {name: getattr(answer, name) for name in ("model", "digest", "class_id", "label")}
    values |= {
        name: getattr(certificate, name)
        for name in ("radius", "certified", "epsilon", "robust_at_epsilon", "proof", "lipschitz_bound", "logit_error")
    }
    values |= {"runner_up": certificate.runner_up.label}
    values |= {"image_digest": answer.image.digest, "resized": answer.image.resized}
    if counterfactual is not None:
        values |= {f"counterfactual_{name}": getattr(counterfactual, name) for name in ("label", "distance", "reached")}
    if answer.novelty is not None:
        values |= {"novel": answer.novelty.novel, "novelty_radius": answer.novelty.radius}
    if row.counterfactual_file is not None:
        values["counterfactual_file"] = text_of(row.counterfactual_file)
    return values


def text_of(path: Path) -> str:
    """Return a path as text that can be written in UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
