"""Parsing of requests: options, and images that are still encoded.

Options have one place in each form of request: the object of a JSON body, the fields of a form, the query of an image
or npy body. An option that is repeated, unknown, or in the query of a JSON or form body is refused: a misspelt
`epsilon` must not be ignored silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError

from service.api.body import FORM, JSON, NPY, Head
from service.api.encoded import ArrayBatch, ArrayImage, EncodedBatch, EncodedImage
from service.api.forms import parse_form
from service.api.schema import NO_OPTIONS, BatchRequest, Expected, Options, PredictRequest
from service.errors import MalformedBodyError, OptionError, TooManyValuesError, UnknownOptionError
from service.errors.quotations import quoted, shortened

Wire = TypeVar("Wire", bound=BaseModel)
Query = Sequence[tuple[str, str]]
"""Names and values of a query, in order."""

# Values of a JSON body beside its images and numbers, and parameters of a query: each option is one.
_MOST_VALUES = 256
_MOST_QUERY_BYTES = 8192


def read_query(query_string: bytes) -> Query:
    """Return the names and values of a query.

    Raises:
        OptionError: the query is longer than all options together.
    """
    if len(query_string) > _MOST_QUERY_BYTES or query_string.count(b"&") >= _MOST_VALUES:
        raise OptionError(
            f"the query has {len(query_string)} bytes and {query_string.count(b'&') + 1} parameters; at most "
            f"{_MOST_QUERY_BYTES} bytes and {_MOST_VALUES} parameters are read, give every option once"
        )
    return parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)


def parse_predict(head: Head, query: Query, body: bytes) -> tuple[Options, EncodedImage | ArrayImage]:
    """Return the options and the image of one request of `/predict`.

    Args:
        head: its media type is one of `PREDICT_TYPES`.
        query: names and values, in order.
        body: the complete body.

    Raises:
        MalformedBodyError, OptionError, UnknownOptionError, TooManyValuesError
    """
    if head.media_type == JSON:
        refuse_query(query, "JSON object")
        request = parse_json(PredictRequest, body)
        return request, EncodedImage(request.image)
    if head.media_type == FORM:
        refuse_query(query, "form fields")
        image, fields = parse_form(body, head.content_type, list(Options.model_fields))
        return _from_strings(fields, "form"), EncodedImage(image)
    options = _from_strings(query, "query") if query else NO_OPTIONS
    return options, ArrayImage(body) if head.media_type == NPY else EncodedImage(body)


def parse_batch(head: Head, query: Query, body: bytes, max_batch: int) -> tuple[Options, EncodedBatch | ArrayBatch]:
    """Return the options and the images of one request of `/predict/batch`.

    Args:
        head: its media type is one of `BATCH_TYPES`.
        query: names and values, in order.
        body: the complete body.
        max_batch: limit of the number of images.

    Raises:
        MalformedBodyError, OptionError, UnknownOptionError, TooManyValuesError
    """
    if head.media_type == JSON:
        refuse_query(query, "JSON object")
        request = parse_json(BatchRequest, body, texts=max_batch)
        return request, EncodedBatch(tuple(request.images))
    return _from_strings(query, "query"), ArrayBatch(body)


def refuse_query(query: Query, place: str) -> None:
    """Raise `OptionError` unless the query is empty: its options would be ignored."""
    if query:
        raise OptionError(
            f"the query has {quoted(query[0][0])}; in this form of request options belong in the {place}, leave the "
            "query empty"
        )


def parse_json(wire: type[Wire], body: bytes, texts: int = 0, numbers: int = 0, least_row: int = 4) -> Wire:
    """Return a JSON object as `wire`, strictly: no repeated or unknown field, no text for numbers, no NaN.

    Counting bytes takes a thousandth of the time and memory that a Python object for each value takes. Commas, brackets
    and quotation marks inside of strings count as well; base64 has no such character.

    Args:
        wire: the fields.
        body: the text.
        texts: most strings in lists.
        numbers: most numbers in lists.
        least_row: least numbers in a list: rows of an image have four pixels and more.

    Raises:
        MalformedBodyError, OptionError, UnknownOptionError
        TooManyValuesError: the body has more values than such an object needs.
    """
    fields = ", ".join(wire.model_fields)
    most = _MOST_VALUES + texts
    if body.count(b",") > most + numbers or body.count(b'"') > 4 * most:
        raise TooManyValuesError(most + numbers)
    if body.count(b"[") > most + numbers // least_row or body.count(b"{") > most:
        raise MalformedBodyError(
            f"the JSON has more lists and objects than this route needs; send one object with the fields {fields}"
        )
    try:
        document: Any = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise MalformedBodyError(f"the JSON is nested too deeply; send one object with the fields {fields}") from None
    except ValueError as error:
        # JSONDecodeError, UnicodeDecodeError and the errors of the two hooks are ValueErrors.
        reason = "a number has too many digits" if "int_max_str_digits" in str(error) else str(error)
        raise MalformedBodyError(
            f"the body is not JSON in UTF-8 ({reason}); send one object with the fields {fields}"
        ) from None
    if not isinstance(document, dict):
        raise MalformedBodyError(f"the body is not a JSON object; send one object with the fields {fields}")
    return _validated(wire, document, "JSON object", strings=False)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"the field {quoted(_first_repeated([name for name, _ in pairs]))} is repeated")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _first_repeated(names: Sequence[str]) -> str:
    found: set[str] = set()
    return next(name for name in names if name in found or found.add(name))


def _from_strings(fields: Query, place: str) -> Options:
    names = [name for name, _ in fields]
    _refuse_unknown(names, list(Options.model_fields), place)
    if len(set(names)) != len(names):
        raise OptionError(f"{quoted(_first_repeated(names))} is repeated in the {place}; give every option once")
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
        faults = [
            _fault(wire, fault["loc"], fault["type"], fault["msg"]) for fault in error.errors(include_url=False)[:3]
        ]
        raise OptionError("; ".join(faults)) from None


def _fault(wire: type[BaseModel], location: tuple[int | str, ...], kind: str, reason: str) -> str:
    if not location:
        return reason.removeprefix("Value error, ")
    name = shortened(".".join(str(step) for step in location))
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
