"""Archived files as typed records: the answer and the artefact. Types are checked, contents are not.

The models are the audit's own: an archived answer is read as it is, without the server's schema.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from service.errors import KeptError

_ANSWER_CURE = "keep the JSON object that POST /predict answers, as it was received"
_CARD_CURE = "copy the artefact again"
_MODEL = "model.onnx"
_LARGEST_CARD, _LARGEST_MODEL = 16 * 2**20, 2**31 - 1
"""Bytes, as the server has them."""
_FOLDER = "the folder with model.onnx and card.json (--model)"
_Found = TypeVar("_Found", bound="_Record")
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Bound = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class _Record(BaseModel):
    """Members with exactly the JSON types that are stated; others are listed in `unknown`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    def unknown(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of members that this audit does not know."""
        yield from (f"{prefix}{name}" for name in self.model_extra or {})
        for name in type(self).model_fields:
            member = getattr(self, name)
            for one in member if isinstance(member, list) else [member]:
                if isinstance(one, _Record):
                    yield from one.unknown(f"{prefix}{name}.")


class ClassLabel(_Record):
    """A class of the model."""

    class_id: int
    label: str


class AnswerImage(_Record):
    """The image that an answer names."""

    digest: str
    # JSON has arrays, which Python reads as lists.
    shape: Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)]
    conversion: str | None
    resized: bool
    background: Annotated[str, Field(pattern="^#?[0-9a-fA-F]{6}$")] | None = None
    """Colour `#rrggbb` behind a transparent file."""


class Reference(_Record):
    """An image at which the radius is proved against one class."""

    class_id: int
    image: str
    """PNG file or npy array as base64."""
    media_type: str
    digest: str


class Certificate(_Record):
    """The promise of an answer; radius and bounds are L2, pixels in [0, 1]."""

    norm: str
    radius: _Bound
    radius_255: _Bound
    certified: bool
    epsilon: _Bound | None
    robust_at_epsilon: bool | None
    runner_up: ClassLabel
    lipschitz_bound: _Bound | None
    logit_error: _Bound | None
    # Both are absent in answers of versions without reference images.
    proof: str | None = None
    references: list[Reference] | None = None


class Waypoint(ClassLabel):
    """An image on the way to the counterfactual."""

    image: str
    """PNG file as base64."""
    media_type: str
    margin: _Finite | None
    radius: _Bound
    distance: _Bound


class Counterfactual(ClassLabel):
    """An image of another class that an answer holds."""

    image: str
    """PNG file as base64."""
    media_type: str
    distance: _Bound
    reached: bool
    # Both are absent unless the request asked for a strength or a path.
    nearest_distance: _Bound | None = None
    path: list[Waypoint] | None = None


class Novelty(_Record):
    """The decision of the novelty model; the radius is L2, pixels in [0, 1]."""

    model: str
    digest: str
    novel: bool
    score: _Finite | None
    radius: _Bound
    certified: bool


class Answer(ClassLabel):
    """One answer of POST /predict."""

    model: str
    digest: str
    card_digest: str | None = None
    """Absent in answers of versions that did not name their card yet."""
    logits: list[_Finite | None]
    image: AnswerImage | None = None
    """Absent in answers of versions that did not name their image yet."""
    certificate: Certificate
    counterfactual: Counterfactual | None = None
    # The four are absent in answers of versions without certified sets.
    coverage: _Finite | None = None
    set: list[ClassLabel] | None = None
    max_error: _Finite | None = None
    decision: str | None = None
    # Absent in answers of versions without novelty models.
    novelty: Novelty | None = None


class _Input(_Record):
    channels: PositiveInt
    height: PositiveInt
    width: PositiveInt


class _Quantile(_Record):
    coverage: _Finite
    quantile: _Finite


class _Threshold(_Record):
    radius: _Bound
    error_bound: _Bound


class Calibration(_Record):
    """Figures of a card about held-out images, by rising coverage."""

    model: str
    """Digest of the `model.onnx` that was calibrated."""
    n: PositiveInt
    quantiles: list[_Quantile]
    thresholds: list[_Threshold]


class _Card(_Record):
    name: str
    labels: list[str]
    input: _Input
    graphs: dict[str, str]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Artefact:
    """The files of an artefact."""

    name: str
    labels: list[str]
    input_shape: tuple[int, int, int]
    """Channels, height, width."""
    stated_digest: str
    """Of `model.onnx`, as the card has it."""
    digest: str
    """Of `model.onnx`, as its bytes give it."""
    card_digest: str
    """Of `card.json`, as its bytes give it."""
    model_bytes: bytes
    calibration: Calibration | None = None

    def is_named(self, model: str) -> bool:
        """Return whether the model of an answer has the name in the card; a served version is `NAME:VERSION`."""
        name, _, version = model.partition(":")
        return name == self.name and (model == name or version.isdecimal())


def sha256(content: bytes) -> str:
    """Return `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def read_bytes(path: Path, expected: str, largest: int | None = None) -> bytes:
    """Return the bytes of a file.

    Args:
        path: of the file.
        expected: which file it should be, for a message.
        largest: bytes that it may have; null: a pipe or a device is read, too.

    Raises:
        KeptError: the file is missing, cannot be read, or is beyond `largest`.
    """
    try:
        if largest is not None and (path.stat().st_size > largest or not path.is_file()):
            raise KeptError(f"{path}: is no regular file of at most {largest} bytes; name {expected}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise KeptError(f"{path}: there is no such file; name {expected}") from error
    except OSError as error:
        raise KeptError(f"{path}: cannot be read ({error.strerror or error}); name {expected}") from error


def read_answer(path: Path) -> Answer:
    """Read one answer of POST /predict, or the only one of POST /predict/batch.

    Raises:
        KeptError: the file is missing, or is not such an answer.
    """
    content = read_bytes(path, "the JSON file with the archived answer")
    found = _json(path, content, _ANSWER_CURE)
    if isinstance(found, dict) and "predictions" in found:
        predictions = found["predictions"]
        if not isinstance(predictions, list) or len(predictions) != 1:
            count = len(predictions) if isinstance(predictions, list) else "no"
            raise KeptError(
                f"{path}: the answer of a batch with {count} predictions, and one is audited at a time; write the "
                "entry of `predictions` that belongs to the image to another file"
            )
        found = predictions[0]
    if isinstance(found, dict) and "certificate" not in found and "detail" in found and "status" in found:
        raise KeptError(f"{path}: this is an error that the service answered, not a prediction; {_ANSWER_CURE}")
    return _record(Answer, found, path, _ANSWER_CURE)


def read_artefact(folder: Path) -> Artefact:
    """Read the files of an artefact; nothing is proved or run.

    Raises:
        KeptError: a file is missing, or the card is not valid.
    """
    path = folder / "card.json"
    content = read_bytes(path, _FOLDER, _LARGEST_CARD)
    card = _record(_Card, _json(path, content, _CARD_CURE), path, _CARD_CURE)
    if _MODEL not in card.graphs:
        raise KeptError(f"{path}: `graphs.{_MODEL}` is missing; {_CARD_CURE}")
    model_bytes = read_bytes(folder / _MODEL, _FOLDER, _LARGEST_MODEL)
    return Artefact(
        name=card.name,
        labels=card.labels,
        input_shape=(card.input.channels, card.input.height, card.input.width),
        stated_digest=card.graphs[_MODEL],
        digest=sha256(model_bytes),
        card_digest=sha256(content),
        model_bytes=model_bytes,
        calibration=card.calibration,
    )


def _json(path: Path, content: bytes, cure: str) -> object:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return dict(pairs)

    # pydantic's own parser keeps the last of two equal names and reads NaN.
    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse, object_pairs_hook=members)
    except (ValueError, RecursionError) as error:
        raise KeptError(f"{path}: is not JSON ({error}); {cure}") from error


def _record(kind: type[_Found], found: object, path: Path, cure: str) -> _Found:
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise KeptError(f"{path}: {_explanation(error)}; {cure}") from error


def _explanation(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = f"`{'.'.join(map(str, first['loc']))}`" if first["loc"] else "the file"
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] in ("model_type", "dict_type"):
        return f"{name} is not a JSON object"
    return f"{name} {first['msg'].replace('Input should', 'must')}"
