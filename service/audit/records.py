"""What was kept: the answer, the image that was sent, and the artefact that answered. Read as data, nothing computed.

Axes: C channels, H height, W width, of the image as it was sent.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from service.errors import InputError, KeptError
from service.pixels.images import decode_image

Shape = tuple[int, int, int]
_Kind = TypeVar("_Kind")

_NPY_MAGIC = b"\x93NUMPY"
_MOST_PIXELS = 2**28
_ANSWER = "keep the JSON object that POST /predict answers, as it was received"


@dataclass(frozen=True)
class KeptImage:
    """What an answer says about its image."""

    digest: str
    shape: Shape
    conversion: str | None
    resized: bool


@dataclass(frozen=True)
class KeptAnswer:
    """One answer of POST /predict, as far as it is audited."""

    model: str
    digest: str
    class_id: int
    label: str
    logits: list[float | None]
    image: KeptImage | None
    """None in answers of versions that did not name their image yet."""
    norm: str
    radius: float
    radius_255: float
    certified: bool
    epsilon: float | None
    robust_at_epsilon: bool | None
    runner_up_id: int
    runner_up_label: str
    lipschitz_bound: float | None
    logit_error: float | None
    counterfactual: bool
    """Whether the answer has one, which is not audited."""


@dataclass(frozen=True)
class KeptArtefact:
    """The files of an artefact."""

    name: str
    labels: list[str]
    input_shape: Shape
    stated: dict[str, str]
    """Digest of each graph, as the card has it."""
    found: dict[str, str]
    """Digest of each graph, as its bytes give it."""
    model_bytes: bytes


@dataclass(frozen=True)
class SentImage:
    """Pixels `numerators / denominator`, exact."""

    shape: Shape
    numerators: list[int]
    """C x H x W, flat."""
    denominator: int
    digest: str


def sha256(content: bytes) -> str:
    """`sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


# --- the answer -------------------------------------------------------------------------------------------------------


class _Fields:
    """A JSON object whose members are read with their type."""

    def __init__(self, found: object, name: str, path: Path, cure: str) -> None:
        self._name, self._path, self._cure = name, path, cure
        if not isinstance(found, dict):
            self._refuse(f"{name or 'the file'} is not a JSON object")
        self._members: dict[str, Any] = {str(key): value for key, value in found.items()}

    def _refuse(self, what: str) -> NoReturn:
        raise KeptError(f"{self._path}: {what}; {self._cure}")

    def _read(self, key: str, right: Callable[[Any], bool], expected: str, made: Callable[[Any], _Kind]) -> _Kind:
        name = f"{self._name}.{key}" if self._name else key
        if key not in self._members:
            self._refuse(f"`{name}` is missing")
        if not right(self._members[key]):
            self._refuse(f"`{name}` must be {expected}")
        return made(self._members[key])

    def has(self, key: str) -> bool:
        return self._members.get(key) is not None

    def inside(self, key: str) -> _Fields:
        name = f"{self._name}.{key}" if self._name else key
        return _Fields(self._read(key, lambda _: True, "", lambda value: value), name, self._path, self._cure)

    def text(self, key: str) -> str:
        return self._read(key, lambda v: isinstance(v, str), "a string", str)

    def flag(self, key: str) -> bool:
        return self._read(key, lambda v: isinstance(v, bool), "true or false", bool)

    def flag_or_null(self, key: str) -> bool | None:
        return self._read(key, lambda v: v is None or isinstance(v, bool), "true, false or null", lambda v: v)

    def whole(self, key: str) -> int:
        return self._read(key, lambda v: type(v) is int, "a whole number", int)

    def number(self, key: str) -> float:
        return self._read(key, _is_number, "a number of at least 0", float)

    def number_or_null(self, key: str) -> float | None:
        return self._read(
            key, lambda v: v is None or _is_number(v), "a number of at least 0, or null", lambda v: v and float(v)
        )

    def text_or_null(self, key: str) -> str | None:
        return self._read(key, lambda v: v is None or isinstance(v, str), "a string or null", lambda v: v)

    def shape(self, key: str) -> Shape:
        def right(value: Any) -> bool:
            return isinstance(value, list) and len(value) == 3 and all(type(v) is int and v > 0 for v in value)

        return self._read(key, right, "three sizes", lambda value: (value[0], value[1], value[2]))

    def list_of(self, key: str, right: Callable[[Any], bool], expected: str) -> list[Any]:
        return self._read(key, lambda v: isinstance(v, list) and all(map(right, v)), expected, list)


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:
        return False


def _is_number(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise KeptError(f"{path}: there is no such file; name {what}") from error
    except OSError as error:
        raise KeptError(f"{path}: cannot be read ({error.strerror or error}); name {what}") from error


def _json(path: Path, what: str, cure: str) -> object:
    content = _bytes(path, what)

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(content.decode("utf-8"), parse_constant=refuse, object_pairs_hook=members)
    except (ValueError, RecursionError) as error:
        raise KeptError(f"{path}: is not JSON ({error}); {cure}") from error


def read_answer(path: Path) -> KeptAnswer:
    """One answer of POST /predict, or the only one of POST /predict/batch.

    Raises:
        KeptError: the file is missing, or is something else.
    """
    found = _json(path, "the JSON file with the kept answer", _ANSWER)
    if isinstance(found, dict) and "predictions" in found:
        predictions = found["predictions"]
        if not isinstance(predictions, list) or len(predictions) != 1:
            count = len(predictions) if isinstance(predictions, list) else "no"
            raise KeptError(
                f"{path}: the answer of a batch with {count} predictions, and one is audited at a time; write the "
                "entry of `predictions` that belongs to the image to a file of its own"
            )
        found = predictions[0]
    if isinstance(found, dict) and "certificate" not in found and "detail" in found and "status" in found:
        raise KeptError(f"{path}: this is an error that the service answered, not a prediction; {_ANSWER}")
    answer = _Fields(found, "", path, _ANSWER)
    certificate = answer.inside("certificate")
    runner_up = certificate.inside("runner_up")
    image = None
    if answer.has("image"):
        kept = answer.inside("image")
        image = KeptImage(
            kept.text("digest"), kept.shape("shape"), kept.text_or_null("conversion"), kept.flag("resized")
        )
    return KeptAnswer(
        model=answer.text("model"),
        digest=answer.text("digest"),
        class_id=answer.whole("class_id"),
        label=answer.text("label"),
        logits=[
            None if value is None else float(value)
            for value in answer.list_of("logits", lambda v: v is None or _is_finite(v), "a list of numbers")
        ],
        image=image,
        norm=certificate.text("norm"),
        radius=certificate.number("radius"),
        radius_255=certificate.number("radius_255"),
        certified=certificate.flag("certified"),
        epsilon=certificate.number_or_null("epsilon"),
        robust_at_epsilon=certificate.flag_or_null("robust_at_epsilon"),
        runner_up_id=runner_up.whole("class_id"),
        runner_up_label=runner_up.text("label"),
        lipschitz_bound=certificate.number_or_null("lipschitz_bound"),
        logit_error=certificate.number_or_null("logit_error"),
        counterfactual=answer.has("counterfactual"),
    )


def read_artefact(folder: Path) -> KeptArtefact:
    """The files of an artefact; nothing is proved or run.

    Raises:
        KeptError: a file is missing, or the card is no card.
    """
    what = "the folder with model.onnx, transport.onnx and card.json (--model)"
    cure = "copy the artefact again"
    card = _Fields(_json(folder / "card.json", what, cure), "", folder / "card.json", cure)
    graphs, size = card.inside("graphs"), card.inside("input")
    files = ("model.onnx", "transport.onnx")
    contents = {file: _bytes(folder / file, what) for file in files}
    return KeptArtefact(
        name=card.text("name"),
        labels=card.list_of("labels", lambda v: isinstance(v, str), "a list of strings"),
        input_shape=(size.whole("channels"), size.whole("height"), size.whole("width")),
        stated={file: graphs.text(file) for file in files},
        found={file: sha256(content) for file, content in contents.items()},
        model_bytes=contents["model.onnx"],
    )


# --- the image --------------------------------------------------------------------------------------------------------


def read_image(path: Path, kept: KeptImage | None, input_shape: Shape) -> SentImage:
    """The pixels of an image file or of an npy array, as they were sent.

    Args:
        path: the file.
        kept: what the answer says; its shape tells the axes of an array.
        input_shape: of the model, which tells them where the answer does not.

    Raises:
        KeptError: the file is missing, or is no image that the service reads.
    """
    data = _bytes(path, "the image file that was sent")
    if data.startswith(_NPY_MAGIC):
        return _sent(_array(path, data, kept.shape if kept else None, input_shape[0]))
    try:
        pixels_CHW = decode_image(data, max_pixels=_MOST_PIXELS)
    except InputError as error:
        raise KeptError(f"{path}: {error}") from error
    if kept is None and input_shape[0] == 1 and len(pixels_CHW) == 3 and (pixels_CHW == pixels_CHW[:1]).all():
        # Before answers named their image, a picture with R = G = B was grey to a grey model.
        pixels_CHW = pixels_CHW[:1]
    return _sent(pixels_CHW)


def _array(path: Path, data: bytes, stated: Shape | None, channels: int) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # A damaged header raises whatever it likes.
        raise KeptError(f"{path}: is not a whole npy file of numbers; name the file that was sent") from error
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 2:
        array = array[None]
    integers, floats = array.dtype == np.uint8, array.dtype.kind == "f" and array.dtype.itemsize <= 8
    if array.ndim != 3 or not array.size or not (integers or floats):
        raise KeptError(f"{path}: an array {array.shape} of {array.dtype}; uint8 or float images C x H x W were sent")
    if floats:
        array = array.astype(np.float64)
        if not ((array >= 0.0) & (array <= 1.0)).all():
            raise KeptError(f"{path}: a pixel is NaN, infinite or outside [0, 1], where nothing is promised")
    last = np.moveaxis(array, -1, 0)
    if stated is not None:
        return last if array.shape != stated and last.shape == stated else array
    return last if array.shape[0] != channels and last.shape[0] == channels else array


def _sent(pixels_CHW: np.ndarray) -> SentImage:
    channels, height, width = pixels_CHW.shape
    head = f"{channels}x{height}x{width}\n".encode("ascii")
    flat = pixels_CHW.ravel().tolist()
    if pixels_CHW.dtype == np.uint8:
        # Python rounds the quotient of two integers correctly.
        units = np.array([value / 255 for value in range(256)])[pixels_CHW]
        numerators, denominator = flat, 255
    else:
        units = pixels_CHW
        ratios = [value.as_integer_ratio() for value in flat]
        denominator = max(ratio[1] for ratio in ratios)
        numerators = [numerator * (denominator // divisor) for numerator, divisor in ratios]
    content = head + np.ascontiguousarray(units, dtype="<f8").tobytes()
    return SentImage((channels, height, width), numerators, denominator, sha256(content))
