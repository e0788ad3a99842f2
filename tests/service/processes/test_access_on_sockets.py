"""Keys, limits, TLS and headers of a server of two processes, over real connections."""

from __future__ import annotations

import http.client
import logging
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import certificates
import pytest
from process_table import children_of, wait_until
from server_process import without_settings

from service.access.keys import new_key
from service.errors import SettingsError
from service.processes import serving
from service.settings import Settings

KEY, LINE = new_key("ci", ["predict"])
BURST = 20
TLS = ssl.create_default_context(cadata=certificates.FIRST + certificates.SECOND)


@dataclass
class Server:
    """A server of two processes, its port and its files."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, path: str, **headers: str) -> tuple[http.client.HTTPResponse, str]:
        """Response to a GET on a new connection, read, and the common name of the server."""
        with closing(http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=TLS)) as connection:
            connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            certificate = connection.sock.getpeercert()
            response = connection.getresponse()
            response.read()
            return response, dict(pair for (pair,) in certificate["subject"])["commonName"]

    def status(self, path: str, **headers: str) -> int:
        return self.ask(path, **headers)[0].status


@pytest.fixture(scope="module")
def server(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("access")
    (folder / "keys").write_text(LINE)
    (folder / "certificate.pem").write_text(certificates.FIRST)
    (folder / "key.pem").write_text(certificates.FIRST_KEY)
    chosen = {
        "port": 0,
        "provider": "cpu",
        "models": zoo,
        "default_model": "grey",
        "processes": 2,
        "api_keys_file": folder / "keys",
        "rate_per_address": 0.001,
        "rate_burst": BURST,
        "trusted_proxies": "127.0.0.0/8",
        "tls_certificate": folder / "certificate.pem",
        "tls_key": folder / "key.pem",
    }
    environment = without_settings()
    environment |= {f"LIPCERT_{name.upper()}": str(value) for name, value in chosen.items()}
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "service"], env=environment, stderr=stream)
    try:
        wait_until(lambda: log.read_text().count("Application startup complete") == 2 or process.poll() is not None)
        found = re.search(r"serving on https://127.0.0.1:(\d+)", log.read_text())
        assert found is not None, log.read_text()
        yield Server(int(found[1]), folder, process, log)
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_an_answer_tells_browsers_not_to_guess_and_nobody_the_name_of_the_server(server: Server) -> None:
    for path in ("/health/live", "/docs", "/models", "/nothing"):
        response, _ = server.ask(path, X_Forwarded_For="192.0.2.1")
        assert response.getheader("x-content-type-options") == "nosniff"
        assert response.getheader("server") is None


def test_a_limit_is_that_of_all_processes_for_the_client_of_a_proxy(server: Server) -> None:
    for client in ("198.51.100.1", "2001:db8::1"):
        statuses = [server.status("/docs", X_Forwarded_For=client) for _ in range(2 * BURST)]
        assert statuses.count(200) == BURST
        assert statuses.count(429) == BURST
    # The address that a client puts before that of the proxy is not believed.
    assert server.status("/docs", X_Forwarded_For="203.0.113.9, 198.51.100.1") == 429
    assert server.status("/docs", X_Forwarded_For="203.0.113.10") == 200


def replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_keys_are_rotated_in_all_processes_without_a_restart(server: Server) -> None:
    clients = iter(range(1, 1_000_000))

    def statuses(key: str) -> set[int]:
        # Enough connections to reach both processes, and no limit is met.
        return {
            server.status("/models", X_API_Key=key, X_Forwarded_For=f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
            for n in (next(clients) for _ in range(12))
        }

    assert statuses(KEY) == {200}
    new, line = new_key("ci", ["predict"])
    replace(server.folder / "keys", line)
    wait_until(lambda: statuses(KEY) == {401})
    assert statuses(new) == {200}
    replace(server.folder / "keys", line[:-7])
    # Both processes and their parent.
    wait_until(lambda: server.log.read_text().count("the API keys stay as they were") == 3 or statuses(new) != {200})
    assert statuses(new) == {200}
    # Whatever takes the place of a process has the keys of the last undamaged file, not those of the start.
    os.kill(children_of(server.process.pid)[0], signal.SIGKILL)
    wait_until(lambda: server.log.read_text().count("Application startup complete") == 3)
    assert statuses(new) == {200}
    assert statuses(KEY) == {401}


def test_a_certificate_is_renewed_in_all_processes_without_a_restart(server: Server) -> None:
    def names() -> set[str]:
        return {server.ask("/health/live")[1] for _ in range(12)}

    assert names() == {"first"}
    replace(server.folder / "certificate.pem", certificates.SECOND)
    replace(server.folder / "key.pem", certificates.SECOND_KEY)
    wait_until(lambda: names() == {"second"})


@pytest.mark.parametrize(
    ("address", "settings", "warns"),
    [
        ("127.0.0.1", {}, False),
        ("::1", {}, False),
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("192.0.2.1", {}, True),
        ("fe80::1%eth0", {}, True),
        ("0.0.0.0", {"api_keys": LINE}, False),
        ("0.0.0.0", {"allow_anonymous": True}, False),
    ],
)
def test_serving_everybody_without_keys_is_one_loud_line(
    caplog: pytest.LogCaptureFixture, address: str, settings: dict[str, object], warns: bool
) -> None:
    serving.warn_if_open(Settings(**settings), address)  # type: ignore[arg-type]
    assert [record.levelno for record in caplog.records if record.name == "service"] == [logging.WARNING] * warns
    if warns:
        assert all(name in caplog.text for name in (address, "LIPCERT_API_KEYS_FILE", "LIPCERT_ALLOW_ANONYMOUS=1"))


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key"])
def test_half_of_a_certificate_ends_the_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="belong together"):
        serving._certificate_of(Settings(**{name: tmp_path}))  # type: ignore[arg-type]
