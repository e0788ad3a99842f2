"""Middleware that sees every HTTP request first: its identifier, its count, and its trace."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import request_id
from service.metrics import Metrics
from service.tracing import Tracer

REQUEST_ID = "lipcert.request_id"
"""Key of the identifier in the scope of a request."""
STAGES = "lipcert.stages"
"""Key of the stages in the scope of a request, for its trace."""
HEADER = b"x-request-id"
PROBLEM = b"application/problem+json"
_VALID = re.compile(rb"[\x21-\x7e]{1,128}")
_TYPE = re.compile(rb'"type": "urn:problem-type:lipcert:([a-z-]{1,40})"')


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return `X-Request-ID` if it has 1 to 128 visible ASCII characters, otherwise a new identifier."""
    for name, value in headers:
        if name == HEADER and _VALID.fullmatch(value):
            return value.decode("ascii")
    return secrets.token_hex(16)


def reason_of(content: bytes, status: int) -> str:
    """Return the label of a refusal: the type of its problem document, or `http-STATUS`; clients cannot add one."""
    found = _TYPE.search(content)
    return found[1].decode("ascii") if found else f"http-{status}"


def error_type_of(path: str) -> str:
    """Return the media type of problem documents at a path: clients of KServe V1 show errors of JSON alone."""
    return "application/json" if path.startswith("/v1/") else PROBLEM.decode()


class Traces:
    """Where a process puts its tracer once it serves."""

    tracer: Tracer | None = None


class MetricsMiddleware:
    """Middleware that names and counts every HTTP request; plain ASGI, so bodies are streamed unchanged.

    The identifier is in the header `X-Request-ID` of the answer, in the member `request_id` of a problem document, and
    in the lines of the log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = perf_counter()
        number = scope[REQUEST_ID] = request_id_of(scope["headers"])
        # Each request has a task, whose context ends with it; the server logs an exception after this middleware.
        request_id.set(number)
        tracer = self._traces.tracer
        span = None if tracer is None else tracer.start(scope["method"], scope["path"], scope["headers"], number)
        status = 500  # unless a response starts: an exception passes here before it becomes a response
        member = b""

        async def note_status(message: Message) -> None:
            nonlocal status, member
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
                if status >= 400 and (b"content-type", PROBLEM) in headers:
                    member = member_of(number)
                    changed = {
                        b"content-length": b"%d" % (int(dict(headers)[b"content-length"]) + len(member)),
                        b"content-type": error_type_of(scope["path"]).encode(),
                    }
                    headers = [(name, changed.get(name, value)) for name, value in headers]
                # Answers that are the same for all requests share their headers.
                message["headers"] = [*headers, (HEADER, number.encode("ascii"))]
            elif member and message["body"]:
                # A problem document is sent at once.
                self._metrics.refusals_of(reason_of(message["body"], status)).inc()
                message["body"] = message["body"][:-1] + member + b"}"
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            # The route is its pattern, /models/{name}: with paths, clients could add labels without limit.
            route = getattr(scope.get("route"), "path", "unmatched")
            requests, duration_s = self._metrics.requests_of(scope["method"], route, status)
            requests.inc()
            duration_s.observe(perf_counter() - started_s)
            if tracer is not None and span is not None:
                tracer.end(span, scope["method"], route, status, scope.get(STAGES, ()))


def member_of(number: str) -> bytes:
    """Return the member of a problem document that names its request, to be written before the last brace."""
    return b', "request_id": ' + json.dumps(number).encode("ascii")
