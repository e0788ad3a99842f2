"""Images of a caller in parts, each of which is one request of `/predict/batch`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from http import HTTPStatus

from service.client.errors import ServiceError
from service.client.images import Encoded, Image, encode

_MOST_BYTES = 8 * 1024 * 1024
"""Bytes of the images of a part: base64 of them is below the default limit of a server, 16 MiB."""
_OF_ONE_KIND = ("mixed-sizes", "channels")
"""Problems of a batch whose images are not all of one size and one number of channels."""


class Parts(Iterator[list[Encoded]]):
    """Images in order, in parts that get smaller where the server refuses them as too large or too different."""

    def __init__(self, images: Iterable[Image], most: int) -> None:
        """Read nothing yet.

        Args:
            images: read as they are needed.
            most: images of a part.

        Raises:
            ValueError: `most` is below 1.
        """
        if most < 1:
            raise ValueError(f"a request has at least one image, not {most}")
        self._images = map(encode, images)
        self._most = most
        self._waiting: deque[list[Encoded]] = deque()
        self._next: Encoded | None = None

    def __next__(self) -> list[Encoded]:
        """Return the next images, all arrays of one shape and type or all image files."""
        if self._waiting:
            return self._waiting.popleft()
        first = self._take()
        if first is None:
            raise StopIteration
        part, n_bytes = [first], len(first.content)
        while len(part) < self._most and (image := self._take()) is not None:
            n_bytes += len(image.content)
            if image.kind != first.kind or n_bytes > _MOST_BYTES:
                self._next = image
                break
            part.append(image)
        return part

    def split(self, part: list[Encoded], error: ServiceError) -> None:
        """Put the halves of a refused part back; raise the error where that cannot help."""
        too_large = error.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if len(part) == 1 or not (too_large or error.type.endswith(_OF_ONE_KIND)):
            raise error
        half = (len(part) + 1) // 2
        if too_large:
            self._most = min(self._most, half)
        self._waiting.extendleft([part[half:], part[:half]])

    def _take(self) -> Encoded | None:
        image, self._next = self._next, None
        return next(self._images, None) if image is None else image
