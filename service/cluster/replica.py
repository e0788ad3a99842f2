"""The application of one replica, with the tasks of the server of a process: metrics, health, addresses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from fastapi import FastAPI
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service import __version__
from service.api.app import create_app
from service.api.predict import Service
from service.cluster.options import replica_settings
from service.errors import ClusterError
from service.logs import start_logs
from service.settings import list_of, read_settings
from service.tracing import tracer_of

_TICK_S = 0.1


def replica_app(cpus: int) -> FastAPI:
    """Return the application over models that this process proves from the bytes that it loads.

    Args:
        cpus: number of CPUs of the replica.

    Raises:
        LipcertError: a setting, a model or the provider keeps it from starting.
    """
    start_logs()
    settings = replica_settings(read_settings(), cpus)
    logging.getLogger().setLevel(settings.log_level.upper())
    app = create_app(settings)
    if settings.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list_of(settings.trusted_proxies))
    service: Service = app.state.service
    service.traces.tracer = tracer = tracer_of(__version__)
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def running(served: FastAPI) -> AsyncGenerator[None]:
        ticks = asyncio.create_task(_tick(service))
        try:
            async with lifespan(served):
                yield
        finally:
            ticks.cancel()
            if tracer is not None:
                tracer.close()

    app.router.lifespan_context = running
    return app


def check_health(service: Service) -> None:
    """Return if `/health/live` and `/health/ready` are 200.

    Raises:
        ClusterError: with the reasons that they give.
    """
    faults = service.health.faults()
    if faults:
        raise ClusterError("; ".join(faults))


async def _tick(service: Service) -> None:
    while True:
        service.metrics.flush()
        service.health.observe()
        service.health.check()
        await asyncio.sleep(_TICK_S)
