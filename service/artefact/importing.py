"""Import of an ONNX file of other origin, in a process with limits: no file can stop or fill up the caller.

The process runs `service.artefact.conversion`. It ends with its work, at a limit, or with the caller, even if that is
killed. The artefact appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.artefact.files import CARD_FILE
from service.certificate.proof_limits import ProofLimits
from service.errors import ImportRefusedError

_NAMED = "give the artefact another name with --name"


@dataclass(frozen=True)
class ImportOrder:
    """A file and the artefact that it is to become."""

    file: Path
    out: Path
    """Folder of models, in which the artefact is a folder of its name."""
    name: str | None = None
    """Null: that of the file."""
    labels: tuple[str, ...] | None = None
    """In class order; null: `class 0`, `class 1` and so on."""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of the images, for a file whose input has another shape."""
    dry_run: bool = False
    """Whether nothing is written."""
    force: bool = False
    """Whether an artefact of the same name is replaced."""


def import_model(order: ImportOrder, limits: ProofLimits) -> dict[str, Any]:
    """Write the artefact of an ONNX file; return its report: identity, proved bound and error.

    Args:
        order: file, name and data of the model.
        limits: of the process that does it, and of the proof.

    Raises:
        ImportRefusedError: nothing was written; the error has every reason.
    """
    with tempfile.TemporaryDirectory(prefix="lipcert-import-") as workspace:
        made = Path(workspace) / "artefact"
        answer = _converted(order, None if order.dry_run else made, limits)
        reasons: list[str] = answer.get("reasons", [])
        name: str = answer.get("name", "")
        # A file that cannot be imported is told all of its faults at once.
        reasons += _why_not_there(order.out / name, order.force) if name else []
        if reasons:
            raise ImportRefusedError(reasons)
        report: dict[str, Any] = answer["report"]
        if order.dry_run:
            return {**report, "written": None}
        try:
            _place(made, order.out / name)
        except OSError as error:
            raise ImportRefusedError([f"{order.out} cannot be written: {error.strerror or error}"]) from error
        return {**report, "written": str(order.out / name)}


def _why_not_there(target: Path, force: bool) -> list[str]:
    if not (target.exists() or target.is_symlink()):
        return []
    if not (target / CARD_FILE).is_file():
        return [f"{target} exists and is no artefact; {_NAMED}"]
    return [] if force else [f"{target} exists; --force replaces it, or {_NAMED}"]


def _place(made: Path, target: Path) -> None:
    """Copy an artefact beside its place and rename it, in the place of an earlier one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        fresh, replaced = Path(beside) / "new", Path(beside) / "old"
        shutil.copytree(made, fresh)
        if target.exists():
            target.rename(replaced)
        fresh.rename(target)


def _converted(order: ImportOrder, folder: Path | None, limits: ProofLimits) -> dict[str, Any]:
    """Return the name of the artefact, and its report or the reasons against it."""
    wish = {
        "file": str(order.file),
        "folder": None if folder is None else str(folder),
        "name": order.name,
        "labels": order.labels,
        "shape": order.shape,
        "memory_bytes": limits.memory_bytes,
        "work": limits.work,
    }
    return _in_a_process(wish, limits)


def _in_a_process(wish: dict[str, Any], limits: ProofLimits) -> dict[str, Any]:
    # The same modules as in this process, wherever it found them.
    code = f"import sys; sys.path[:] = {sys.path!r}; from service.artefact.importing import main; main()"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(wish)],
            # The system closes this pipe when this process ends in any way.
            stdin=subprocess.PIPE,
            stdout=output,
            # Whatever libraries print, the reasons are in the answer.
            stderr=subprocess.DEVNULL,
        )
        try:
            status = process.wait(limits.seconds or None)
        except subprocess.TimeoutExpired:
            return {"reasons": [f"not read and proved within {limits.seconds:g} s (--max-seconds)"]}
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        output.seek(0)
        content = output.read()
    try:
        return json.loads(content)
    except ValueError:
        return {"reasons": [_why_ended(status, limits)]}


def _why_ended(status: int, limits: ProofLimits) -> str:
    how = f"with {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    memory = f"{limits.memory_bytes} bytes of memory (--max-bytes)" if limits.memory_bytes else "its memory"
    return f"the process that reads and proves it ended {how}; most often {memory} did not suffice"


def main() -> None:
    """Convert the file that the first argument of the process names, and write the answer to stdout as JSON."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    wish: dict[str, Any] = json.loads(sys.argv[1])
    # Libraries may print; the answer alone goes to the caller.
    answer_to = os.dup(1)
    os.dup2(2, 1)
    if wish["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (wish["memory_bytes"], wish["memory_bytes"]))
    answer = converted(wish)
    with os.fdopen(answer_to, "w") as output:
        json.dump(answer, output)
    os._exit(0)


def converted(wish: dict[str, Any]) -> dict[str, Any]:
    """Return the name of the artefact, and its report or the reasons against it, as JSON has them."""
    name: str | None = wish["name"]
    try:
        # Imported here: the caller loads nothing for it.
        from service.artefact.conversion import Wish, convert, default_name

        file = Path(wish["file"])
        name = name or default_name(file)
        if not name:
            return {"reasons": [f"the name of the file is no name of a model; {_NAMED}"]}
        labels = None if wish["labels"] is None else tuple(wish["labels"])
        shape = None if wish["shape"] is None else tuple(wish["shape"])
        folder = None if wish["folder"] is None else Path(wish["folder"])
        return {"name": name, "report": convert(file, Wish(name, labels, shape, wish["work"]), folder)}
    except ImportRefusedError as error:
        return {"name": name, "reasons": list(error.reasons)}
    except ModuleNotFoundError as error:
        advice = "`pip install 'lipcert[cpu]'`, or [gpu]"
        return {"reasons": [f"an import needs {error.name}, which is not installed: {advice}"]}
    except ImportError:
        within = f" within {wish['memory_bytes']} bytes of memory (--max-bytes)" if wish["memory_bytes"] else ""
        return {"reasons": [f"the libraries that read it cannot be loaded{within}"]}
    except MemoryError:
        return {"name": name, "reasons": ["it needs more memory than there is (--max-bytes)"]}
    except Exception as error:  # Whatever a library raises about a file of unknown origin, it is a reason.
        first_line = (str(error).strip().splitlines() or [""])[0]
        return {"name": name, "reasons": [f"it cannot be read: {type(error).__name__}: {first_line}"]}


def _end_with_caller() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
