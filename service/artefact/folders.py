"""The folder of models: which artefacts are in it.

::

    models/mnist/card.json, model.onnx        the model `mnist`
    models/digits/1/card.json, model.onnx     `digits:1`
    models/digits/2/card.json, model.onnx     `digits:2`, which `digits` names as well
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from service.artefact.files import CARD_FILE
from service.errors import ArtefactError

_log = logging.getLogger(__name__)

_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
"""Name of a version, as Triton and KServe have it: a number without leading zeros, of at most 64 bits."""


def artefact_folders(models: Path, first: str) -> list[Path]:
    """Return the folders of artefacts in a folder of models, by name; of a model with versions the highest first.

    A folder without `card.json`, except `first`, is passed over with a warning; `lost+found` and names that start with
    `.` or `_`, which systems and archives leave behind, without one.

    Args:
        models: the folder of models.
        first: name of the model, or of the version, that comes before all others.

    Raises:
        ArtefactError: there is no such folder, or no artefact is in it.
    """
    try:
        folders = _folders_in(models)
    except OSError as error:
        raise ArtefactError(
            models, f"the folder of models cannot be read ({error.strerror}); set LIPCERT_MODELS"
        ) from None
    artefacts: list[Path] = []
    passed_over: list[Path] = []
    for folder in folders:
        versions, others = _split(folder)
        if _has_card(folder) or (not versions and folder.name == first):
            artefacts.append(folder)
            if versions:
                _log.warning("%s is an artefact, so versions in it are passed over: make it one of them", folder)
        else:
            artefacts += versions
            passed_over += others if versions else [folder]
    for fault, has_card in ((f"without {CARD_FILE}", False), ("versions are numbers without leading zeros", True)):
        if names := [str(path.relative_to(models)) for path in passed_over if _has_card(path) == has_card]:
            _log.warning("passed over in %s, %s: %s", models, fault, ", ".join(names))
    if not artefacts:
        itself = "; it is an artefact itself: name the folder around it" if _has_card(models) else ""
        raise ArtefactError(
            models, f"the folder holds no artefact; set LIPCERT_MODELS to a folder of folders that do{itself}"
        )
    return sorted(artefacts, key=lambda folder: first not in names_of(folder, models))


def version_of(folder: Path, models: Path) -> str | None:
    """Return the version that an artefact of the folder `models` is; null for a model without versions."""
    return None if folder.parent == models else folder.name


def names_of(folder: Path, models: Path) -> tuple[str, ...]:
    """Return the names of an artefact of the folder `models` by its path: of a version, `NAME:VERSION` and `NAME`."""
    version = version_of(folder, models)
    return (folder.name,) if version is None else (f"{folder.parent.name}:{version}", folder.parent.name)


def newest(folder: Path) -> Path:
    """Return the highest version in the folder of a model with versions, and another folder as it is."""
    versions = [] if _has_card(folder) else _split(folder)[0]
    return versions[0] if versions else folder


def root_of(folder: Path, name: str) -> Path:
    """Return the folder of models around an artefact whose card has this name."""
    is_version = folder.parent.name == name and _VERSION.fullmatch(folder.name) and not _has_card(folder.parent)
    return folder.parent.parent if is_version else folder.parent


def version_in(name: str) -> str | None:
    """Return the version in the name of an artefact; null for a model without versions."""
    return str(split_name(name)[1] or "") or None


def split_name(name: str) -> tuple[str, int]:
    """Return the model and the version that a name consists of; 0 where it has no version."""
    model, _, version = name.rpartition(":")
    return (model, int(version)) if model and _VERSION.fullmatch(version) else (name, 0)


def _folders_in(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith((".", "_")) and path.name != "lost+found"
    ]


def _split(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the versions in a folder, the highest first, and the other folders in it."""
    try:
        folders = _folders_in(folder)
    except OSError:
        return [], []  # A folder that cannot be listed is reported when it is read.
    versions = [path for path in folders if _VERSION.fullmatch(path.name) and _has_card(path)]
    others = [path for path in folders if path not in versions]
    return sorted(versions, key=lambda path: int(path.name), reverse=True), others


def _has_card(folder: Path) -> bool:
    try:
        # Not followed: a link that leads nowhere is a fault of an artefact.
        (folder / CARD_FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # A folder that cannot be listed is reported when it is read.
    return True
