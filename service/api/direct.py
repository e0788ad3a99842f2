"""The busiest paths, called before the framework: its layers and its router cost more than all else a request needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]


class DirectFastAPI(FastAPI):
    """FastAPI, but for some routes whose functions take the request alone and give the whole answer.

    The framework would have nothing to add to them. It still documents them, and refuses other methods.
    """

    def __init__(self, **arguments: Any) -> None:
        """As FastAPI; see `call_directly`."""
        super().__init__(**arguments)
        self._directly: dict[tuple[str, str], ASGIApp] = {}

    def call_directly(
        self, routes: Sequence[APIRoute], answer_error: ErrorAnswer, around: type, **options: Any
    ) -> None:
        """Call these routes without the framework.

        Args:
            routes: with a fixed path each.
            answer_error: the answer to whatever a function raises.
            around: an ASGI middleware, with its `options`.
        """
        for route in routes:
            answer = around(_Direct(route, answer_error), **options)
            self._directly |= {(method, route.path): answer for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the start and end of the application."""
        if scope["type"] == "http" and (answer := self._directly.get((scope["method"], scope["path"]))) is not None:
            await answer(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Direct:
    def __init__(self, route: APIRoute, answer_error: ErrorAnswer) -> None:
        self._route = route
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route  # as the router would, for whoever asks which one it was
        request = Request(scope, receive)
        try:
            response = await self._route.endpoint(request)
        except Exception as error:
            response = await self._answer_error(request, error)
        await response(scope, receive, send)
