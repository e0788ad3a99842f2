"""Runs of `lipcert certify-images`: their rows, and the answers of a server about the same inputs."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from commands import Result, run_command

from lipcert.__main__ import main


def certify(*words: object) -> Result:
    """Run the command in this process."""
    return run_command(main, ["certify-images", *map(str, words)])


def rows_of(out: Path, table: str = "answers") -> list[dict[str, Any]]:
    """Return the rows of one table of the results, as another program reads them."""
    parquet: Any = importlib.import_module("pyarrow.parquet")
    return [row for part in sorted((out / table).iterdir()) for row in parquet.read_table(part).to_pylist()]


def npy(array: np.ndarray) -> bytes:
    """Return the npy file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def ask(url: str, content: bytes, options: Mapping[str, Any]) -> httpx.Response:
    """Return the response of `POST /predict` about an image file or an npy file."""
    kind = "application/x-npy" if content.startswith(b"\x93NUMPY") else "application/octet-stream"
    return _http().post(f"{url}/predict", content=content, params=options, headers={"Content-Type": kind})


@cache
def _http() -> httpx.Client:
    """Return one client for all requests: each reads the certificates of TLS, which takes longer than an answer.

    The first file that is decoded in a child waits for its start, on a busy machine for long.
    """
    return httpx.Client(timeout=60.0)


def check_row(row: Mapping[str, Any], said: httpx.Response) -> None:
    """Compare a row with a response, to the last bit."""
    if "error" in row:
        assert row["error"] == said.json()["detail"]
        return
    assert said.status_code == 200, said.text
    answer = said.json()
    certificate, found = answer["certificate"], answer["counterfactual"]
    assert {name: row[name] for name in ("digest", "class_id", "label", "logits")} == {
        name: answer[name] for name in ("digest", "class_id", "label", "logits")
    }
    for name in ("radius", "certified", "proof", "lipschitz_bound", "logit_error"):
        assert row[name] == certificate[name], name
    assert row["runner_up"] == certificate["runner_up"]["label"]
    assert (row["image_digest"], row["resized"]) == (answer["image"]["digest"], answer["image"]["resized"])
    if "epsilon" in row:
        assert (row["epsilon"], row["robust_at_epsilon"]) == (certificate["epsilon"], certificate["robust_at_epsilon"])
    if "set" in row:
        assert row["set"] == [one["label"] for one in answer["set"]]
    if "decision" in row:
        assert row["decision"] == answer["decision"]
    if "counterfactual" in row:
        import base64

        assert row["counterfactual"] == base64.b64decode(found["image"])
        for name in ("label", "distance", "reached"):
            assert row[f"counterfactual_{name}"] == found[name]
    if "novel" in row:
        assert (row["novel"], row["novelty_radius"]) == (answer["novelty"]["novel"], answer["novelty"]["radius"])
