"""Middleware that counts every HTTP request."""

from __future__ import annotations

from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import Metrics


class MetricsMiddleware:
    """Middleware that counts every HTTP request; plain ASGI, so bodies are streamed unchanged."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = perf_counter()
        status = 500  # unless a response starts: an exception passes here before it becomes a response

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            # The route is its pattern, /models/{name}: with paths, clients could add labels without limit.
            route = getattr(scope.get("route"), "path", "unmatched")
            requests, duration_s = self._metrics.requests_of(scope["method"], route, status)
            requests.inc()
            duration_s.observe(perf_counter() - started_s)
