"""An evidence folder: compiled from an artefact, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from service import __version__
from service.artefact.card import Card, check_card, read_card
from service.artefact.engines import load_engine
from service.artefact.files import CARD_FILE, MODEL_FILE, digest, read_verified
from service.artefact.findings import Verified
from service.artefact.splices import Splice
from service.artefact.verification import verify
from service.errors import ArtefactError, KeptError
from service.evidence import check
from service.evidence.derivation import nodes, norm_certificates, operating_domain
from service.evidence.page import render
from service.evidence.record import Bounds, Evidence, Identity, Made, Replication
from service.evidence.texts import ASSUMPTIONS, NOT_COVERED, REPLICATION
from service.evidence.vectors import Picture, built_in, read_pictures, test_vectors
from service.network.reader import read

_EVIDENCE = "evidence.json"
_SUMS = "SHA256SUMS"


class Verdict(NamedTuple):
    """The result of the second program."""

    accepted: bool
    line: str


def write_evidence(artefact: Path, out: Path, images: Path | None = None) -> Verdict:
    """Write the evidence folder of an artefact, and run the second program in it.

    Args:
        artefact: folder with `model.onnx` and `card.json`.
        out: the new folder; it may exist if it is empty.
        images: folder of image files that become test vectors, beside the built-in ones.

    Raises:
        ArtefactError: the artefact has no proof, or its exact logits cannot be derived.
        KeptError: `out` is not empty or cannot be written, or an image cannot be read.
    """
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise KeptError(f"{out}: is not an empty folder; evidence is not overwritten, name another one")
    except OSError as error:
        raise KeptError(f"{out}: cannot be read ({error.strerror}); name another folder") from error
    files = compile_evidence(artefact, images)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            whole = Path(folder) / "evidence"
            for name, content in files.items():
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_bytes(content)
            if out.exists():
                out.rmdir()
            shutil.move(whole, out)
    except OSError as error:
        raise KeptError(f"{out}: cannot be written ({error.strerror}); name another folder") from error
    return run_check(out)


def run_check(folder: Path) -> Verdict:
    """Run `check.py` of a folder in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-I", str(folder / "check.py")], capture_output=True, text=True, check=False
    )
    return Verdict(finished.returncode == 0, (finished.stdout or finished.stderr).strip())


def compile_evidence(artefact: Path, images: Path | None = None) -> dict[str, bytes]:
    """Return the files of the folder by name.

    Args:
        artefact: folder with `model.onnx` and `card.json`.
        images: see `write_evidence`.

    Raises:
        ArtefactError: see `write_evidence`.
        KeptError: an image cannot be read.
    """
    card = read_card(artefact)
    findings = verify(artefact)
    check_card(artefact, card, findings)
    verified, model_file = findings.facts(), artefact / MODEL_FILE
    shape = verified.certificate.input_shape
    if len(shape) != 3:
        raise ArtefactError(model_file, f"images of shape {shape}; evidence is about images C x H x W")
    model_bytes = read_verified(model_file, findings.digest)
    card_bytes = (artefact / CARD_FILE).read_bytes()
    pictures = built_in(shape) + ([] if images is None else read_pictures(images, shape))
    evidence = _evidence(model_file, model_bytes, card, card_bytes, verified, pictures)
    text = (json.dumps(evidence.model_dump(mode="json"), indent=1) + "\n").encode("ascii")
    files = {
        MODEL_FILE: model_bytes,
        CARD_FILE: card_bytes,
        "graphs.json": _graphs(verified),
        _EVIDENCE: text,
        "evidence.schema.json": schema(),
        "index.html": render(evidence, hashlib.sha256(text).hexdigest(), pictures).encode("utf-8"),
        "check.py": Path(check.__file__).read_bytes(),
    }
    files |= {
        vector.file: _npy(picture.pixels_CHW) for vector, picture in zip(evidence.test_vectors, pictures, strict=True)
    }
    return {**files, _SUMS: sums(files)}


def schema() -> bytes:
    """Return the JSON schema of `evidence.json`."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Evidence.model_json_schema()}
    return (json.dumps(described, indent=1, sort_keys=True) + "\n").encode("utf-8")


def sums(files: Mapping[str, bytes]) -> bytes:
    """Return the content of `SHA256SUMS`, in the format of sha256sum."""
    return "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)).encode("utf-8")


def _evidence(
    model_file: Path, model_bytes: bytes, card: Card, card_bytes: bytes, verified: Verified, pictures: Sequence[Picture]
) -> Evidence:
    certificate, operators = verified.certificate, read(model_bytes).operators
    forward, gradient = verified.forward.join(model_bytes), verified.gradient.join(model_bytes)
    channels, height, width = certificate.input_shape
    return Evidence(
        format=1,
        identity=Identity(
            name=card.name,
            labels=card.labels,
            input_shape=(channels, height, width),
            precision="float64" if certificate.precision == "float64" else "float32",
            n_outputs=certificate.n_outputs,
            digests={
                MODEL_FILE: digest(model_bytes),
                CARD_FILE: digest(card_bytes),
                "forward": digest(forward),
                "gradient": digest(gradient),
            },
        ),
        made=_made(),
        derivation=nodes(operators, certificate),
        norms=norm_certificates(operators),
        bounds=Bounds(
            lipschitz_bound=certificate.lipschitz_bound,
            logit_error=certificate.logit_error,
            margin_bounds=certificate.margin_bounds_KK.tolist(),
        ),
        replication=Replication(criterion=REPLICATION, bound=certificate.logit_error),
        test_vectors=test_vectors(
            pictures, model_file, load_engine(model_file, forward, "cpu", 1), certificate, card.labels
        ),
        operating_domain=operating_domain(card),
        assumptions=list(ASSUMPTIONS),
        not_covered=list(NOT_COVERED),
    )


def _made() -> Made:
    versions = {"lipcert": __version__, "python": platform.python_version()}
    for library in ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "python-flint"):
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return Made(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        processor=_processor(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        provider="cpu",
        versions=versions,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _graphs(verified: Verified) -> bytes:
    graphs = {"forward": _pieces(verified.forward), "gradient": _pieces(verified.gradient)}
    return (json.dumps(graphs, separators=(",", ":")) + "\n").encode("ascii")


def _pieces(splice: Splice) -> list[tuple[str, int, int, bool]]:
    """Return literal bytes in hexadecimal, or start and length of a range of the file and whether it is widened."""
    return [
        (piece.hex(), 0, 0, False) if isinstance(piece, bytes) else ("", piece.start, piece.length, piece.widened)
        for piece in splice.pieces
    ]


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
