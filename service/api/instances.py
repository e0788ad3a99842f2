"""Requests of the KServe V1 protocol: the wire format, and the images in its instances.

An instance is an image as nested numbers in [0, 1], laid out as an npy array of `/predict`, or a file as
`{"b64": "<base64>"}`, as TensorFlow Serving writes bytes in JSON.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, SkipValidation

from service.api.encoded import EncodedBatch
from service.api.schema import ImageOptions
from service.api.tensors import Protocol, flat
from service.errors import ArrayError, BatchTooLargeError, ImageTooLargeError
from service.pixels.arrays import batch_of, unit_range
from service.shapes import Float64, UInt8

_EXPECTED = (
    'expected a list of images, each as nested numbers in [0, 1] of the same shape, or each as {"b64": "<base64 of an '
    'image file>"}'
)


class InstanceOptions(Protocol):
    """A request of KServe V1, without its images."""

    parameters: ImageOptions = ImageOptions()
    """The options of `/predict` that concern images."""
    signature_name: Literal["serving_default"] | None = None
    """Accepted for clients of TensorFlow Serving, without effect."""


class InstancesRequest(InstanceOptions):
    """A request of KServe V1."""

    # Checked by `read_instances`: pydantic would copy the list.
    instances: Annotated[list[Any], SkipValidation, Field(min_length=1)]
    """Images of one size: nested numbers in [0, 1], C x H x W, H x W x C, or H x W for a grey model; or image files as
    `{"b64": "<base64>"}`."""


def read_instances(
    instances: list[Any],
    input_shape_CHW: tuple[int, int, int],
    max_pixels: int,
    max_batch: int,
    resize: bool,
    background: str | None = None,
) -> UInt8[np.ndarray, "N C H W"] | Float64[np.ndarray, "N C H W"]:
    """Return pixels in 0..255 (files of 8 bits), or in [0, 1].

    Args:
        instances: of a request.
        input_shape_CHW: the images that the model accepts.
        max_pixels: limit of the number of pixels of all images together.
        max_batch: limit of the number of images.
        resize: whether the images may have another size than the model's.
        background: colour behind transparent image files, if there is one.

    Raises:
        InputError: see `service.api.encoded` and `service.pixels.arrays`.
    """
    if type(instances) is not list or not instances:
        raise ArrayError(f"instances is no list, or empty; {_EXPECTED}")
    if len(instances) > max_batch:
        raise BatchTooLargeError(len(instances), max_batch)
    if type(instances[0]) is dict:
        if not all(type(one) is dict and one.keys() == {"b64"} and type(one["b64"]) is str for one in instances):
            raise ArrayError(f"an instance is no image file; {_EXPECTED}")
        texts = tuple(one["b64"] for one in instances)
        return EncodedBatch(texts).decode(input_shape_CHW, max_pixels, max_batch, resize, background)
    shape: list[int] = []
    node: Any = instances
    while type(node) is list and node and len(shape) < 5:
        shape.append(len(node))
        node = node[0]
    values = flat(instances, shape)
    if values is None or not set(map(type, values)) <= {int, float}:
        raise ArrayError(f"the instances are not numbers of one shape; {_EXPECTED}")
    if prod(shape) // input_shape_CHW[0] > max_pixels:
        raise ImageTooLargeError(f"instances have {prod(shape) // input_shape_CHW[0]} pixels", max_pixels)
    try:
        array = np.array(values, np.float64).reshape(shape)
    except OverflowError:
        raise ArrayError(f"the instances have numbers beyond float64; {_EXPECTED}") from None
    return unit_range(batch_of(array, input_shape_CHW))
