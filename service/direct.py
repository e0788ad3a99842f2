"""The busiest paths, called without the router: its dispatch costs more than everything else that a request needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

ErrorAnswer = Callable[[Request, Exception], Awaitable[Response]]


class DirectRoutes:
    """Calls the functions of some routes itself; the router still documents them, and refuses other methods.

    The functions take the request alone and give the whole answer, so the router would have nothing to add.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[APIRoute], answer_error: ErrorAnswer) -> None:
        """Wrap `app`.

        Args:
            app: gets everything else.
            routes: with a fixed path each.
            answer_error: the answer to what a function raises; it raises again what it has no answer to.
        """
        self._app = app
        self._routes = {(method, route.path): route for route in routes for method in route.methods or ()}
        self._answer_error = answer_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route  # as the router would, for whoever asks which one it was
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request)
        except Exception as error:
            response = await self._answer_error(request, error)
        await response(scope, receive, send)
