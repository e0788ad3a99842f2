"""The two clients: the same calls, in a thread that waits or on an event loop."""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx

from service.api.schema import ModelAnswer, ModelsAnswer, PredictAnswer, ReadyAnswer
from service.client import calls
from service.client.calls import Call, Failure, Pause, Reply
from service.client.errors import ServiceError, UnreadableAnswerError
from service.client.images import Image, encode
from service.client.parts import Parts
from service.client.retries import Retries

Result = TypeVar("Result")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

MOST_ANSWER_BYTES = 256 * 1024 * 1024
"""Largest answer that is read, in bytes."""
_AT_ONCE = Retries(0, 0.0)


class _Base(Generic[Http]):
    _http: Http

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 4,
        longest_pause_s: float = 30.0,
        verify: bool | str | os.PathLike[str] | ssl.SSLContext = True,
        transport: Any = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: of the service, with the prefix of a proxy if there is one.
            api_key: of `lipcert keys new`.
            timeout_s: seconds of each try, from its start to the end of its answer.
            retries: tries after the first, where the connection fails or the status is 429, 502 or 503.
            longest_pause_s: between two tries; a server that asks for more in `Retry-After` is not asked again.
            verify: whether the certificate of the server is verified, or a file of authorities that sign it.
            transport: of httpx, for tests.

        Raises:
            ValueError: the URL is not http or https, or the key has other than printable ASCII characters.
            OSError: the file of authorities cannot be read.
        """
        headers = {"Accept": f"{calls.JSON}, application/problem+json", "Accept-Encoding": "identity"}
        if api_key is not None:
            if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
                raise ValueError("an API key consists of printable ASCII characters without spaces")
            headers["X-API-Key"] = api_key
        try:
            base = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise ValueError(f"{url!r} is not a URL: {error}") from None
        if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment:
            raise ValueError(f"{url!r} is not the URL of a service, as http://127.0.0.1:8000 or https://host/prefix is")
        if not isinstance(verify, bool | ssl.SSLContext):
            verify = ssl.create_default_context(cafile=os.fspath(verify))
        self._timeout_s = timeout_s
        self._retries = Retries(retries, longest_pause_s)
        self._http = self._make_http(
            base_url=base, headers=headers, timeout=timeout_s, verify=verify, transport=transport
        )

    def _make_http(self, **options: Any) -> Http:
        raise NotImplementedError

    def _request(self, call: Call[Any]) -> httpx.Request:
        content = call.content or None
        return self._http.build_request(call.method, call.path, content=content, headers=dict(call.headers))


class _Reading:
    """A response as it arrives, within a time and a size."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self._pieces: list[bytes] = []
        self._n_bytes = 0

    def add(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._n_bytes += len(piece)
        if self._n_bytes > MOST_ANSWER_BYTES:
            raise UnreadableAnswerError(f"the answer has more than {MOST_ANSWER_BYTES} bytes")
        if time.monotonic() > self._end:
            raise httpx.ReadTimeout(f"the answer was not complete after {self._timeout_s:g} s")

    def reply(self, response: httpx.Response) -> Reply:
        return Reply(response.status_code, response.headers, b"".join(self._pieces))


def _failure(error: httpx.RequestError, request: httpx.Request) -> Failure:
    reason = str(error) or type(error).__name__
    is_final = "CERTIFICATE_VERIFY_FAILED" in reason or isinstance(error, httpx.UnsupportedProtocol)
    return Failure(f"{request.url.copy_with(userinfo=b'', query=None)}: {reason}", is_final)


class Client(_Base[httpx.Client]):
    """A client that waits for each answer; several threads may share it."""

    def _make_http(self, **options: Any) -> httpx.Client:
        return httpx.Client(**options)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def predict(self, image: Image, **options: Any) -> PredictAnswer:
        """Return the answer about one image.

        Args:
            image: path, bytes, array or image of Pillow.
            options: see `service.api.schema.Options`.

        Raises:
            ClientError: see `service.client.errors`.
            ValueError: an option is unknown or invalid, or see `service.client.images.encode`.
        """
        return self._run(calls.predict(encode(image), calls.options_of(options)))

    def predict_many(
        self, images: Iterable[Image], *, images_per_request: int = 64, **options: Any
    ) -> Iterator[PredictAnswer]:
        """Yield the answers about many images, in order; requests go out as answers are taken.

        A request that the server refuses as too large is sent again in halves, and so is one whose images differ in
        size or channels. Any other error ends the iteration.

        Args:
            images: as for `predict`.
            images_per_request: at most.
            options: as for `predict`; they apply to all images.

        Raises:
            ClientError, ValueError: as `predict`.
        """
        wanted = calls.options_of(options)
        parts = Parts(images, images_per_request)
        for part in parts:
            try:
                answers = self._run(calls.predict_batch(part, wanted))
            except ServiceError as error:
                parts.split(part, error)
            else:
                yield from answers

    def models(self) -> ModelsAnswer:
        """Return the served models; raises `ClientError`."""
        return self._run(calls.models())

    def model(self, name: str) -> ModelAnswer:
        """Return one model with its bounds and its card; raises `ClientError`."""
        return self._run(calls.model(name))

    def ready(self) -> ReadyAnswer:
        """Return whether the service is ready, and its reasons if not, after one try; raises `ClientError`."""
        return self._run(calls.ready(), _AT_ONCE)

    def _run(self, call: Call[Result], retries: Retries | None = None) -> Result:
        steps = calls.steps(call, retries or self._retries)
        outcome: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                outcome = None
            else:
                outcome = self._try(step)

    def _try(self, call: Call[Any]) -> Reply | Failure:
        request = self._request(call)
        reading = _Reading(self._timeout_s)
        try:
            response = self._http.send(request, stream=True)
            try:
                for piece in response.iter_bytes():
                    reading.add(piece)
            finally:
                response.close()
        except httpx.RequestError as error:
            return _failure(error, request)
        return reading.reply(response)


class AsyncClient(_Base[httpx.AsyncClient]):
    """A client for asyncio."""

    def _make_http(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(**options)

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections."""
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def predict(self, image: Image, **options: Any) -> PredictAnswer:
        """Return the answer about one image; see `Client.predict`."""
        wanted = calls.options_of(options)
        return await self._run(calls.predict(await asyncio.to_thread(encode, image), wanted))

    async def predict_many(
        self, images: Iterable[Image], *, images_per_request: int = 64, **options: Any
    ) -> AsyncIterator[PredictAnswer]:
        """Yield the answers about many images, in order; see `Client.predict_many`."""
        wanted = calls.options_of(options)
        parts = Parts(images, images_per_request)
        while part := await asyncio.to_thread(next, parts, None):
            try:
                answers = await self._run(calls.predict_batch(part, wanted))
            except ServiceError as error:
                parts.split(part, error)
            else:
                for answer in answers:
                    yield answer

    async def models(self) -> ModelsAnswer:
        """Return the served models; raises `ClientError`."""
        return await self._run(calls.models())

    async def model(self, name: str) -> ModelAnswer:
        """Return one model with its bounds and its card; raises `ClientError`."""
        return await self._run(calls.model(name))

    async def ready(self) -> ReadyAnswer:
        """Return whether the service is ready, and its reasons if not, after one try; raises `ClientError`."""
        return await self._run(calls.ready(), _AT_ONCE)

    async def _run(self, call: Call[Result], retries: Retries | None = None) -> Result:
        steps = calls.steps(call, retries or self._retries)
        outcome: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._try(step)

    async def _try(self, call: Call[Any]) -> Reply | Failure:
        request = self._request(call)
        reading = _Reading(self._timeout_s)
        try:
            response = await self._http.send(request, stream=True)
            try:
                async for piece in response.aiter_bytes():
                    reading.add(piece)
            finally:
                await response.aclose()
        except httpx.RequestError as error:
            return _failure(error, request)
        return reading.reply(response)
