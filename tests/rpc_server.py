"""A gRPC server of an application in a thread, as a process of the service runs it, and a plain caller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import grpc
from fastapi import FastAPI
from google.protobuf.message import Message

from service.processes.prefork import hold
from service.rpc import open_inference_pb2 as protocol
from service.rpc.messages import SERVICE
from service.rpc.server import RpcServer
from service.settings import Settings

PATIENCE_S = 30.0
_ANSWERS: dict[str, type[Message]] = {
    name.removesuffix("Response"): getattr(protocol, name) for name in dir(protocol) if name.endswith("Response")
}


class LiveRpcServer:
    """A server on a port of its own; a context manager."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._holder = hold("127.0.0.1", 0)
        self.port: int = self._holder.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> LiveRpcServer:
        self._thread.start()
        self.server = RpcServer("127.0.0.1", self.port, self._settings, None)
        self.run(self.server.start(self._app, self._app.state.service))
        return self

    def __exit__(self, *exc: object) -> None:
        self.run(self.server.stop(0.0))
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()
        self._holder.close()

    def run(self, coroutine: Any) -> Any:
        """Run on the event loop of the server."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_S)


class Caller:
    """A connection to a server that sends bytes, whatever they are; a context manager."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = f"localhost:{port}"
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *exc: object) -> None:
        self.channel.close()

    def begin(self, method: str, content: bytes, timeout_s: float = PATIENCE_S, **metadata: str) -> Any:
        """Return a call in progress, whose result is bytes."""
        pairs = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        return self.channel.unary_unary(f"/{SERVICE}/{method}").future(content, timeout=timeout_s, metadata=pairs)

    def ask(self, method: str, message: Message | bytes = b"", **metadata: str) -> Any:
        """Return the answer as a message."""
        content = message if isinstance(message, bytes) else message.SerializeToString()
        return _ANSWERS[method].FromString(self.begin(method, content, **metadata).result())

    def refusal(self, method: str, message: Message | bytes = b"", **metadata: str) -> grpc.RpcError:
        """Return the error of a call that is refused."""
        try:
            answer = self.ask(method, message, **metadata)
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"{method} was answered: {answer}")


def infer_request(
    datatype: str, shape: Sequence[int], *raw: bytes, model: str = "grey", **fields: Any
) -> protocol.ModelInferRequest:
    """Return a request with one tensor."""
    request = protocol.ModelInferRequest(model_name=model, raw_input_contents=raw, **fields)
    request.inputs.add(name="image", datatype=datatype, shape=shape)
    return request
