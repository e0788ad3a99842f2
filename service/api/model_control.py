"""Loading and unloading of models while the server runs: the model repository extension of the Open Inference Protocol.

Extension: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md. Its
paths need an API key of the scope `admin`, so that a server without keys refuses them.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from service.access.scopes import ADMIN
from service.api.openapi import problem_responses
from service.api.predict import Service
from service.errors import ForbiddenError, ModelControlError, UnknownModelError
from service.inference.catalogue import UNKNOWN, Order

_LONGEST_NAME = 255


class ModelState(BaseModel):
    """A model after a request to load or unload it."""

    name: str
    state: Literal["READY", "UNAVAILABLE", "LOADING"]
    """`LOADING` (status 202) where it is not verified before the deadline of a request; GET /models/NAME tells how it
    ends."""


def build_router(service: Service) -> APIRouter:
    """Return the routes over one `Service`."""
    router = APIRouter(prefix="/v2/repository/models", tags=["open inference protocol"])
    answers = problem_responses(403, 404, 409, 503)
    answers |= {202: {"model": ModelState, "description": "The model is still being verified."}}

    @router.post("/{name}/load", summary="Load a model", response_model=ModelState, responses=answers)
    async def load(name: str) -> Response:
        """Verify the artefact in the folder of that name, and serve it in the place of its older version.

        With a fault, the older version goes on, and the status is 409.
        """
        return await _done(service, Order("load", name), "READY")

    @router.post("/{name}/unload", summary="Unload a model", response_model=ModelState, responses=answers)
    async def unload(name: str) -> Response:
        """Serve a model no more, until it is loaded or the server starts again; open requests are answered."""
        return await _done(service, Order("unload", name), "UNAVAILABLE")

    return router


async def _done(service: Service, order: Order, state: Literal["READY", "UNAVAILABLE"]) -> Response:
    settings, ask = service.settings, service.repository.ask
    if settings.api_keys_file is None and not settings.api_keys:
        raise ForbiddenError(ADMIN)
    if len(order.name) > _LONGEST_NAME:
        raise UnknownModelError(order.name, service.models)
    if ask is None:
        raise ModelControlError("this server cannot change its models; start it by `lipcert serve`")
    try:
        async with asyncio.timeout(settings.deadline_s):
            fault = await ask(order)
    except TimeoutError:
        answer, status = ModelState(name=order.name, state="LOADING"), 202
    else:
        if fault == UNKNOWN:
            raise UnknownModelError(order.name, service.models)
        if fault is not None:
            raise ModelControlError(f"the models stay as they are: {fault}")
        answer, status = ModelState(name=order.name, state=state), 200
    return Response(answer.model_dump_json(), status_code=status, media_type="application/json")
