"""The application of a replica, without Ray around it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from service.cluster.replica import check_health, replica_app
from service.errors import ClusterError


@pytest.fixture
def _settings(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPCERT_MODELS", str(zoo))
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "grey")
    monkeypatch.setenv("LIPCERT_PROVIDER", "cpu")


@pytest.mark.usefixtures("_settings")
def test_health_of_a_replica_is_that_of_its_routes() -> None:
    app = replica_app(1)
    service = app.state.service

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return [(await http.get(f"/health/{kind}")).status_code for kind in ("live", "ready")]

    async def run() -> None:
        async with app.router.lifespan_context(app):
            check_health(service)
            assert await statuses() == [200, 200]
            service.health.is_stopping = True
            with pytest.raises(ClusterError, match="the server is stopping"):
                check_health(service)
            assert await statuses() == [200, 503]

    asyncio.run(run())
    assert service.batcher.is_closed


@pytest.mark.usefixtures("_settings")
def test_address_of_the_client_comes_from_trusted_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPCERT_TRUSTED_PROXIES", "10.0.0.0/8")
    monkeypatch.setenv("LIPCERT_RATE_PER_ADDRESS", "0.001")
    monkeypatch.setenv("LIPCERT_RATE_BURST", "1")
    app = replica_app(1)

    async def status(address: str) -> int:
        transport = httpx.ASGITransport(app, client=("10.1.2.3", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return (await http.get("/models", headers={"X-Forwarded-For": address})).status_code

    async def run() -> list[int]:
        return [await status(address) for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1")]

    assert asyncio.run(run()) == [200, 200, 429]
