"""The artefact: the contract between the trainer that writes it and the server that proves and serves it.

A folder with three files: `model.onnx` (image -> logits), `transport.onnx` (image, margin weights -> logits,
gradient) and `card.json` (`Card`: what it is, what made it, what was measured). The card names the sha256 of
both graphs; the bound itself is never read from it: it is derived from the bytes of `model.onnx`.

Digest, certificate and session speak about the same bytes: a file is read once for all of them, or read again and
compared with the digest that was proved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from service.artefact.files import write_atomically
from service.artefact.graphs import GRAPH_FILES, MODEL_FILE, TRANSPORT_FILE, Findings, digest, read_file
from service.certificate import Certificate
from service.errors import ArtefactError

CARD_FILE = "card.json"

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Contract(BaseModel):
    """Unknown fields are refused: a misspelt field would otherwise be lost in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class InputShape(_Contract):
    """Shape of the image that `model.onnx` takes."""

    channels: PositiveInt
    height: PositiveInt
    width: PositiveInt

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.height, self.width)


class CertifiedAccuracy(_Contract):
    """Share of `n` test images that are classified right with a proved radius above `epsilon`."""

    epsilon: float = Field(ge=0.0)
    """L2 radius, pixels in [0, 1]."""
    value: Share
    n: PositiveInt


class Card(_Contract):
    """What an artefact is, what made it, and what was measured on it."""

    format: Literal[1] = 1
    """Version of this contract."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """The name by which requests ask for the model; it stands in URLs."""
    labels: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    """Label of each class, in class order."""
    input: InputShape
    graphs: dict[Literal["model.onnx", "transport.onnx"], Digest] = Field(default_factory=dict)
    """Digest of each graph; `write_artefact` fills it in."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Data set: name, source, licence, checksums, number of images."""
    loss: dict[str, Any] = Field(default_factory=dict)
    """Loss and its parameters."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The recipe that the trainer ran, in full."""
    seed: int | None = None
    code_version: str | None = None
    """Commit of the code that trained it."""
    accuracy: Share | None = None
    """Clean accuracy on the test set."""
    certified_accuracy: list[CertifiedAccuracy] = Field(default_factory=list)
    attacks: list[dict[str, Any]] = Field(default_factory=list)
    """One entry per attack: name, library, parameters, n, successes."""
    licence: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    """Hardware and library versions of the training run."""
    evaluation: dict[str, Any] | None = None
    """Further results of `python -m models evaluate`."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Card:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels repeat; a counterfactual target names a class by its label, so make them distinct")
        return self


@dataclass(frozen=True)
class Artefact:
    """One artefact whose digests, graphs and certificate have been checked against each other."""

    folder: Path
    card: Card
    model_bytes: bytes
    transport_bytes: bytes
    certificate: Certificate

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of `model_bytes`, the bytes the certificate is about."""
        return digest(self.model_bytes)


def artefact_folders(models: Path, first: str) -> list[Path]:
    """The folders of artefacts in a folder of models, by name; those whose names start with `.` or `_` are none.

    Args:
        models: the folder of models.
        first: the name of the folder that comes before all others.

    Raises:
        ArtefactError: there is no such folder, or nothing is in it.
    """
    try:
        folders = sorted(
            (path for path in models.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))),
            key=lambda path: (path.name != first, path.name),
        )
    except OSError as error:
        raise ArtefactError(
            models, f"the folder of models cannot be read ({error.strerror}); set LIPCERT_MODELS"
        ) from None
    if not folders:
        raise ArtefactError(models, "the folder holds no artefact; set LIPCERT_MODELS to one that does")
    return folders


def read_artefact(folder: Path) -> Artefact:
    """Read, check and prove the artefact in `folder`.

    Raises:
        ArtefactError: a file is missing, cannot be read, does not match its digest, contradicts the card, or
            has no proved bound. The message names the file, the reason and what to do.
    """
    card = read_card(folder)
    model_bytes, transport_bytes = (read_file(folder / file) for file in GRAPH_FILES)
    for file, content in ((MODEL_FILE, model_bytes), (TRANSPORT_FILE, transport_bytes)):
        _check_digest(folder / file, card, digest(content))
    return _prove(folder, card, model_bytes, transport_bytes)


def read_card(folder: Path) -> Card:
    """Read `card.json` alone, without looking at the graphs.

    Raises:
        ArtefactError: the card is missing or is not a valid `Card`.
    """
    path = folder / CARD_FILE
    try:
        return Card.model_validate_json(read_file(path))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'card'}: {fault['msg']}" for fault in error.errors()
        )
        raise ArtefactError(path, f"not a valid card ({faults}). Correct it, or export the artefact again.") from error


def write_artefact(folder: Path, card: Card, model_bytes: bytes, transport_bytes: bytes) -> Artefact:
    """Write an artefact that `read_artefact` accepts, or nothing.

    The digests in the card are computed here. Everything that the server would check at its start is checked
    before the first byte is written; each file appears at once or not at all, and the card comes last.

    Raises:
        ArtefactError: the graphs have no proved bound or contradict the card.
    """
    graphs = {MODEL_FILE: digest(model_bytes), TRANSPORT_FILE: digest(transport_bytes)}
    card = card.model_copy(update={"graphs": graphs})
    artefact = _prove(folder, card, model_bytes, transport_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MODEL_FILE, lambda file: file.write(model_bytes))
    write_atomically(folder / TRANSPORT_FILE, lambda file: file.write(transport_bytes))
    write_card(folder, card)
    return artefact


def write_card(folder: Path, card: Card) -> None:
    """Replace `card.json` in `folder` atomically, for example to add results of an evaluation."""
    content = (card.model_dump_json(indent=2) + "\n").encode()
    write_atomically(folder / CARD_FILE, lambda file: file.write(content))


def check_findings(folder: Path, card: Card, findings: Findings) -> Certificate:
    """What is proved about the model in `folder`, if the findings are about the graphs that its card names.

    Raises:
        ArtefactError: something is wrong with a graph, or the card is about another one.
    """
    for file, found in findings.digests.items():
        _check_digest(folder / file, card, found)
    certificate = findings.proof()
    _check_face(folder / MODEL_FILE, card, certificate)
    return certificate


def _check_digest(path: Path, card: Card, found: str) -> None:
    stated = card.graphs.get(path.name)  # type: ignore[call-overload]
    if stated is None:
        raise ArtefactError(
            path.with_name(CARD_FILE), f"it states no digest of {path.name}. Export the artefact again."
        )
    if stated != found:
        raise ArtefactError(
            path,
            f"the card states the digest {stated}, the file has {found}. "
            "The copy is damaged or mixes two artefacts; copy it again.",
        )


def _prove(folder: Path, card: Card, model_bytes: bytes, transport_bytes: bytes) -> Artefact:
    # Imported here: a server proves in processes of their own and loads nothing for it.
    from service.artefact.verification import prove

    certificate = prove(folder, model_bytes, transport_bytes)
    _check_face(folder / MODEL_FILE, card, certificate)
    return Artefact(folder, card, model_bytes, transport_bytes, certificate)


def _check_face(path: Path, card: Card, certificate: Certificate) -> None:
    if tuple(certificate.input_shape) != card.input.shape:
        raise ArtefactError(
            path,
            f"the graph takes images of shape {tuple(certificate.input_shape)}, but the card states "
            f"{card.input.shape} (channels, height, width). Correct `input` in the card, or export again.",
        )
    n_classes = certificate.margin_bounds_KK.shape[0]
    if n_classes != len(card.labels):
        raise ArtefactError(
            path,
            f"the graph distinguishes {n_classes} classes, but the card has {len(card.labels)} labels. "
            "Give one label per class (two for a model with one output), in class order.",
        )
