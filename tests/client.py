"""A client of the application in this process, and the size of the models of `conftest`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
from fastapi import FastAPI

HEIGHT, WIDTH = 4, 5
LIMITS = {"max_body_bytes": 20_000, "max_pixels": 2_000, "max_batch": 4}


class Client:
    """Requests to an ASGI application inside this process, one at a time."""

    def __init__(self, app: FastAPI, runner: asyncio.Runner) -> None:
        self.app = app
        self._runner = runner

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """As `httpx.request`; an exception of the application becomes the answer that a client would see."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                return await http.request(method, path, **arguments)

        return self._runner.run(send())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        """GET."""
        return self.request("GET", path, **arguments)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        """POST."""
        return self.request("POST", path, **arguments)


def predict_scope(headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the ASGI scope of a POST /predict, for tests that send and receive its messages themselves."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("test", 1),
        "server": ("test", 80),
        "scheme": "http",
        "root_path": "",
    }
