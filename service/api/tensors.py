"""Requests of the Open Inference Protocol: the wire format, and the images in their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, model_validator

from service.api.schema import ImageOptions
from service.errors import ArrayError, BatchTooLargeError, ChannelsError, ImageSizeError, ImageTooLargeError
from service.pixels.arrays import unit_range
from service.shapes import Float64, UInt8

Datatype = Literal["UINT8", "FP16", "FP32", "FP64"]
_DTYPES: dict[Datatype, Any] = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}
_MOST_OUTPUTS = 64
_MOST_ID = 1024


class Protocol(BaseModel):
    """An object of the protocol."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InputTensor(Protocol):
    """The images: `data` in row-major order, flat or nested."""

    name: Literal["image"]
    # Python writes no product of numbers that are much longer.
    shape: Annotated[list[Annotated[int, Field(ge=1, le=2**31 - 1)]], Field(fail_fast=True, min_length=4, max_length=4)]
    datatype: Datatype
    parameters: dict[str, Any] = Field(default_factory=dict)
    # Checked by `read_tensor`: pydantic would copy the list.
    data: Annotated[list[Any], SkipValidation]


class OutputRequest(Protocol):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferOptions(Protocol):
    """A request of the protocol, without its images."""

    id: Annotated[str | None, Field(max_length=_MOST_ID)] = None
    parameters: ImageOptions = ImageOptions()
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


def read_tensor(
    tensor: InputTensor, input_shape_CHW: tuple[int, int, int], max_pixels: int, max_batch: int, resize: bool
) -> UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]:
    """Return pixels in 0..255 (UINT8), or in [0, 1].

    Args:
        tensor: the input of a request.
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
    expected = f"expected {prod(tensor.shape)} numbers, flat or nested as the shape {tensor.shape}"
    values = _flat(tensor.data, tensor.shape)
    if values is None:
        raise ArrayError(f"data is no list of that length, or ragged; {expected}")
    # numpy would make texts as long as the longest of them.
    if not set(map(type, values)) <= ({int} if tensor.datatype == "UINT8" else {int, float}):
        raise ArrayError(f"data is not numbers of type {tensor.datatype}; {expected}")
    try:
        numbers = np.array(values, np.float64).reshape(tensor.shape)
    except OverflowError:
        raise ArrayError(f"data has numbers beyond float64; {expected}") from None
    if tensor.datatype == "UINT8":
        if numbers.min() < 0 or numbers.max() > 255:
            raise ArrayError("data has numbers outside 0..255; send 0..255 as UINT8, or FP64 in [0, 1]")
        return numbers.astype(np.uint8)
    with np.errstate(over="ignore"):
        return unit_range(numbers.astype(_DTYPES[tensor.datatype], copy=False))


def _flat(data: object, shape: Sequence[int]) -> list[Any] | None:
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
