"""Checks of the paths of a command, before the libraries of the trainer take their seconds to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = "image-folder"
"""Data set of a recipe whose images are the files of a folder."""
_CARD = "card.json"


def missing_images(folder: Path, dataset: str | None) -> str | None:
    """Return the fault of the path of a data set, with its remedy; null for a path that can be read.

    Args:
        folder: given by `--data`.
        dataset: of the recipe or of the card; a published one is downloaded where it is missing.
    """
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file: name the folder of the images with --data"
    if dataset in (FOLDER, None) and not folder.exists():
        return f"{folder} does not exist: name the folder of the images with --data"
    return None


def missing_artefact(folder: Path) -> str | None:
    """Return the fault of the path of an artefact, with its remedy; null for a folder with a card."""
    if (folder / _CARD).exists():
        return None
    if not folder.exists():
        return f"{folder} does not exist: name the folder of an artefact, which holds {_CARD} and model.onnx"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{_CARD}"))
    hint = f"; it holds the artefacts {', '.join(inside[:5])}, name one of them" if inside else ""
    return f"{folder} holds no {_CARD}, so it is no artefact{hint or ': name the folder that `train` wrote'}"


def dataset_of(artefact: Path) -> str | None:
    """Return the data set that the card of an artefact names; null where it names no data set or cannot be read."""
    try:
        data: Any = json.loads((artefact / _CARD).read_bytes())["data"]
        return str(data["options"]["dataset"]) if "options" in data else {"MNIST": "mnist"}.get(data["name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
