"""Parsing of request bodies: options, and images that are still encoded.

Options have one place in each form of request: the object of a JSON body, the fields of a form, the query of an image
or npy body. An option that is repeated, unknown, or in the query of a JSON or form body is refused: a misspelt
`epsilon` must not be ignored silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.api.body import FORM, JSON, NPY
from service.api.schema import NO_OPTIONS, BatchRequest, Expected, Options, PredictRequest
from service.errors import (
    BatchTooLargeError,
    ChannelsError,
    ImageSizeError,
    InputError,
    MalformedBodyError,
    MixedSizesError,
    OptionError,
    UnknownOptionError,
)
from service.pixels.arrays import decode_array, decode_array_batch
from service.pixels.images import decode_base64, decode_image
from service.shapes import Float64, UInt8

_MAX_PARTS = 32

Wire = TypeVar("Wire", bound=BaseModel)


@dataclass(frozen=True)
class EncodedImage:
    """An image file, or its base64 text."""

    data: bytes | str

    def decode(
        self, input_shape_CHW: tuple[int, int, int], max_pixels: int, used_pixels: int = 0
    ) -> UInt8[np.ndarray, "C H W"]:
        """Return pixels in 0..255, with the channels of the file.

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of all images of the request together.
            used_pixels: pixels of the images that were decoded before.

        Raises:
            ChannelsError: the model accepts neither grey nor RGB images.
            InputError: see `service.pixels.images`.
        """
        channels = input_shape_CHW[0]
        if channels not in (1, 3):
            raise ChannelsError(
                f"the model takes {channels} channels and image files have 1 or 3; send a npy array of shape "
                f"({channels}, H, W) as application/x-npy"
            )
        data = decode_base64(self.data) if isinstance(self.data, str) else self.data
        return decode_image(data, max_pixels, used_pixels)


@dataclass(frozen=True)
class ArrayImage:
    """An npy file; it must have the model's channels, because its shape alone does not tell grey from RGB."""

    data: bytes

    def decode(self, input_shape_CHW: tuple[int, int, int], max_pixels: int) -> Float64[np.ndarray, "C H W"]:
        """Return pixels in [0, 1]; raise `InputError` as `service.pixels.arrays`."""
        return decode_array(self.data, input_shape_CHW, max_pixels)


@dataclass(frozen=True)
class EncodedBatch:
    """Image files in base64."""

    texts: tuple[str, ...]

    def decode(
        self, input_shape_CHW: tuple[int, int, int], max_pixels: int, max_batch: int, resize: bool
    ) -> UInt8[np.ndarray, "N C H W"]:
        """Return pixels in 0..255.

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of all images together.
            max_batch: limit of the number of images.
            resize: whether the images may have another size than the model's.

        Raises:
            BatchTooLargeError: more than `max_batch` images.
            InputError: an image is refused; the message names its index, from 0.
        """
        if len(self.texts) > max_batch:
            raise BatchTooLargeError(len(self.texts), max_batch)
        images: list[np.ndarray] = []
        for index, text in enumerate(self.texts):
            used = sum(image[0].size for image in images)
            try:
                image = EncodedImage(text).decode(input_shape_CHW, max_pixels, used)
                if not resize and image.shape[1:] != input_shape_CHW[1:]:
                    raise ImageSizeError(image.shape[1], image.shape[2], *input_shape_CHW[1:])
                if images and image.shape[1:] != images[0].shape[1:]:
                    raise MixedSizesError(image.shape[1:], images[0].shape[1:])
                if images and image.shape[0] != images[0].shape[0]:
                    raise ChannelsError(
                        f"this image is {_colours(image)} and the first image is {_colours(images[0])}; the images of "
                        "a batch must be all grey or all RGB, send the others separately"
                    )
            except InputError as error:
                raise error.at_index(index) from None
            images.append(image)
        return np.stack(images)


def _colours(image_CHW: np.ndarray) -> str:
    return "grey" if len(image_CHW) == 1 else "RGB"


@dataclass(frozen=True)
class ArrayBatch:
    """An npy file with a leading batch axis."""

    data: bytes

    def decode(
        self, input_shape_CHW: tuple[int, int, int], max_pixels: int, max_batch: int, resize: bool
    ) -> Float64[np.ndarray, "N C H W"]:
        """Return pixels in [0, 1].

        Args:
            input_shape_CHW: the images that the model accepts.
            max_pixels: limit of all images together.
            max_batch: limit of the number of images.
            resize: ignored: the classifier checks the size.

        Raises:
            InputError: see `service.pixels.arrays`.
        """
        del resize
        return decode_array_batch(self.data, input_shape_CHW, max_pixels, max_batch)


def parse_predict(
    media_type: str, content_type: str, query: Sequence[tuple[str, str]], body: bytes
) -> tuple[Options, EncodedImage | ArrayImage]:
    """Return the options and the image of one request of `/predict`.

    Args:
        media_type: one of `PREDICT_TYPES`, see `media_type_of`.
        content_type: the whole header, which has the boundary of a form.
        query: names and values of the query, in order.
        body: the complete body.

    Raises:
        MalformedBodyError, OptionError, UnknownOptionError, EmptyBodyError
    """
    if media_type == JSON:
        refuse_query(query, "JSON object")
        request = parse_json(PredictRequest, body)
        return request, EncodedImage(request.image)
    if media_type == FORM:
        refuse_query(query, "form fields")
        image, fields = _from_form(body, content_type)
        return _from_strings(fields, "form", also="image"), EncodedImage(image)
    options = _from_strings(query, "query")
    return options, ArrayImage(body) if media_type == NPY else EncodedImage(body)


def parse_batch(
    media_type: str, query: Sequence[tuple[str, str]], body: bytes
) -> tuple[Options, EncodedBatch | ArrayBatch]:
    """Return the options and the images of one request of `/predict/batch`.

    Args:
        media_type: one of `BATCH_TYPES`.
        query: as in `parse_predict`.
        body: the complete body.

    Raises:
        MalformedBodyError, OptionError, UnknownOptionError
    """
    if media_type == JSON:
        refuse_query(query, "JSON object")
        request = parse_json(BatchRequest, body)
        return request, EncodedBatch(tuple(request.images))
    return _from_strings(query, "query"), ArrayBatch(body)


def refuse_query(query: Sequence[tuple[str, str]], place: str) -> None:
    """Raise `OptionError` unless the query is empty: its options would be ignored."""
    if query:
        raise OptionError(
            f"the query has {query[0][0]!r}; in this form of request options belong in the {place}, leave the query "
            "empty"
        )


def parse_json(wire: type[Wire], body: bytes) -> Wire:
    """Return a JSON object as `wire`, strictly: no repeated or unknown field, no text for numbers, no NaN.

    Raises:
        MalformedBodyError, OptionError, UnknownOptionError
    """
    fields = ", ".join(wire.model_fields)
    try:
        document: Any = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # JSONDecodeError, UnicodeDecodeError and the errors of the two hooks are ValueErrors.
        raise MalformedBodyError(
            f"the body is not JSON in UTF-8 ({error}); send one object with the fields {fields}"
        ) from None
    if not isinstance(document, dict):
        raise MalformedBodyError(f"the body is not a JSON object; send one object with the fields {fields}")
    return _validated(wire, document, "JSON object", strings=False)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"the field {_first_repeated(names)!r} is repeated")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for index, name in enumerate(names) if name in names[:index])


def _from_strings(fields: Sequence[tuple[str, str]], place: str, also: str | None = None) -> Options:
    if not fields:
        return NO_OPTIONS
    names = [name for name, _ in fields]
    _refuse_unknown(names, [also, *Options.model_fields] if also else list(Options.model_fields), place)
    if len(set(names)) != len(names):
        raise OptionError(f"{_first_repeated(names)!r} is repeated in the {place}; give every option once")
    return _validated(Options, dict(fields), place, strings=True)


def _refuse_unknown(names: Iterable[str], known: Sequence[str], place: str) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownOptionError(unknown[:5], known, place)


def _validated(wire: type[Wire], fields: Mapping[str, Any], place: str, *, strings: bool) -> Wire:
    _refuse_unknown(fields, list(wire.model_fields), place)
    try:
        return wire.model_validate_strings(fields) if strings else wire.model_validate(fields, strict=True)
    except ValidationError as error:
        faults = [_fault(wire, fault["loc"], fault["type"], fault["msg"]) for fault in error.errors()[:3]]
        raise OptionError("; ".join(faults)) from None


def _fault(wire: type[BaseModel], location: tuple[int | str, ...], kind: str, reason: str) -> str:
    if not location:
        return reason.removeprefix("Value error, ")
    name = ".".join(str(step) for step in location)
    if kind == "extra_forbidden":
        return f"{name} is an unknown field; remove it"
    expected = _expected(wire, location)
    if expected is None:
        return f"{name}: {reason.removeprefix('Value error, ')}"
    return f"{name} {'is missing' if kind == 'missing' else 'is not valid'}; expected {expected}"


def _expected(wire: type[BaseModel], location: tuple[int | str, ...]) -> str | None:
    """Return the valid values of a field, as the schema declares them."""
    expected = None
    model: Any = wire
    for name in location:
        field = getattr(model, "model_fields", {}).get(name)
        if field is not None:
            model = field.annotation
            declared = [annotation.values for annotation in field.metadata if isinstance(annotation, Expected)]
            expected = declared[0] if declared else "true or false" if model is bool else None
    return expected


@dataclass
class _Part:
    header_name: bytes = b""
    header_value: bytes = b""
    disposition: bytes = b""
    data: bytearray | None = None


def _from_form(body: bytes, content_type: str) -> tuple[bytes, list[tuple[str, str]]]:
    """Return the file of field `image` and the text fields, in order (RFC 7578).

    The body is parsed in memory, where it is already: a server on a read-only file system cannot spool.
    """
    images: list[bytes] = []
    fields: list[tuple[str, str]] = []
    for part in _parts(body, content_type):
        _, parameters = parse_options_header(part.disposition)
        data = bytes(part.data or b"")
        try:
            name = parameters[b"name"].decode("utf-8")
            if name != "image":
                fields.append((name, data.decode("utf-8")))
                continue
        except (KeyError, UnicodeDecodeError):
            raise MalformedBodyError(
                "a part of the form has no name or is not UTF-8 text; send the file as field image and the options as "
                "text fields"
            ) from None
        if b"filename" not in parameters:
            raise MalformedBodyError(
                "the form field image is text, not a file; send it as a file (curl -F image=@digit.png)"
            )
        images.append(data)
    if len(images) != 1:
        count = "no file field image" if not images else f"{len(images)} file fields image"
        raise MalformedBodyError(
            f"the form has {count}; send exactly one (curl -F image=@digit.png); several images go to /predict/batch"
        )
    return images[0], fields


def _parts(body: bytes, content_type: str) -> list[_Part]:
    parts: list[_Part] = []
    complete = False

    def begin() -> None:
        if len(parts) == _MAX_PARTS:
            raise MalformedBodyError(f"the form has more than {_MAX_PARTS} parts; send one image and its options")
        parts.append(_Part(data=bytearray()))

    def header_name(data: bytes, start: int, end: int) -> None:
        parts[-1].header_name += data[start:end]

    def header_value(data: bytes, start: int, end: int) -> None:
        parts[-1].header_value += data[start:end]

    def header_end() -> None:
        part = parts[-1]
        if part.header_name.lower() == b"content-disposition":
            part.disposition = part.header_value
        part.header_name = part.header_value = b""

    def content(data: bytes, start: int, end: int) -> None:
        part = parts[-1]
        assert part.data is not None
        part.data += data[start:end]

    def end() -> None:
        nonlocal complete
        complete = True

    _, parameters = parse_options_header(content_type)
    try:
        parser = MultipartParser(
            parameters[b"boundary"],
            {
                "on_part_begin": begin,
                "on_header_field": header_name,
                "on_header_value": header_value,
                "on_header_end": header_end,
                "on_part_data": content,
                "on_end": end,
            },
        )
        parser.write(body)
        parser.finalize()
    except (KeyError, FormParserError, ValueError):
        complete = False
    if not complete:
        raise MalformedBodyError(
            "the body is not multipart/form-data with the boundary of its Content-Type, or is truncated; let the "
            "client write both (curl -F image=@digit.png)"
        )
    return parts
