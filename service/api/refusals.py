"""Refusals before a task is made for a request: in an overload they must cost a fraction of an answer."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from service.api.metrics import error_type_of, reason_of, request_id_of
from service.api.predict import Service
from service.api.problem import last_bytes, problem_of
from service.errors import OverloadedError

_ROUTES = (
    ("/v2/models/", "/infer", "/v2/models/{name}/infer"),
    ("/v2/models/", "/explain", "/v2/models/{name}/explain"),
    ("/v1/models/", ":predict", "/v1/models/{name}:predict"),
    ("/v1/models/", ":explain", "/v1/models/{name}:explain"),
)
"""Beginning and end of further paths of predictions, and their routes without a version."""
_MOST_ANSWERS = 256


class Refusals:
    """Refusals by the server, before it calls the application: see `service.connection`."""

    def __init__(self, service: Service) -> None:
        """Refuse requests that `service` has no capacity for."""
        self._batcher = service.batcher
        self._metrics = service.metrics

    def refuse(self, scope: MutableMapping[str, Any]) -> bytes | None:
        """Return a complete response where a request would only be refused, otherwise null; count it as a request.

        Args:
            scope: of ASGI. Whatever is no image to classify is let through.
        """
        path: str = scope["path"]
        if scope["method"] != "POST":
            return None
        route = path if path in ("/predict", "/predict/batch") else _route_of(path)
        if route is None:
            return None
        client = scope["client"] or ("", 0)
        refusal = self._batcher.refusal(client[0])
        if refusal is None:
            self._batcher.expect(asyncio.get_running_loop())
            return None
        requests, duration_s = self._metrics.requests_of("POST", route, HTTPStatus.SERVICE_UNAVAILABLE)
        requests.inc()
        duration_s.observe(0.0)
        number = request_id_of(scope["headers"])
        return _answer(path, *refusal).replace(b"\r\n", b"\r\nx-request-id: %s\r\n" % number.encode("ascii"), 1)

    def refused(self, answer: bytes) -> None:
        """Count a complete response that the application does not see."""
        self._metrics.refusals_of(reason_of(answer, int(answer[9:12]))).inc()


def _route_of(path: str) -> str | None:
    for beginning, end, route in _ROUTES:
        if path.startswith(beginning) and path.endswith(end):
            return route.replace("{name}/", "{name}/versions/{version}/") if "/versions/" in path else route
    return None


@functools.lru_cache(_MOST_ANSWERS)
def _answer(path: str, settings: str, retry_after_s: int) -> bytes:
    """Return the response that the application would give, as bytes; the connection closes after it."""
    answer = problem_of(OverloadedError(settings, retry_after_s), path)
    answer.headers["Content-Type"] = error_type_of(path)
    return last_bytes(answer)
