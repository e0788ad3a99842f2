"""Compressed bodies (RFC 9110 section 8.4.1): those of requests, read piece by piece, and those of answers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from service.errors import MalformedBodyError

CODINGS = ("gzip", "deflate")
"""Content codings that this server reads and writes; `deflate` is the zlib format of RFC 1950."""

_WINDOW = {"gzip": 31, "deflate": 15}
_INPUT_BYTES = 64 * 1024
_PIECE_BYTES = 256 * 1024
# No encoder writes more bytes than it reads, apart from headers: empty blocks would cost time and pay no limit.
_OVERHEAD_BYTES = 64 * 1024
_LEVEL = 1


class Decompressor:
    """A compressed body, decompressed as it arrives."""

    def __init__(self, coding: str) -> None:
        """Read nothing yet; `coding` is one of `CODINGS`."""
        self._coding = coding
        self._stream = zlib.decompressobj(_WINDOW[coding])
        self._read = self._written = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Give what the next bytes hold, in pieces of at most 256 KiB, each decompressed when it is asked for.

        Raises:
            MalformedBodyError: the bytes do not continue the stream, or hold less than any encoder writes into them.
        """
        stream = self._stream
        for start in range(0, len(data), _INPUT_BYTES):
            rest = data[start : start + _INPUT_BYTES]
            self._read += len(rest)
            while rest:
                if stream.eof:
                    raise self._malformed("more bytes follow its end")
                try:
                    piece = stream.decompress(rest, _PIECE_BYTES)
                except zlib.error:
                    raise self._malformed("it is damaged") from None
                rest = stream.unconsumed_tail or stream.unused_data
                self._written += len(piece)
                if piece:
                    yield piece
            if self._read > self._written + _OVERHEAD_BYTES:
                raise self._malformed("it has more bytes than its content")

    def finish(self) -> bytes:
        """Return what is left when the body is complete, less than 1 KiB.

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
