"""Constant answers to requests that never reach the application: problem documents, as complete responses."""

from __future__ import annotations

import functools

from service.api.problem import last_bytes, problem_of
from service.connection.limits import ConnectionLimits
from service.errors import (
    HeadTooLargeError,
    HttpVersionError,
    LipcertError,
    NotImplementedByServerError,
    RequestSyntaxError,
    TargetTooLongError,
    TooManyConnectionsError,
    TooSlowError,
)


class Refused(Exception):
    """Raised in a callback of the parser; `answer` is the complete response."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer


class Refusals:
    """The answers of one server, each made once."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.head = response(
            HeadTooLargeError(
                f"the headers are larger than {limits.head_bytes} bytes; send fewer or shorter ones (the operator can "
                "raise LIPCERT_MAX_HEAD_BYTES)"
            )
        )
        self.headers = response(
            HeadTooLargeError(
                f"there are more than {limits.headers} headers; send fewer (the operator can raise LIPCERT_MAX_HEADERS)"
            )
        )
        self.framing = response(
            HeadTooLargeError(
                f"trailers, chunk sizes and chunk extensions are larger than {limits.head_bytes} bytes and the content "
                "between them; send the body in larger chunks, or with Content-Length"
            )
        )
        self.target = response(TargetTooLongError(limits.target_bytes))
        self.slow_head = response(
            TooSlowError(
                f"no complete head of a request within {limits.head_s:g} s; send it at once (the operator can raise "
                "LIPCERT_HEAD_S)"
            )
        )
        self.slow_body = response(
            TooSlowError(
                f"nothing of the body within {limits.body_s:g} s; send it without pauses (the operator can raise "
                "LIPCERT_BODY_S)"
            )
        )
        self.connections = response(TooManyConnectionsError())
        self.version = response(HttpVersionError())
        self.method = response(NotImplementedByServerError("the method is unknown; use GET, HEAD, OPTIONS or POST"))
        self.coding = response(
            NotImplementedByServerError("Transfer-Encoding is not chunked; send that, or Content-Length")
        )


@functools.lru_cache(maxsize=64)
def syntax(reason: str) -> bytes:
    """Return the response to bytes that are not HTTP/1.1; `reason` is a constant of this wing or of the parser."""
    return response(RequestSyntaxError(reason))


def response(error: LipcertError) -> bytes:
    """Return the complete response to `error`, but for `Date`."""
    return last_bytes(problem_of(error))
