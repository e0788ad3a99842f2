"""Requests of the Open Inference Protocol: the wire format, and the images in their numbers.

With the binary tensor data extension the bytes of a tensor, little-endian and in row-major order, follow the JSON
object, whose length is the header `Inference-Header-Content-Length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from service.api.body import JSON_LENGTH
from service.api.schema import ImageOptions
from service.errors import (
    ArrayError,
    BatchTooLargeError,
    ChannelsError,
    ImageSizeError,
    ImageTooLargeError,
    MalformedBodyError,
)
from service.errors.quotations import quoted
from service.pixels.arrays import unit_range
from service.shapes import Float64, UInt8

Datatype = Literal["UINT8", "FP16", "FP32", "FP64"]
_DTYPES: dict[Datatype, Any] = {"UINT8": "u1", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_MOST_OUTPUTS = 64
_MOST_ID = 1024


class Protocol(BaseModel):
    """An object of the protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _TensorParameters(BaseModel):
    """Parameters of a tensor; those that are not listed mean nothing here."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    shared_memory_region: str | None = Field(default=None, exclude=True)
    """Refused: shared memory is not supported."""

    classification: int | None = Field(default=None, exclude=True)
    """Refused: labels are in the metadata of the model."""

    @model_validator(mode="after")
    def _extensions_are_supported(self) -> Self:
        if self.shared_memory_region is not None:
            raise ValueError("shared memory is not supported; send the tensor as binary data or as numbers")
        if self.classification is not None:
            raise ValueError("classification is not supported; class_id and logits are outputs, labels are metadata")
        return self


class InputParameters(_TensorParameters):
    """Parameters of an input."""

    binary_data_size: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """Bytes of the tensor after the JSON object, instead of `data`."""


class OutputParameters(_TensorParameters):
    """Parameters of a requested output."""

    binary_data: bool | None = None
    """Whether the output follows the JSON object as bytes; default: `binary_data_output` of the request."""


class InferParameters(ImageOptions):
    """Parameters of a request: the options of `/predict` that concern images, and those of the protocol."""

    binary_data_output: bool = False
    """Whether outputs follow the JSON object as bytes."""

    priority: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    """Accepted for clients that send it, without effect: requests are served in order."""

    timeout: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    """Microseconds from the arrival of the whole request after which it is given up; 0 leaves the deadline of the
    server."""


class InputTensor(Protocol):
    """The images: `data` in row-major order, flat or nested, or `parameters.binary_data_size`."""

    name: Literal["image"]
    # Python writes no product of numbers that are much longer.
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31 - 1)]], Field(fail_fast=True, min_length=4, max_length=4)]
    datatype: Datatype
    parameters: InputParameters = InputParameters()
    # Checked by `read_tensor`: pydantic would copy the list.
    data: Annotated[list[Any] | None, SkipValidation] = None


class OutputRequest(Protocol):
    """A requested output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferOptions(Protocol):
    """A request of the protocol, without its images."""

    id: Annotated[str | None, Field(max_length=_MOST_ID)] = None
    model_name: str | None = None
    """The model of the path, or absent."""
    parameters: InferParameters = InferParameters()
    outputs: Annotated[list[OutputRequest], Field(fail_fast=True, max_length=_MOST_OUTPUTS)] | None = None

    @model_validator(mode="after")
    def _outputs_are_distinct(self) -> Self:
        names = [output.name for output in self.outputs or ()]
        if len(set(names)) != len(names):
            raise ValueError("outputs names an output twice; name each once")
        return self


class InferRequest(InferOptions):
    """A request of the protocol."""

    inputs: Annotated[list[InputTensor], Field(fail_fast=True, min_length=1, max_length=1)]


def split_body(content: bytes, json_length: str | None) -> tuple[bytes, memoryview]:
    """Return the JSON object of a body and the binary data after it.

    Args:
        content: the body.
        json_length: header `Inference-Header-Content-Length`; null without it: all of the body is JSON.

    Raises:
        MalformedBodyError: the header is not a length between 1 and that of the body.
    """
    if json_length is None:
        return content, memoryview(b"")
    digits = json_length.isdecimal() and len(json_length) < 20
    if not (digits and 0 < int(json_length) <= len(content)):
        raise MalformedBodyError(
            f"{JSON_LENGTH} is {quoted(json_length)} and the body has {len(content)} bytes; send the "
            "length of the JSON object that precedes the binary data (bodies without a JSON object are not supported)"
        )
    return content[: int(json_length)], memoryview(content)[int(json_length) :]


def read_tensor(
    tensor: InputTensor,
    binary: memoryview,
    input_shape_CHW: tuple[int, int, int],
    max_pixels: int,
    max_batch: int,
    resize: bool,
) -> UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]:
    """Return pixels in 0..255 (UINT8), or in [0, 1].

    Args:
        tensor: the input of a request.
        binary: bytes behind the JSON object of the request.
        input_shape_CHW: the images that the model accepts.
        max_pixels: limit of the number of pixels of all images together.
        max_batch: limit of the number of images.
        resize: whether the images may have another size than the model's.

    Raises:
        ArrayError, BatchTooLargeError, ChannelsError, ImageSizeError, ImageTooLargeError, PixelRangeError
    """
    count, channels, height, width = tensor.shape
    if count > max_batch:
        raise BatchTooLargeError(count, max_batch)
    if count * height * width > max_pixels:
        raise ImageTooLargeError(f"the shape has {count * height * width} pixels", max_pixels)
    if channels != input_shape_CHW[0]:
        raise ChannelsError(
            f"the tensor has {channels} channels and the model takes {input_shape_CHW[0]}; send the channels of "
            "the model, only image files are converted between grey and RGB"
        )
    if not resize and (height, width) != input_shape_CHW[1:]:
        raise ImageSizeError(height, width, *input_shape_CHW[1:])
    size = tensor.parameters.binary_data_size
    numbers = _from_list(tensor) if size is None and not binary else _from_bytes(tensor, size, binary)
    return numbers if tensor.datatype == "UINT8" else unit_range(numbers)


def _from_bytes(tensor: InputTensor, size: int | None, binary: memoryview) -> np.ndarray:
    dtype = np.dtype(_DTYPES[tensor.datatype])
    expected = prod(tensor.shape) * dtype.itemsize
    if size != expected or len(binary) != expected:
        raise ArrayError(
            f"{len(binary)} bytes follow the JSON and binary_data_size is {size}; expected {expected} for the shape "
            f"{tensor.shape} of {tensor.datatype} ({JSON_LENGTH} is the length of the JSON)"
        )
    if tensor.data is not None:
        raise ArrayError("the input has data and binary_data_size; send one of them")
    return np.frombuffer(binary, dtype).reshape(tensor.shape)


def _from_list(tensor: InputTensor) -> np.ndarray:
    expected = f"expected {prod(tensor.shape)} numbers, flat or nested as the shape {tensor.shape}"
    values = flat(tensor.data, tensor.shape)
    if values is None:
        raise ArrayError(f"data is no list of that length, or ragged; {expected}")
    # numpy would make texts as long as the longest of them.
    if not set(map(type, values)) <= ({int} if tensor.datatype == "UINT8" else {int, float}):
        raise ArrayError(f"data is not numbers of type {tensor.datatype}; {expected}")
    try:
        numbers = np.array(values, np.float64).reshape(tensor.shape)
    except OverflowError:
        raise ArrayError(f"data has numbers beyond float64; {expected}") from None
    if tensor.datatype == "UINT8" and (numbers.min() < 0 or numbers.max() > 255):
        raise ArrayError("data has numbers outside 0..255; send 0..255 as UINT8, or FP64 in [0, 1]")
    with np.errstate(over="ignore"):
        return numbers.astype(_DTYPES[tensor.datatype], copy=False)


def flat(data: object, shape: Sequence[int]) -> list[Any] | None:
    """Return the values of nested lists in order, or null unless they have a shape, flat or nested."""
    values = data if type(data) is list else []
    if len(values) == prod(shape) and type(values[0]) is not list:
        return values
    if len(values) != shape[0]:
        return None
    for length in shape[1:]:
        if not all(type(row) is list and len(row) == length for row in values):
            return None
        values = list(chain.from_iterable(values))
    return values
