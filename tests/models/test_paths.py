"""A path that does not exist is said before the libraries of the trainer are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.paths import dataset_of, missing_artefact, missing_images

ROOT = Path(__file__).resolve().parents[2]
NOWHERE = "/nonexistent/images"
MALARIA = "models/zoo/malaria-cells"


@pytest.mark.parametrize(
    "command",
    [
        ["train", "image-folder", "--data", NOWHERE, "--out", "/tmp/out"],
        ["evaluate", MALARIA, "--data", NOWHERE],
        ["calibrate", MALARIA, "--data", NOWHERE],
        ["convert", MALARIA, "--data", NOWHERE, "--out", "/tmp/out"],
    ],
)
def test_missing_folder_is_said_without_loading_the_trainer(command: list[str]) -> None:
    code = (
        f"import sys; from models.__main__ import main; status = main({command!r}); "
        "sys.exit(9 if {'torch', 'onnxruntime', 'PIL'} & set(sys.modules) else status)"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert result.stderr == f"error: {NOWHERE} does not exist: name the folder of the images with --data\n"
    # Two seconds on an idle machine; tests share theirs.
    assert time.monotonic() - started < 10


def test_file_in_place_of_a_folder_is_a_fault_for_every_data_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for dataset in ("mnist", "image-folder", None):
        assert "is a file" in str(missing_images(tmp_path / "file", dataset))
        assert missing_images(tmp_path, dataset) is None
    assert missing_images(tmp_path / "later", "mnist") is None


def test_folder_without_a_card_names_the_artefacts_inside(tmp_path: Path) -> None:
    assert "does not exist" in str(missing_artefact(tmp_path / "no"))
    assert "holds no card.json" in str(missing_artefact(tmp_path))
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "card.json").write_text("{}")
    assert "artefacts cells" in str(missing_artefact(tmp_path))
    assert missing_artefact(tmp_path / "cells") is None


@pytest.mark.parametrize(
    ("card", "dataset"),
    [
        ({"data": {"options": {"dataset": "image-folder"}}}, "image-folder"),
        ({"data": {"name": "MNIST"}}, "mnist"),
        ({"data": {}}, None),
        ({"data": None}, None),
        ([], None),
    ],
)
def test_data_set_is_that_of_the_card(tmp_path: Path, card: object, dataset: str | None) -> None:
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert dataset_of(tmp_path) == dataset
    assert dataset_of(tmp_path / "no") is None
