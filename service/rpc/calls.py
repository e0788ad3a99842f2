"""One call: its message is read, the application is asked, and its answer or its problem is returned.

The application sees a request of `/v2` with the address and the metadata of the caller: keys, rates, limits, deadlines,
metrics and traces are those of HTTP. A problem document becomes a status with its detail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote
from weakref import WeakValueDictionary

import grpc
from starlette.types import ASGIApp, Message

from service.api.body import JSON_LENGTH
from service.api.metrics import reason_of
from service.api.predict import ABANDON, Service
from service.api.problem import MEDIA_TYPE, problem_of
from service.errors import LipcertError, TooSlowError
from service.rpc.messages import Answer, Ask, Method

_HEADERS = ("authorization", "traceparent", "tracestate", "x-api-key", "x-forwarded-for", "x-request-id")
"""Metadata that the application sees."""
_TRAILERS = ("retry-after", "x-request-id")
"""Headers of an answer that the caller sees, as metadata at the end."""
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    # As gRPC answers a message that is too long.
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_REASONS = {"deadline": grpc.StatusCode.DEADLINE_EXCEEDED}
"""Of problems that HTTP has no status for, by type."""
_MOST_DETAIL = 4096
"""Bytes of a status, percent-encoded: clients accept 8 KiB of metadata."""
_BYTES_PER_S = 16 * 1024
_AT_ONCE_BYTES = 64 * 1024
"""Longest message that is parsed on the event loop."""

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True)
class Pace:
    """How long a call may take on the wire."""

    read_s: float
    """Until its message is there."""
    write_s: float
    """Until its answer is read, and one more for each 16 KiB."""
    reading: int
    """Messages that arrive at the same time: gRPC counts no bytes before a message is complete."""
    share: float
    """Share of these that one address can have."""


class Response:
    """Response of the application, collected from its ASGI messages."""

    def __init__(self) -> None:
        """Expect a response."""
        self.status = 500
        self.headers: Mapping[str, str] = {"content-type": ""}
        self.content = b""

    async def send(self, message: Message) -> None:
        """Take a message of ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            self.content += message.get("body", b"")


class Gate:
    """Lets some callers in at a time, and of one address a share of them."""

    def __init__(self, most: int, share: float) -> None:
        """Let `most` callers in, and of one address this share."""
        self._all = asyncio.Semaphore(most)
        self._most_of_one = max(1, int(most * share))
        self._of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def entered(self, address: str) -> AsyncGenerator[None]:
        """Wait for the turn of a caller."""
        of_one = self._of.get(address) or asyncio.Semaphore(self._most_of_one)
        self._of[address] = of_one
        async with of_one, self._all:
            yield


class Calls:
    """Answers calls; all methods are called on the event loop."""

    def __init__(self, app: ASGIApp, service: Service, pace: Pace) -> None:
        """Answer nothing yet.

        Args:
            app: with the middleware of the server.
            service: of the application.
            pace: see `Pace`.
        """
        self._app = app
        self._service = service
        self._pace = pace
        self._gate = Gate(pace.reading, pace.share)
        self.in_progress = 0

    async def answer(self, method: Method, context: Context) -> None:
        """Answer one call, or end it with a status."""
        self.in_progress += 1
        try:
            response = await self._ask(asked := await self._read(method, context), context)
            if response.headers["content-type"] == MEDIA_TYPE:
                _refuse(context, response)
            else:
                length = response.headers.get(JSON_LENGTH.lower())
                found = Answer(response.content, None if length is None else int(length), asked.is_typed)
                context.set_trailing_metadata(_trailers_of(response))
                await self._write(context, method.answer(found).SerializeToString())
        except LipcertError as error:
            response = _refused(error)
            self._service.metrics.refusals_of(reason_of(response.content, response.status)).inc()
            _refuse(context, response)
        finally:
            self.in_progress -= 1

    async def _read(self, method: Method, context: Context) -> Ask:
        """Return the request of `/v2` of a call."""
        try:
            async with asyncio.timeout(self._pace.read_s) as limit, self._gate.entered(_address_of(context)[0]):
                # A call may end without a message, which is that of no field.
                content = await context.read() or b""
                limit.reschedule(None)
                # Others are served while a long message is parsed.
                if len(content) > _AT_ONCE_BYTES:
                    return await asyncio.to_thread(method.read, content)
                return method.read(content)
        except TimeoutError:
            raise TooSlowError(
                f"the message was not there after {self._pace.read_s:g} s; send it faster (the operator can raise "
                "LIPCERT_BODY_S)"
            ) from None

    async def _write(self, context: Context, content: bytes) -> None:
        async with asyncio.timeout(self._pace.write_s + len(content) / _BYTES_PER_S):
            await context.write(content)

    async def _ask(self, asked: Ask, context: Context) -> Response:
        """Return the response of the application; a caller that is gone is told to it, as HTTP does."""
        response = Response()
        scope = _scope_of(asked, context)
        messages = iter([{"type": "http.request", "body": asked.content, "more_body": False}])

        async def receive() -> Message:
            return next(messages, {"type": "http.disconnect"})

        # In a task of its own, which ends at its own deadline.
        task = asyncio.ensure_future(self._app(scope, receive, response.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.get(ABANDON, task.cancel)()
            await asyncio.wait([task])
            raise
        except Exception:
            # After its answer, a problem document.
            _log.exception("a call failed")
        return response


def _scope_of(asked: Ask, context: Context) -> dict[str, Any]:
    """Return the scope of ASGI of a call."""
    found = [(name, value) for name, value in context.invocation_metadata() or () if name in _HEADERS]
    headers = [*found, *asked.headers.items(), ("content-length", str(len(asked.content)))]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": quote(asked.path).encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), str(value).encode("latin-1", "replace")) for name, value in headers],
        "client": _address_of(context),
        "server": None,
    }


def _address_of(context: Context) -> tuple[str, int]:
    """Return the address of a caller, from `ipv4:127.0.0.1:50051` or `ipv6:%5B::1%5D:50051`."""
    host, _, port = unquote(context.peer()).partition(":")[2].rpartition(":")
    return host.strip("[]"), int(port)


def _refused(error: LipcertError) -> Response:
    document = problem_of(error)
    response = Response()
    response.status, response.headers, response.content = document.status_code, document.headers, bytes(document.body)
    return response


def _refuse(context: Context, response: Response) -> None:
    """Set the status of a problem document, for the end of the call.

    `Context.abort` would leave the call, its message and its error in a cycle: garbage, which is rarely collected.
    """
    problem = json.loads(response.content)
    code = _REASONS.get(reason_of(response.content, response.status))
    detail: str = problem["detail"]
    while len(quote(detail)) > _MOST_DETAIL:
        detail = f"{detail[: len(detail) // 2]}..."
    context.set_code(code or _CODES.get(response.status, grpc.StatusCode.UNKNOWN))
    context.set_details(detail)
    context.set_trailing_metadata(_trailers_of(response))


def _trailers_of(response: Response) -> tuple[tuple[str, str], ...]:
    return tuple((name, response.headers[name]) for name in _TRAILERS if name in response.headers)
