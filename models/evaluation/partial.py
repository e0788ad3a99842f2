"""Cache of a long measurement: finished parts on disk, each under the settings that made it.

A part is found again only under identical settings (digests of the model and of the images among them): a stale part
is never read, but measured again. Each file appears whole or not at all, also after a crash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.artefact.files import write_atomically

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


def sources() -> list[Path]:
    """Return the source files that determine the results: partial results of other code are not used."""
    root = Path(__file__).parents[2]
    return sorted([*(root / "service").rglob("*.py"), *Path(__file__).parent.glob("*.py")])


def code_digest() -> str:
    """Return the sha256 of `sources`, in hexadecimal."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sources())).hexdigest()


@dataclass(frozen=True)
class PartialResults:
    """Parts of one measurement in one folder, which git ignores."""

    folder: Path

    def part(self, settings: Mapping[str, Any], measure: Callable[[], Arrays]) -> Arrays:
        """Return the arrays that are stored under `settings`; where there are no such arrays, measure and store them.

        Args:
            settings: everything that the arrays depend on; JSON values.
            measure: returns arrays of numbers (no objects) by name.

        Raises:
            OSError: the part cannot be written (a full disk, no permission).
        """
        path = self._path(settings)
        stored = _read(path)
        if stored is None:
            stored = measure()
            self._write(path, stored)
        return stored

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Return whether there is a file of the part, which may be damaged."""
        return self._path(settings).exists()

    def count(self) -> int:
        """Return the number of stored parts."""
        return len(list(self.folder.glob("*.npz")))

    def discard(self) -> None:
        """Delete all parts: the measurement is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, settings: Mapping[str, Any]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]}.npz"

    def _write(self, path: Path, arrays: Arrays) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ".gitignore").write_text("*\n")
        write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def digest_of(*arrays: np.ndarray) -> str:
    """Return `sha256:<hex>` of shapes, types and contents."""
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{state.hexdigest()}"


def _read(path: Path) -> Arrays | None:
    try:
        # Opened here: np.load does not close a file whose content is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s): this part is measured again", path, error)
        return None
