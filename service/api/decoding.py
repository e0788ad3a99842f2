"""Decoding of requests, in this process or in a child with limits on processor time and memory.

A plain PNG file of a few thousand pixels and npy arrays cost this process little for each byte, whatever they hold.
Every other body, from a JPEG file to the numbers of a JSON object, is parsed and decoded by `service.children`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np

from service import errors
from service.api.body import Head
from service.api.encoded import ArrayBatch, ArrayImage, EncodedBatch
from service.api.instances import InstanceOptions, InstancesRequest, read_instances
from service.api.parsing import Query, parse_batch, parse_json, parse_predict
from service.api.schema import Options
from service.api.tensors import InferOptions, InferRequest, read_tensor, split_body
from service.children import Children, Limits
from service.errors import InputError, ModelNotAvailableError, TooCostlyError, UnknownModelError
from service.runtime.cpus import usable_cpus

Shape = tuple[int, int, int]
Kind = Literal["predict", "batch", "infer", "instances"]

_MIB = 1024 * 1024
_MOST_CHILDREN = 4
# A JPEG file of two megapixels takes 0.1 s, and four million numbers in JSON 0.9 s.
_CPU_S = 1.1
_CPU_PIXELS = 2 * _MIB
_FIXED_BYTES = 64 * _MIB
_BYTES_OF_A_PIXEL = 16
_BYTES_OF_A_BYTE = 4
# Requests whose decoded pixels wait for their answer, in units of `max_pixels`.
_WAITING = 4


class Order(NamedTuple):
    """How to decode one body."""

    kind: Kind
    head: Head
    query: Query
    model: str
    """Name of the model, unless the options name another."""
    shapes: Mapping[str, Shape]
    """Channels, height and width of the images that each model accepts."""
    broken: Mapping[str, str]
    """Reasons why models are not served, by name."""
    max_pixels: int
    max_batch: int


class Request(NamedTuple):
    """A decoded body."""

    model: str
    options: Options | InferOptions | InstanceOptions
    """Without images."""
    pixels_NCHW: np.ndarray
    """0..255, or in [0, 1]."""


def decode(order: Order, content: bytes) -> Request:
    """Return the decoded body.

    Raises:
        InputError: see `service.api.parsing`, `service.api.encoded` and `service.api.tensors`.
    """
    if order.kind == "infer":
        shape = _shape(order, order.model)
        text, binary = split_body(content, order.head.json_length)
        asked = parse_json(InferRequest, text, numbers=order.max_pixels * shape[0])
        limits = order.max_pixels, order.max_batch, asked.parameters.resize
        return Request(order.model, asked, read_tensor(asked.inputs[0], binary, shape, *limits))
    if order.kind == "instances":
        shape = _shape(order, order.model)
        listed = parse_json(
            InstancesRequest, content, texts=order.max_batch, numbers=order.max_pixels * shape[0], least_row=1
        )
        limits = order.max_pixels, order.max_batch, listed.parameters.resize, listed.parameters.background
        return Request(order.model, listed, read_instances(listed.instances, shape, *limits))
    if order.kind == "batch":
        options, images = parse_batch(order.head, order.query, content, order.max_batch)
    else:
        options, images = parse_predict(order.head, order.query, content)
    name = order.model if options.model is None else options.model
    shape = _shape(order, name)
    chosen = options.resize, options.background
    if isinstance(images, EncodedBatch | ArrayBatch):
        return Request(name, options, images.decode(shape, order.max_pixels, order.max_batch, *chosen))
    return Request(name, options, images.decode(shape, order.max_pixels, *chosen)[np.newaxis])


def decode_plain(order: Order, content: bytes) -> Request | None:
    """Return the decoded body of `/predict` if its image is an array or a small plain PNG file; otherwise null.

    Raises:
        InputError: see `decode`.
    """
    options, image = parse_predict(order.head, order.query, content)
    name = order.model if options.model is None else options.model
    shape = _shape(order, name)
    if isinstance(image, ArrayImage):
        return Request(name, options, image.decode(shape, order.max_pixels, options.resize)[np.newaxis])
    pixels_CHW = image.decode_plain(shape, order.max_pixels)
    return None if pixels_CHW is None else Request(name, options, pixels_CHW[np.newaxis])


def _shape(order: Order, name: str) -> Shape:
    if name in order.broken:
        raise ModelNotAvailableError(name, order.broken[name])
    if name not in order.shapes:
        raise UnknownModelError(name, order.shapes)
    return order.shapes[name]


def decode_in_child(order: Order, content: bytes) -> tuple[bytes, Any]:
    """Return the decoded body, or its error, as bytes; called in a child process."""
    try:
        request = decode(order, content)
    except (InputError, ModelNotAvailableError) as error:
        return json.dumps({"error": type(error).__name__, "detail": str(error)}).encode(), b""
    except MemoryError:
        return json.dumps({"error": TooCostlyError.__name__, "detail": str(TooCostlyError())}).encode(), b""
    except Exception:
        return json.dumps({"traceback": traceback.format_exc()}).encode(), b""
    pixels_NCHW = np.ascontiguousarray(request.pixels_NCHW)
    head = {
        "model": request.model,
        "options": request.options.model_dump(mode="json", exclude={"image", "images", "inputs", "instances"}),
        "shape": pixels_NCHW.shape,
        "is_uint8": pixels_NCHW.dtype == np.uint8,
    }
    return json.dumps(head).encode(), pixels_NCHW.data.cast("B")


@functools.cache
def _children() -> Children:
    """Return the children of this process, started by its first request for one."""
    children = Children(f"{__name__}:{decode_in_child.__name__}", max(2, min(usable_cpus(), _MOST_CHILDREN)))
    atexit.register(children.close)
    return children


def end_children() -> None:
    """End all child processes, also one that hangs: Python waits for the threads that wait for them."""
    _children().close()
    _children.cache_clear()


class Decoders:
    """Decoding in child processes, while few enough decoded pixels wait in this process."""

    def __init__(self) -> None:
        """Start nothing."""
        self._pixels = 0
        self._blocked: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def decoded(self, order: Order, content: bytes) -> AsyncGenerator[Request]:
        """Give the decoded body, to be answered inside the context.

        Args:
            order: how to decode it.
            content: the body.

        Raises:
            InputError: see `decode`.
            TooCostlyError: the limits of processor time or memory are exceeded.
            BusyError: no child process can be started.
        """
        reserved = await self._reserve(order.max_pixels)
        try:
            head, body = await _children().run(order, content, _limits(order, len(content)))
            request = _request(order, json.loads(head), body)
            pixels = request.pixels_NCHW[:, 0].size
            self._release(reserved - pixels)
            reserved = pixels
            yield request
        finally:
            self._release(reserved)

    async def _reserve(self, pixels: int) -> int:
        while self._pixels + pixels > _WAITING * pixels:
            self._blocked.append(asyncio.get_running_loop().create_future())
            try:
                await self._blocked[-1]
            except asyncio.CancelledError:
                self._wake()
                raise
        self._pixels += pixels
        return pixels

    def _release(self, pixels: int) -> None:
        self._pixels -= pixels
        self._wake()

    def _wake(self) -> None:
        """Let one request look whether there is room; it wakes the next when it has its result."""
        while self._blocked:
            waiting = self._blocked.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return


def _limits(order: Order, n_bytes: int) -> Limits:
    # Files have up to three channels, whatever the model takes.
    channels = max(3, *(shape[0] for shape in order.shapes.values()))
    return Limits(
        _CPU_S * max(1.0, order.max_pixels / _CPU_PIXELS),
        _FIXED_BYTES + n_bytes * _BYTES_OF_A_BYTE + order.max_pixels * channels * _BYTES_OF_A_PIXEL,
    )


def _request(order: Order, head: dict[str, Any], body: memoryview) -> Request:
    """Return the request that a child has decoded; its bytes are checked like those of a client."""
    if "error" in head:
        kind = getattr(errors, head["error"], None)
        if isinstance(kind, type) and issubclass(kind, InputError | ModelNotAvailableError):
            error = kind.__new__(kind)
            Exception.__init__(error, head["detail"])
            raise error
    if "shape" not in head:
        raise RuntimeError(f"a child process failed on a body:\n{head.get('traceback')}")
    shape = tuple(int(length) for length in head["shape"])
    pixels = np.frombuffer(body, np.uint8 if head["is_uint8"] else np.float64)
    if len(shape) != 4 or pixels.size != prod(shape) or shape[1] not in (1, 3, order.shapes[head["model"]][0]):
        raise RuntimeError(f"a child process returned {pixels.size} values as an image of shape {shape}")
    kinds: dict[str, type[Options | InferOptions | InstanceOptions]] = {
        "infer": InferOptions,
        "instances": InstanceOptions,
    }
    options = kinds.get(order.kind, Options).model_validate(head["options"])
    return Request(head["model"], options, pixels.reshape(shape))
