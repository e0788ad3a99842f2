"""Compressed bodies (RFC 9110 section 8.4.1): those of requests, read piece by piece, and those of answers."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator

from service.errors import MalformedBodyError, TooCostlyError

CODINGS = ("gzip", "deflate")
"""Content codings that this server reads and writes; `deflate` is the zlib format of RFC 1950."""

_WINDOW = {"gzip": 31, "deflate": 15}
_INPUT_BYTES = 64 * 1024
_PIECE_BYTES = 256 * 1024
# A stream of 16 MiB takes at most 0.2 s; of blocks that hold little more than their headers, 1.4 s.
_CPU_S = 0.6
_CPU_BYTES = 16 * 1024 * 1024
_LEVEL = 1


class Decompressor:
    """A compressed body, decompressed as it arrives."""

    def __init__(self, coding: str, max_bytes: int) -> None:
        """Read nothing yet; `coding` is one of `CODINGS`, and `max_bytes` the largest body as sent."""
        self._coding = coding
        self._stream = zlib.decompressobj(_WINDOW[coding])
        self._cpu_s = _CPU_S * max(1.0, max_bytes / _CPU_BYTES)

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield the decompressed bytes in pieces of at most 256 KiB, some empty, each decompressed on demand.

        Raises:
            MalformedBodyError: the bytes do not continue the stream.
            TooCostlyError: the body takes more processor time than any encoder makes it take.
        """
        stream = self._stream
        for start in range(0, len(data), _INPUT_BYTES):
            rest = data[start : start + _INPUT_BYTES]
            while rest:
                if stream.eof:
                    raise self._malformed("more bytes follow its end")
                started_s = time.thread_time()
                try:
                    piece = stream.decompress(rest, _PIECE_BYTES)
                except zlib.error:
                    raise self._malformed("it is damaged") from None
                rest = stream.unconsumed_tail or stream.unused_data
                self._cpu_s -= time.thread_time() - started_s
                if self._cpu_s < 0.0:
                    raise TooCostlyError
                yield piece

    def finish(self) -> bytes:
        """Return the last bytes of a complete body, less than 1 KiB.

        Raises:
            MalformedBodyError: the body is truncated.
        """
        rest = self._stream.flush()
        if not self._stream.eof:
            raise self._malformed("it is truncated")
        return rest

    def _malformed(self, reason: str) -> MalformedBodyError:
        return MalformedBodyError(
            f"the body is not one complete stream of the Content-Encoding {self._coding} ({reason}); send gzip (RFC "
            "1952) or deflate (the zlib format, RFC 1950), or leave the header out"
        )


def compressed(content: bytes, coding: str) -> bytes:
    """Return `content` in one of `CODINGS`."""
    packer = zlib.compressobj(_LEVEL, wbits=_WINDOW[coding])
    return packer.compress(content) + packer.flush()
