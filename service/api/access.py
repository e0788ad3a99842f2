"""Middleware that checks API key and rate of every request; in the application only where one of them is configured."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.keys import KeyRing
from service.access.limits import Buckets, client_of
from service.access.scopes import ADMIN, METRICS, PREDICT
from service.api.metrics import error_type_of
from service.api.problem import has_error_member, problem_of
from service.errors import AccessError, ForbiddenError, RateLimitError, UnauthorizedError
from service.settings import Settings

KEY_HEADERS = ("Authorization", "X-API-Key")
"""Headers that carry a key."""

_HEALTH = frozenset({"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
_OPEN = _HEALTH | {"/", "/docs", "/openapi.json"}
_OPEN_BELOW = ("/static/", "/samples/")
_PREDICT = frozenset(
    {"/predict", "/predict/batch", "/models", "/v1/models", "/v2", "/v2/models", "/v2/repository/index"}
)
_PREDICT_BELOW = ("/models/", "/v1/models/", "/v2/models/")
_FAILURES_PER_S, _FAILURES = 1.0, 20
"""Requests without a valid key from one address that are answered 401; more are answered 429."""
_LOGGED_PER_S = 1 / 60
_RETRY_AFTER_S = 3600
"""Longest pause that a client is told."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Keys and limits that are configured."""

    keys: KeyRing | None
    per_key: Buckets | None
    per_address: Buckets | None


def access_of(settings: Settings) -> Access | None:
    """Return keys and limits of the settings; null without such settings.

    Called before processes are forked, which then share the limits.

    Raises:
        SettingsError: see `KeyRing`.
    """

    def buckets(per_s: float) -> Buckets | None:
        return Buckets(per_s, settings.rate_burst) if per_s else None

    has_keys = settings.api_keys_file is not None or settings.api_keys != ""
    keys = KeyRing(settings.api_keys, settings.api_keys_file) if has_keys else None
    access = Access(keys, buckets(settings.rate_per_key) if keys else None, buckets(settings.rate_per_address))
    return None if access == Access(None, None, None) else access


def scope_of(path: str) -> str | None:
    """Return the scope that a path needs; null if it is open; paths that nobody listed here need `admin`."""
    if path in _PREDICT or path.startswith(_PREDICT_BELOW):
        return PREDICT
    if path in _OPEN or path.startswith(_OPEN_BELOW):
        return None
    return METRICS if path == "/metrics" else ADMIN


class AccessMiddleware:
    """Middleware that answers 401, 403 and 429; plain ASGI, and it reads no body."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._failures = Buckets(_FAILURES_PER_S, _FAILURES)
        self._log_lines = Buckets(_LOGGED_PER_S, 1, slots=4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._refusal(scope) if scope["type"] != "lifespan" else None
        await (answer or self._app)(scope, receive, send)

    async def _refusal(self, scope: Scope) -> Response | None:
        path: str = scope["path"]
        keys, per_address, per_key = self._access.keys, self._access.per_address, self._access.per_key
        # Who limits probes has a server that is restarted when it is busy.
        if per_address is not None and path not in _HEALTH:
            wait_s = per_address.take(_client(scope))
            if wait_s:
                return _limited(wait_s, path)
        needed = scope_of(path)
        if keys is None or needed is None:
            return None
        sent = _key_in(scope["headers"])
        key = None if sent is None else await keys.find(sent)
        if key is None:
            return self._unauthorized(scope, path)
        if per_key is not None:
            wait_s = per_key.take(key.name)
            if wait_s:
                return _limited(wait_s, path)
        return None if key.allows(needed) else _refused(ForbiddenError, needed, has_error_member(path))

    def _unauthorized(self, scope: Scope, path: str) -> Response:
        client = _client(scope)
        wait_s = self._failures.take(client)
        if not wait_s:
            return _refused(UnauthorizedError, None, has_error_member(path))
        if not self._log_lines.take(""):
            _log.warning("many requests without a valid API key, the last one from %s", client[:100])
        return _limited(wait_s, path)


def describe_access(openapi: dict[str, Any], access: Access) -> None:
    """Add keys, limits and their answers to the OpenAPI document."""
    answers = {"429": RateLimitError(1)} if access.per_address or access.per_key else {}
    if access.keys is not None:
        openapi["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key of the operator."},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
        }
    for path, operations in openapi["paths"].items():
        needed = scope_of(path) if access.keys is not None else None
        refusals = {} if path in _HEALTH else dict(answers)
        if needed is not None:
            refusals |= {"401": UnauthorizedError(), "403": ForbiddenError(needed), "429": RateLimitError(1)}
        for operation in operations.values():
            if needed is not None:
                operation["security"] = [{"bearer": []}, {"header": []}]
            for status, error in refusals.items():
                schema = {"$ref": "#/components/schemas/Problem"}
                operation["responses"][status] = {
                    "description": str(error),
                    "content": {error_type_of(path): {"schema": schema}},
                }


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return client_of(client[0]) if client else ""


def _key_in(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return the only API key of a request; another scheme of Authorization may be that of a proxy."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"x-api-key" or (name == b"authorization" and value[:7].lower() == b"bearer "):
            if found is not None:
                return None
            found = (value if name == b"x-api-key" else value[7:]).strip()
    return found


def _limited(wait_s: float, path: str) -> Response:
    return _refused(RateLimitError, math.ceil(min(wait_s, _RETRY_AFTER_S)), has_error_member(path))


@functools.lru_cache(1024)
def _refused(error: Callable[..., AccessError], of: Any, error_member: bool) -> Response:
    """Return an answer that is the same for all requests, hence without their path.

    Args:
        error: its class.
        of: its argument, if it has one.
        error_member: see `service.api.problem.problem`.
    """
    return problem_of(error() if of is None else error(of), error_member=error_member)
