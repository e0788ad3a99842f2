"""gRPC of a server of two processes: one port, TLS, keys, replaced processes, and an end that loses no call."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import certificates
import grpc
import pytest
from client import HEIGHT, WIDTH
from process_table import wait_until
from rpc_server import Caller, infer_request
from server_process import ServerProcess

from service.access.keys import new_key
from service.errors import PortError, SettingsError
from service.processes import serving
from service.settings import Settings

KEY, LINE = new_key("ci", ["predict"])
REQUEST = infer_request("UINT8", (1, 1, HEIGHT, WIDTH), bytes(HEIGHT * WIDTH))
TLS = grpc.ssl_channel_credentials((certificates.FIRST + certificates.SECOND).encode())


class Server(ServerProcess):
    """A server of two processes with TLS, keys, and gRPC on a port that the system chooses."""

    def __init__(self, zoo: Path, folder: Path) -> None:
        self.folder = folder
        (folder / "certificate.pem").write_text(certificates.FIRST)
        (folder / "key.pem").write_text(certificates.FIRST_KEY)
        settings = {
            "models": zoo,
            "processes": 2,
            "grpc_port": 0,
            "api_keys": LINE.strip(),
            "tls_certificate": folder / "certificate.pem",
            "tls_key": folder / "key.pem",
        }
        super().__init__([sys.executable, "-m", "service"], settings)
        self.wait_started(2)
        found = re.search(r"serving gRPC on 127.0.0.1 port (\d+)", self.log)
        assert found is not None, self.log
        self.port = int(found[1])

    def answers(self) -> bool:
        """Whether a call on a new connection is answered."""
        with Caller(self.port, TLS) as caller:
            try:
                return caller.ask("ModelInfer", REQUEST, x_api_key=KEY).model_name == "grey"
            except grpc.RpcError:
                return False


@pytest.fixture(scope="module")
def server(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(zoo, tmp_path_factory.mktemp("rpc"))
    # The port is taken after the start of the application.
    wait_until(server.answers)
    yield server
    server.close()


def connections_of(pid: int, port: int) -> int:
    """Return how many established connections to a port a process has."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(descriptor.readlink()))
        except OSError:
            continue
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path(f"/proc/{pid}/net/tcp6").read_text().splitlines()[1:]]
    return sum(
        row[3] == "01" and int(row[1].rsplit(":", 1)[1], 16) == port and f"socket:[{row[9]}]" in inodes for row in rows
    )


def test_processes_share_the_port_and_a_replacement_takes_it_again(server: Server) -> None:
    callers: list[Caller] = []

    def both_are_reached() -> bool:
        callers.append(Caller(server.port, TLS))
        callers[-1].ask("ModelInfer", REQUEST, x_api_key=KEY)
        return all(connections_of(pid, server.port) for pid in server.children)

    wait_until(both_are_reached)
    for caller in callers:
        caller.channel.close()
    os.kill(server.children[0], signal.SIGKILL)
    server.wait_started(3)
    wait_until(lambda: all(server.answers() for _ in range(8)))


def test_a_call_without_a_key_is_refused(server: Server) -> None:
    with Caller(server.port, TLS) as caller:
        assert caller.refusal("ModelInfer", REQUEST).code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_call_without_tls_is_refused(server: Server) -> None:
    with Caller(server.port) as caller:
        assert caller.refusal("ServerLive").code() is grpc.StatusCode.UNAVAILABLE


def test_a_renewed_certificate_is_taken_without_a_restart(server: Server) -> None:
    old = grpc.ssl_channel_credentials(certificates.FIRST.encode())
    (server.folder / "certificate.pem").write_text(certificates.SECOND)
    (server.folder / "key.pem").write_text(certificates.SECOND_KEY)

    def is_new() -> bool:
        with Caller(server.port, old) as caller:
            try:
                caller.ask("ServerLive")
            except grpc.RpcError:
                return server.answers()
            return False

    wait_until(is_new)


def test_calls_until_the_end_are_answered_or_told_to_go_elsewhere(server: Server) -> None:
    answered = threading.Semaphore(0)
    refusals: list[list[object]] = [[] for _ in range(4)]

    def ask(codes: list[object]) -> None:
        with Caller(server.port, TLS) as caller:
            # A call that crosses the end of its connection on the network has to be made again.
            while all(code is grpc.StatusCode.CANCELLED for code in codes):
                try:
                    caller.ask("ModelInfer", REQUEST, x_api_key=KEY)
                    answered.release()
                except grpc.RpcError as error:
                    codes.append(error.code())

    threads = [threading.Thread(target=ask, args=(codes,)) for codes in refusals]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert answered.acquire(timeout=30)
    assert refusals == [[]] * len(threads)
    server.process.terminate()
    assert server.process.wait(30) == 0
    for thread in threads:
        thread.join()
    for codes in refusals:
        assert codes[-1] is grpc.StatusCode.UNAVAILABLE
        assert len(codes) <= 2
    assert "Traceback" not in server.log


def test_grpc_without_its_library_ends_the_start_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'lipcert\[grpc\]'") as caught:
        serving.run_server(Settings(grpc_port=0), None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_grpc_on_a_port_that_is_taken_ends_the_start() -> None:
    with pytest.raises(SettingsError, match="LIPCERT_GRPC_PORT and LIPCERT_PORT are both 8000"):
        serving.run_server(Settings(port=8000, grpc_port=8000), None)  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=f"port {port} of 127.0.0.1 is not available.*LIPCERT_GRPC_PORT"):
            serving.run_server(Settings(port=0, grpc_port=port), None)  # type: ignore[arg-type]
