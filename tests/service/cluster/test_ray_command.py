"""`lipcert ray up`: without Ray a clear message, with it a service until Ctrl-C."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
from commands import run_command
from encoding import npy
from ray_client import RayServer

from service.__main__ import main
from service.cluster import command


def test_without_ray_the_message_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert run_command(main, ["ray", "up"]).exit_code == 1
    assert caplog.messages == ["ray up needs Ray, which is not installed: `pip install 'lipcert[cpu,ray]'`"]


@pytest.mark.parametrize(
    "arguments", [["down"], [], ["up", "--replicas", "0"], ["up", "--replicas", "two"], ["up", "--port", "65536"]]
)
def test_invalid_arguments_end_it_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ray", *arguments])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("of_setting", [True, False])
def test_a_port_in_use_or_an_invalid_setting_ends_it_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, of_setting: bool
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command, "_served", lambda *_: pytest.fail("Ray was started"))
    # Put back afterwards: the command sets it.
    monkeypatch.setenv("LIPCERT_PORT", "0")
    monkeypatch.setenv("LIPCERT_CLIENT_SHARE", "1")
    monkeypatch.setenv("LIPCERT_HOST", "127.0.0.1")
    if of_setting:
        monkeypatch.setenv("LIPCERT_MAX_BATCH", "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_command(main, ["ray", "up", "--port", str(port)]).exit_code == (2 if of_setting else 1)
    assert ("LIPCERT_MAX_BATCH" if of_setting else f"port {port} of 127.0.0.1 is not available") in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed")
def test_ray_serves_until_it_is_interrupted(zoo: Path, grey_HW: np.ndarray) -> None:
    with RayServer({"models": zoo, "default_model": "grey", "provider": "cpu"}) as server:
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        headers = {"Content-Type": "application/x-npy", "X-Request-ID": "mine"}
        answer = httpx.post(f"{server.url}/predict", content=npy(grey_HW), headers=headers)
        assert answer.status_code == 200
        assert answer.json()["certificate"]["certified"]
        assert answer.headers["x-request-id"].split(", ")[0] == "mine"
        assert server.stop() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health/live")
