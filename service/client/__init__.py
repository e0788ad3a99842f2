"""Client of the service over HTTP: `Client`, `AsyncClient`, typed answers and errors; httpx and pydantic alone."""

from importlib.util import find_spec

if find_spec("httpx") is None:
    raise ImportError("service.client needs httpx, which is not installed: `pip install 'lipcert[client]'`")

from service.api.schema import (
    ModelAnswer,
    ModelsAnswer,
    Options,
    PredictAnswer,
    Problem,
    ReadyAnswer,
)
from service.client.clients import AsyncClient, Client
from service.client.errors import ClientError, ServiceError, UnreachableError, UnreadableAnswerError
from service.client.images import Image

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "Image",
    "ModelAnswer",
    "ModelsAnswer",
    "Options",
    "PredictAnswer",
    "Problem",
    "ReadyAnswer",
    "ServiceError",
    "UnreachableError",
    "UnreadableAnswerError",
]
