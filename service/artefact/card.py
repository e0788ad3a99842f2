"""The card of an artefact: contract between the trainer that writes the artefact and the server that verifies it.

An artefact is a folder with two files: `model.onnx` (image -> logits) and `card.json` (`Card`: identity, origin,
measurements). The card names the sha256 of the model; it does not state the bound, which is derived from the bytes of
`model.onnx`. Older artefacts have a third file, `transport.onnx`, which is not read.

Digest, certificate and session are about the same bytes: a file is read once for all of them, or read again and
compared with the digest that was verified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from service.artefact.files import CARD_FILE, MODEL_FILE, digest, read_file, write_atomically
from service.artefact.findings import Findings
from service.certificate.proof_limits import NO_LIMITS, ProofLimits
from service.certificate.sets import order_statistic
from service.errors import ArtefactError

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NOVELTY_LABELS = ("known", "novel")
"""Labels of a novelty model; its one output f is positive where the image is known."""
_FAULTS = 5
"""Faults of a card that a message names."""
_LOCATION = 100
"""Characters of the place of a fault."""


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
    """With the radius that is proved at the image as sent alone (`proof=fast`)."""
    with_references: Share | None = None
    """With the radius that is proved at reference images, too (`proof=best` and this epsilon), which uses that pixels
    end at 0 and 1; null where it was not measured."""
    n: PositiveInt


class SeedRun(_Contract):
    """Figures of another training of the same recipe on the same images, which differs in its seed alone."""

    seed: int
    model: Digest
    """Of its `model.onnx`."""
    code_version: str | None = None
    accuracy: Share
    certified_accuracy: list[CertifiedAccuracy]


class Origin(_Contract):
    """ONNX file that `model.onnx` was imported from."""

    file: str
    """Name of the file, without its folder."""
    digest: Digest
    """Of the bytes that were imported; those of `model.onnx` are the canonical form of the same network."""


class ConformalQuantile(_Contract):
    """Quantile of the scores of true classes for one coverage, see `service.certificate.sets`."""

    coverage: float = Field(gt=0.0, lt=1.0)
    quantile: float = Field(allow_inf_nan=False)
    """L2 radius, signed, pixels in [0, 1], rounded down."""


class AcceptanceThreshold(_Contract):
    """Radius from which predictions are accepted, with the calibration images that it accepts."""

    radius: float = Field(ge=0.0, allow_inf_nan=False)
    """Least certified radius (proof `fast`, at the input of the model), L2, pixels in [0, 1]."""
    accepted: PositiveInt
    errors: NonNegativeInt
    """Accepted images that are classified wrong."""
    error_bound: Share
    """Upper Clopper-Pearson bound of the share of errors; all bounds of a card hold together with `confidence`."""


class Calibration(_Contract):
    """Scores of held-out images, from which the options `coverage` and `max_error` are answered.

    It holds for images that are exchangeable with the calibration images, before any change of up to epsilon.
    """

    model: Digest
    """Of the `model.onnx` that was calibrated."""
    n: PositiveInt
    """Number of calibration images."""
    source: str = Field(min_length=1)
    """Which images these are."""
    quantiles: list[ConformalQuantile] = Field(min_length=1)
    """By rising coverage; a request gets the first that covers it."""
    confidence: float = Field(gt=0.0, lt=1.0)
    """Probability, over calibration images, that all error bounds of `thresholds` hold."""
    thresholds: list[AcceptanceThreshold] = Field(default_factory=list)

    @model_validator(mode="after")
    def _coverages_rise(self) -> Calibration:
        coverages = [entry.coverage for entry in self.quantiles]
        if coverages != sorted(set(coverages)):
            raise ValueError("the coverages of `quantiles` must rise; calibrate the artefact again")
        if order_statistic(self.n, coverages[-1]) < 1:
            raise ValueError(
                f"{self.n} images are too few for the coverage {coverages[-1]}; calibrate with more images"
            )
        return self


class Card(_Contract):
    """Identity, origin and measurements of an artefact."""

    format: Literal[1] = 1
    """Version of this contract."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the model in requests and URLs; a version is `NAME:VERSION`, one segment of a path."""
    labels: list[Annotated[str, Field(min_length=1)]] = Field(min_length=2)
    """Label of each class, in class order."""
    input: InputShape
    graphs: dict[Literal["model.onnx", "transport.onnx"], Digest] = Field(default_factory=dict)
    """Digest of `model.onnx`; `write_artefact` fills it in. Older cards hold that of `transport.onnx`, too."""
    origin: Origin | None = None
    """Where an imported model comes from; null for a model that was trained here."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Data set: name, source, licence, checksums, number of images."""
    loss: dict[str, Any] = Field(default_factory=dict)
    """Loss and its parameters."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Recipe of the training, in full."""
    seed: int | None = None
    seeds: list[SeedRun] = Field(default_factory=list)
    """The spread of the figures: trainings of the same recipe with other seeds."""
    code_version: str | None = None
    """Commit of the code that trained it."""
    novelty_model: str | None = Field(default=None, min_length=1)
    """Name of the model that says, with the option `novelty`, whether an image is novel to this one."""
    calibration: Calibration | None = None
    """Results of `python -m models calibrate`; null where certified sets and decisions are not available."""
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

    @model_validator(mode="after")
    def _calibration_is_about_this_model(self) -> Card:
        if self.calibration is not None and self.calibration.model != self.graphs.get(MODEL_FILE):
            raise ValueError("calibration is about another model.onnx than graphs; calibrate the artefact again")
        return self


def read_card(folder: Path) -> Card:
    """Read `card.json` alone, without looking at the model; raises `ArtefactError` as `parse_card` does."""
    return parse_card(folder / CARD_FILE, read_file(folder / CARD_FILE))


def parse_card(path: Path, content: bytes) -> Card:
    """Return the card that a file holds.

    Args:
        path: of the file, for messages.
        content: its bytes.

    Raises:
        ArtefactError: it is not a valid `Card`.
    """
    try:
        return Card.model_validate_json(content)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in fault['loc'])[:_LOCATION] or 'card'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        more = f"; and {len(faults) - _FAULTS} more" if len(faults) > _FAULTS else ""
        raise ArtefactError(
            path, f"not a valid card ({'; '.join(faults[:_FAULTS])}{more}). Correct it, or export the artefact again."
        ) from error


def write_artefact(folder: Path, card: Card, model_bytes: bytes, limits: ProofLimits = NO_LIMITS) -> Findings:
    """Write an artefact that the server accepts, or nothing; return the findings of its verification.

    The digest in the card is computed here. Everything that the server checks at its start is checked before the
    first byte is written; each file appears at once or not at all, and the card comes last.

    Args:
        folder: of the artefact; created if it is missing.
        card: without the digest.
        model_bytes: content of `model.onnx`.
        limits: of the proof.

    Raises:
        ArtefactError: the model has no proved bound, cannot be run, or contradicts the card.
    """
    # Imported here: a server verifies in other processes and loads nothing for it.
    from service.artefact.verification import verify_model

    card = card.model_copy(update={"graphs": {MODEL_FILE: digest(model_bytes)}})
    findings = Findings(digest(model_bytes), verify_model(folder, model_bytes, limits))
    check_card(folder, card, findings)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MODEL_FILE, lambda file: file.write(model_bytes))
    write_card(folder, card)
    return findings


def write_card(folder: Path, card: Card) -> None:
    """Replace `card.json` in `folder` atomically, for example to add results of an evaluation."""
    content = (card.model_dump_json(indent=2) + "\n").encode()
    write_atomically(folder / CARD_FILE, lambda file: file.write(content))


def served_name(folder: Path, card: Card, version: str | None) -> str:
    """Return the name under which an artefact is served: that in its card, and `NAME:VERSION` for a version.

    Args:
        folder: of the artefact.
        card: in it.
        version: see `service.artefact.folders.version_of`.

    Raises:
        ArtefactError: the card of a version names another model than the folder around it.
    """
    if version is None:
        return card.name
    if card.name != folder.parent.name:
        raise ArtefactError(
            folder / CARD_FILE,
            f"it names the model {card.name!r}, and the folder is a version of {folder.parent.name!r}. Correct `name` "
            "in the card, or move the folder.",
        )
    return f"{card.name}:{version}"


def check_card(folder: Path, card: Card, findings: Findings) -> None:
    """Refuse a card that is not about the verified model, and a model with a fault.

    Args:
        folder: of the artefact, for messages.
        card: as in the folder.
        findings: about the model in the folder.

    Raises:
        ArtefactError: the card names another digest, another shape of images or another number of classes, or the
            findings report a fault.
    """
    path = folder / MODEL_FILE
    _check_digest(path, card, findings.digest)
    certificate = findings.facts().certificate
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


def _check_digest(path: Path, card: Card, found: str) -> None:
    stated = card.graphs.get(MODEL_FILE)
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
