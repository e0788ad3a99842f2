"""Errors about who asks, and how often."""

from __future__ import annotations

from service.errors.base import LipcertError


class AccessError(LipcertError):
    """The client may not ask this, or not now; no part of the request but its key and its address matters."""


class UnauthorizedError(AccessError):
    """The path needs an API key, and the request has no valid one; the message says no more than that."""

    def __init__(self) -> None:
        super().__init__(
            "this path needs a valid API key; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY` (the operator "
            "makes one with `lipcert keys new NAME --scope SCOPE`)"
        )


class ForbiddenError(AccessError):
    """The API key is valid and has not the scope that the path needs."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        super().__init__(
            f"this path needs an API key with the scope {scope}; use another key, or ask the operator to add the scope "
            "to this one (/docs lists all paths)"
        )


class RateLimitError(AccessError):
    """More requests of a key or an address than the limit of the server."""

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "too many requests; wait for the seconds in Retry-After (the operator can raise LIPCERT_RATE_PER_KEY, "
            "LIPCERT_RATE_PER_ADDRESS or LIPCERT_RATE_BURST)"
        )
