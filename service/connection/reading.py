"""From bytes to requests: the callbacks of the parser, within the limits of heads, framing and pipelining."""

from __future__ import annotations

import abc
import asyncio
import logging
import urllib.parse
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.connection.heads import check_head, origin_form, without_upgrade
from service.connection.limits import ConnectionLimits
from service.connection.refusals import Refusals, Refused, syntax

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope

_log = logging.getLogger(__name__)


class Phase(Enum):
    """Where the input of a connection is."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()


async def general_options(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
    """Answer `OPTIONS *` (RFC 9110 section 9.3.7), which is about the server and no path.

    Args:
        scope: of ASGI, as the others.
        receive: not called.
        send: takes the response.
    """
    del scope, receive
    headers = [(b"allow", b"GET, HEAD, OPTIONS, POST")]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class RequestReader(HttpToolsProtocol, abc.ABC):
    """A connection as a source of requests; a refusal ends it."""

    limits = ConnectionLimits()
    refusals = Refusals(limits)
    stops = False
    """Whether the next request is the last; set on the class, of all connections."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.phase = Phase.IDLE
        self.ticks = 0
        """Of the registry, since the client sent something that the server waits for."""
        self.drops_input = False
        self.outlet: Any = None
        """The transport, as requests see it."""
        self._head_bytes = 0
        self._has_upgrade = False
        self._is_chunked = False
        # Of the body: with its framing, without, and since the last piece of content.
        self._raw_bytes = self._content_bytes = self._content_seen = self._barren_bytes = 0
        self._keeps_alive = True

    @abc.abstractmethod
    def end(self, answer: bytes) -> None:
        """Write a last answer and close."""

    @abc.abstractmethod
    def refuse_input(self, answer: bytes) -> None:
        """Write a last answer after those that are due, and close."""

    @abc.abstractmethod
    def drop(self, size: int) -> None:
        """Note that `size` bytes of input were dropped."""

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the client."""
        while data and not self.drops_input:
            piece, data = data, b""
            if self.phase is Phase.BODY:
                self.ticks = 0
                self._raw_bytes += len(piece)
            else:
                room = self.limits.head_bytes - self._head_bytes
                if len(piece) > room:
                    if room == 0:
                        self.refuse_input(self.refusals.head)
                        break
                    piece, data = piece[:room], piece[room:]
                self._head_bytes += len(piece)
            try:
                self.parser.feed_data(piece)
                if self.phase is not Phase.IDLE:
                    self._check_unfinished(piece)
            except httptools.HttpParserUpgrade as stop:
                # The parser stops after the head, and would take the body for the next request.
                data = piece[stop.args[0] :] + data
                self._parse_again()
            except httptools.HttpParserError as error:
                self.refuse_input(self._answer_to(error, piece))
            except Refused as refused:
                self.refuse_input(refused.answer)
        if data:
            self.drop(len(data))

    def _parse_again(self) -> None:
        head = without_upgrade(self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers)
        self._has_upgrade = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserError as error:
            self.refuse_input(self._answer_to(error, head))

    def _answer_to(self, error: httptools.HttpParserError, piece: bytes) -> bytes:
        if isinstance(error.__context__, Refused):
            return error.__context__.answer
        if isinstance(error, httptools.HttpParserCallbackError):
            _log.error("a request could not be parsed", exc_info=error)
        if isinstance(error, httptools.HttpParserInvalidMethodError):
            # A letter starts a method, unless the piece starts with another request; a TLS handshake is not HTTP.
            return self.refusals.method if piece[:1].isalpha() else syntax("it does not start with a method")
        if self.parser.get_http_version() == "2.0":
            return self.refusals.version
        return syntax(str(error))

    def _check_unfinished(self, piece: bytes) -> None:
        """Raise `Refused` if a request line has no version, or if the framing of a body is too large so far."""
        if self.phase is Phase.HEAD:
            if piece.endswith(b"\n") and self.parser.get_http_version() in ("0.0", "0.9"):
                raise Refused(syntax("the request line has no version"))
        elif self._is_chunked:
            if self._content_seen != self._content_bytes:
                self._content_seen, self._barren_bytes = self._content_bytes, 0
            else:
                self._barren_bytes += len(piece)
            limit = self.limits.head_bytes
            framing = self._raw_bytes - self._content_bytes
            if self._barren_bytes > limit or framing > limit + self._content_bytes:
                raise Refused(self.refusals.framing)

    def on_message_begin(self) -> None:
        """Start a request."""
        super().on_message_begin()
        self.phase = Phase.HEAD
        self.ticks = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; trailers, whose size `_check_unfinished` limits, are dropped."""
        if self.phase is Phase.HEAD:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Check the head, and start the request or queue it.

        Raises:
            Refused: the parser stops, and the connection ends with the answer.
        """
        if self.drops_input:
            return
        method = self.parser.get_method()
        if self.parser.should_upgrade():
            if method == b"CONNECT":
                raise Refused(self.refusals.method)
            self._has_upgrade = True
            return
        version = self.parser.get_http_version()
        self.scope["method"] = method.decode("ascii")
        self._is_chunked = check_head(self.url, version, self.headers, self.limits, self.refusals)
        if version != "1.1":
            self.scope["http_version"] = version
        app = self._locate(method)
        self.phase = Phase.BODY
        self.ticks = self._raw_bytes = self._content_bytes = 0
        self._content_seen = -1
        self._keeps_alive = version == "1.1" and self.parser.should_keep_alive()
        before = self.cycle
        self.cycle = cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.outlet,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            # An answer before the end of the body ends the connection.
            keep_alive=False,
            on_response=self.on_response_complete,
        )
        if not before or before.response_complete:
            self._start_asgi_task(cycle, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))

    def _locate(self, method: bytes) -> Any:
        """Write path and query into the scope, and return the application that answers there."""
        scope, target, app = self.scope, self.url, self.app
        if target == b"*":
            if method != b"OPTIONS":
                raise Refused(syntax("the target * is for OPTIONS alone"))
            app = general_options
        elif not target.startswith(b"/"):
            target = origin_form(target)
        raw_path, _, query = target.partition(b"#")[0].partition(b"?")
        path = raw_path.decode("ascii")
        scope["path"] = self.root_path + (urllib.parse.unquote(path) if "%" in path else path)
        scope["raw_path"] = self.root_path.encode("ascii") + raw_path
        scope["query_string"] = query
        return app

    def on_body(self, body: bytes) -> None:
        """Hand a piece of a body to its request."""
        self._content_bytes += len(body)
        cycle = self.cycle
        if not (cycle.response_complete or self.drops_input):
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Note the end of a request."""
        if self._has_upgrade or self.drops_input:
            return
        self.phase = Phase.IDLE
        self._head_bytes = self.ticks = 0
        cycle = self.cycle
        if cycle.response_complete:
            return
        if not cycle.response_started:
            cycle.keep_alive = self._keeps_alive and not self.stops
        cycle.more_body = False
        cycle.message_event.set()
        if len(self.pipeline) >= self.limits.pipelined:
            cycle.keep_alive = False
            self.drops_input = True
