"""Checkpoints of a run: two files in one folder, each written atomically, and refused if they belong to another run."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.training.errors import CheckpointError, TrainingError
from service.artefact.files import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    identity: Mapping[str, Any]
    """JSON-like description of the run; `last.pt` with another one is not resumed."""

    @property
    def last(self) -> Path:
        """File of the newest state."""
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        """File of the state after the epoch with the best figures."""
        return self.folder / "best.pt"

    def refuse_too_full_a_disk(self, network: torch.nn.Module) -> None:
        """Refuse a disk without room for the checkpoints, and remove temporary files of a killed run.

        Raises:
            CheckpointError: less is free than all checkpoints need.
        """
        for file in (self.last, self.best):
            for temporary in self.folder.glob(f".{file.name}.*"):
                temporary.unlink(missing_ok=True)
        folder = next(place for place in (self.folder, *self.folder.parents) if place.exists())
        # Weights, their average and at most two moments; last, best and the one that is being written.
        needed = 3 * 4 * sum(parameter.nbytes for parameter in network.parameters())
        needed -= sum(file.stat().st_size for file in self.folder.glob("*.pt"))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"the disk of {folder} has {free / 1e6:.0f} MB left, checkpoints need {needed / 1e6:.0f} MB: make "
                "room, or name another folder with --out"
            )

    def refuse_earlier_run(self) -> None:
        """Refuse a folder with a checkpoint, which a new run would overwrite.

        Raises:
            TrainingError: `last.pt` exists.
        """
        if self.last.exists():
            raise TrainingError(
                f"{self.last} holds an earlier run: add --resume to continue it, choose another --out, or delete it"
            )

    def save(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write a checkpoint atomically; on a full disk `best.pt` is deleted to make room for `last.pt`.

        Raises:
            CheckpointError: the file cannot be written; the older checkpoint is unchanged.
        """
        content = {"identity": json.dumps(self.identity, sort_keys=True), **state}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(content, file))
        except (OSError, RuntimeError) as error:
            # torch's writer raises a RuntimeError in the context of the file's error.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            if full and path == self.last and self.best.exists():
                log.warning("%s cannot be written (%s): best.pt is deleted to make room for it", path, cause)
                self.best.unlink()
                self.save(path, state)
                return
            older = f"{self.last} is the one before" if self.last.exists() else "no earlier one exists"
            raise CheckpointError(
                f"the checkpoint {path} cannot be written ({cause}), {older}; make room or repair the folder"
            ) from error

    def load(self, device: torch.device, path: Path | None = None) -> dict[str, Any]:
        """Return the state in a checkpoint (default: `last.pt`), its tensors on `device`.

        Raises:
            TrainingError: the file is missing or damaged, or belongs to another run.
        """
        path = path or self.last
        if not path.is_file():
            raise TrainingError(f"nothing to resume: {path} does not exist; run without --resume to start")
        state = _read(path, device)
        changed = differences(json.loads(state["identity"]), json.loads(json.dumps(self.identity)))
        changes = [f"{field} was {old!r}, now {new!r}" for field, old, new in changed]
        if changes:
            raise TrainingError(
                f"{path} belongs to another run ({'; '.join(changes)}): "
                "repeat the settings of that run, or choose another --out"
            )
        return state


def saved_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity of the run whose `last.pt` is in a folder, if there is one.

    Args:
        folder: of the checkpoints of one run.

    Raises:
        TrainingError: the file is damaged.
    """
    path = folder / "last.pt"
    return json.loads(_read(path, torch.device("cpu"))["identity"]) if path.is_file() else None


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises pickle, zip and runtime errors for damaged files
        raise TrainingError(f"{path} cannot be read ({error}): delete it and start again") from error


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return every field that differs, nested fields with dots, with both values.

    Args:
        one: JSON-like fields.
        other: likewise.
        prefix: of the names of the fields.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*one, *other}):
        old, new = one.get(key), other.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found
