"""The configurations in deploy/proxy: their numbers fit the settings, and the proxies themselves do what they say."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from process_table import wait_until

from service.settings import Settings

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "proxy"
FILES = {"nginx": FOLDER / "nginx.conf", "caddy": FOLDER / "Caddyfile", "haproxy": FOLDER / "haproxy.cfg"}
PREFIX = "/ai/lipcert"


@pytest.mark.parametrize("name", FILES)
def test_sizes_and_times_are_above_those_of_the_server(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    settings = Settings()
    ((size, unit),) = re.findall(r"(?:client_max_body_size|max_size|content-length\) gt) (\d+)(m|MiB)?\b", text)
    body_bytes = int(size) * (2**20 if unit else 1)
    assert settings.max_body_bytes < body_bytes <= 2 * settings.max_body_bytes
    times_s = re.findall(
        r"(?:proxy_read_timeout|proxy_send_timeout|response_header_timeout|timeout client|timeout server) (\d+)s", text
    )
    assert times_s
    assert all(settings.deadline_s < int(time_s) <= 2 * settings.deadline_s for time_s in times_s)
    assert f"127.0.0.1:{settings.port}" in text
    assert f"LIPCERT_DEADLINE_S ({settings.deadline_s:g} s)" in text


class Backend(ThreadingHTTPServer):
    """A server that notes the requests that it gets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, dict[str, str], int]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {key.lower(): value for key, value in self.headers.items()}
        if self.path != "/health/ready":  # checks of HAProxy
            self.server.seen.append((self.command, self.path, headers, len(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command_of(name: str, port: int, backend: int, folder: Path) -> list[str]:
    """Command that runs the shipped configuration on other ports, as any user, without a file outside of `folder`."""
    text = re.sub(r"127\.0\.0\.1:800[01]", f"127.0.0.1:{backend}", FILES[name].read_text(encoding="utf-8"))
    if name == "caddy":
        (folder / "Caddyfile").write_text("{\n\tadmin off\n}\n" + text.replace(":80 {", f"http://127.0.0.1:{port} {{"))
        return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    if name == "haproxy":
        (folder / "haproxy.cfg").write_text(text.replace("bind :80\n", f"bind 127.0.0.1:{port}\n"))
        return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
    (folder / "site.conf").write_text(text.replace("listen 80;", f"listen 127.0.0.1:{port};"))
    temporary = "".join(
        f"{kind}_temp_path {folder / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"user root; daemon off; pid {folder / 'pid'}; error_log {folder / 'log'}; events {{}}\n"
        f"http {{ access_log off; {temporary} include {folder / 'site.conf'}; }}\n"
    )
    return ["nginx", "-p", str(folder), "-e", str(folder / "log"), "-c", str(folder / "nginx.conf")]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
        for name in FILES
    ]
)
def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, Backend]]:
    """Port of a proxy with the shipped configuration, and the server behind it."""
    with Backend() as backend:
        thread = threading.Thread(target=backend.serve_forever)
        thread.start()
        port = free_port()
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command_of(request.param, port, backend.server_port, tmp_path),
                env=os.environ | {"HOME": str(tmp_path)},
                stdout=output,
                stderr=output,
            )
        try:
            wait_until(lambda: answers(port) or process.poll() is not None)
            assert process.poll() is None, (tmp_path / "output").read_text()
            yield port, backend
        finally:
            process.terminate()
            process.wait(60)
            backend.shutdown()
            thread.join()


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.read()
        return response


def test_the_proxy_passes_on_what_the_server_expects(proxy: tuple[int, Backend]) -> None:
    port, backend = proxy
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABkAAQAAP__"}
    spoofed = {"X_Forwarded_For": "192.0.2.9", "X_API_Key": "lipcert.ci.x"}
    assert ask(port, "POST", f"{PREFIX}/predict?epsilon=0.5", b"image", **upgrade, **spoofed).status == 200
    ((method, path, headers, size),) = backend.seen
    assert (method, path, size) == ("POST", "/predict?epsilon=0.5", 5)
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-api-key"] == "lipcert.ci.x"
    assert "upgrade" not in headers
    assert "upgrade" not in headers.get("connection", "").lower()


def test_a_body_that_is_a_little_too_large_reaches_the_server_and_a_larger_one_does_not(
    proxy: tuple[int, Backend],
) -> None:
    port, backend = proxy
    assert ask(port, "POST", f"{PREFIX}/predict", bytes(Settings().max_body_bytes + 1)).status == 200
    assert backend.seen[-1][3] == Settings().max_body_bytes + 1
    with contextlib.suppress(OSError):  # the proxy may close before it has read everything
        assert ask(port, "POST", f"{PREFIX}/predict", bytes(18 * 2**20)).status in (413, 502)
    assert all(size < 18 * 2**20 for *_, size in backend.seen)


def test_the_prefix_without_a_slash_leads_to_the_pages(proxy: tuple[int, Backend]) -> None:
    port, _ = proxy
    response = ask(port, "GET", PREFIX)
    assert response.status in (301, 308)
    assert response.getheader("location") == f"{PREFIX}/"
