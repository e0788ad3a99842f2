"""Answers of a running server; nothing of the server is loaded."""

from __future__ import annotations

import threading
from typing import Any

from service.api.schema import PredictAnswer
from service.client import Client, ClientError, ServiceError, UnreachableError
from service.sheets.sources import About, RefusedError, SourceError

_MOST_BYTES = 256 * 1024 * 1024
_CONNECTIONS = 8


class Remote:
    """A running server."""

    workers = _CONNECTIONS
    most_bytes = _MOST_BYTES

    def __init__(self, client: Client, model: str | None, options: dict[str, Any]) -> None:
        """Ask for the model.

        Args:
            client: stays open as long as this source.
            model: its name; default: the default model of the server.
            options: of every request.

        Raises:
            SourceError: the server cannot be asked, or has no such model.
        """
        self._client = client
        try:
            if model is None:
                served = client.models().models
                model = next((one.name for one in served if one.default), None)
                if model is None:
                    raise SourceError("the server has no default model: name one of its models with --model")
            described = client.model(model)
        except ServiceError as error:
            raise SourceError(f"the server refuses: {error}") from error
        except ClientError as error:
            raise SourceError(str(error)) from error
        accuracy = described.card.get("accuracy")
        self.about = About(model, described.labels, accuracy if isinstance(accuracy, float | int) else None)
        self._options = {**options, "model": model}
        self._lock, self._lost = threading.Lock(), 0

    def answer(self, content: bytes) -> PredictAnswer:
        """Return the answer about an image file or an npy file; raises `RefusedError`."""
        if self._lost >= self.workers:
            raise RefusedError("it was not sent: the server could no longer be reached")
        try:
            answer = self._client.predict(content, **self._options)
        except UnreachableError as error:
            with self._lock:
                self._lost += 1
            raise RefusedError(str(error)) from error
        except ServiceError as error:
            raise RefusedError(error.detail) from error
        except ClientError as error:
            raise RefusedError(str(error)) from error
        self._lost = 0
        return answer
