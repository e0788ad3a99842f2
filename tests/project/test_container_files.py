"""Dockerfile, docker-compose.yml and their neighbours promise what the README says; no engine is needed to see it."""

import json
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import certificates
import pytest
import yaml

from service.runtime.driver import CUDA_VERSION
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CONTAINER_OWNS = {"host", "port", "models", "provider"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name.upper(), " ".join(arguments.split()))
        for name, _, arguments in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (what it starts from, its instructions), in order."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    current: list[tuple[str, str]] = []
    for name, arguments in instructions():
        if name == "FROM":
            origin, stage = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()  # pyright: ignore
            current = []
            found[stage] = (origin, current)
        else:
            current.append((name, arguments))
    return found


def lineage(stage: str) -> list[tuple[str, str]]:
    """Instructions of a stage after those of the stages it starts from."""
    every = stages()
    origin, own = every[stage]
    return (lineage(origin) if origin in every else []) + own


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def test_dockerfile_builds_where_nothing_but_the_base_image_can_be_pulled() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "syntax=" not in text
    assert "--link" not in text
    assert instructions()[0] == ("ARG", "BASE_IMAGE=python:3.11-slim")
    every = stages()
    assert {origin for origin, _ in every.values()} <= {"${BASE_IMAGE}", *every}
    sources = re.findall(r"--from=(\S+)", text)
    assert set(sources) <= set(every)


def test_cpu_and_gpu_are_targets_and_cpu_is_the_default() -> None:
    names = list(stages())
    assert "gpu" in names
    assert names[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_runs_as_a_numeric_user_that_is_not_root(target: str) -> None:
    users = [arguments for name, arguments in lineage(target) if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_states_port_entry_and_labels(target: str) -> None:
    own = dict(lineage(target))
    assert own["EXPOSE"] == "8000"
    assert json.loads(own["ENTRYPOINT"]) == ["python", "-m", "service"]
    assert "org.opencontainers.image.title" in own["LABEL"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_reports_to_nobody(target: str) -> None:
    variables = " ".join(arguments for name, arguments in lineage(target) if name == "ENV").split()
    assert "ORT_DISABLE_TELEMETRY=1" in variables


def test_gpu_image_starts_on_no_driver_that_is_too_old_for_its_libraries() -> None:
    required = f"NVIDIA_REQUIRE_CUDA=cuda>={CUDA_VERSION // 1000}.{CUDA_VERSION % 1000 // 10}"
    variables = {
        target: " ".join(arguments for name, arguments in lineage(target) if name == "ENV").split()
        for target in ("cpu", "gpu")
    }
    assert required in variables["gpu"]
    assert not any("NVIDIA" in variable for variable in variables["cpu"])


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_takes_the_lock_of_its_target_and_nothing_else(target: str) -> None:
    copied = [arguments for name, arguments in lineage(target) if name == "COPY"]
    assert copied == [f"--from=venv-{target} /opt/venv /opt/venv", "--from=app /app /app"]
    installs = [arguments for name, arguments in lineage(f"venv-{target}") if name == "RUN" and "install" in arguments]
    assert len(installs) == 1
    assert "--require-hashes" in installs[0]
    assert re.findall(r"-r (\S+)", installs[0]) == [f"/build/serve-{target}.txt"]
    assert [arguments for name, arguments in lineage("app") if name == "COPY"] == [
        "service service",
        "models/zoo models/zoo",
    ]


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[HTTPServer, list[str], dict[str, str]]]:
    """A server, the paths that it was asked for, and the settings of the container."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(type(self).status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        settings = {"LIPCERT_PORT": str(http_server.server_port)}
        if request.param == "https":
            (tmp_path / "pem").write_text(certificates.FIRST + certificates.FIRST_KEY)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "pem")
            http_server.socket = context.wrap_socket(http_server.socket, server_side=True)
            settings["LIPCERT_TLS_CERTIFICATE"] = "/run/pem"
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield http_server, paths, settings
        http_server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_healthcheck_follows_readiness(
    server: tuple[HTTPServer, list[str], dict[str, str]], status: int, healthy: bool
) -> None:
    http_server, paths, settings = server
    http_server.RequestHandlerClass.status = status  # pyright: ignore
    _, _, command = dict(lineage("cpu"))["HEALTHCHECK"].partition(" CMD ")
    program, *arguments = json.loads(command)
    assert program == "python"
    result = subprocess.run(
        [sys.executable, *arguments],
        env=settings,
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert paths == ["/health/ready"]
    assert (result.returncode == 0) is healthy, result.stderr


def test_build_context_holds_only_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert allowed == {"requirements/serve-*.txt", "service", "models/zoo"}


def test_plain_compose_up_starts_the_cpu_service() -> None:
    text = (ROOT / ".env").read_text(encoding="utf-8")
    settings = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert settings == ["COMPOSE_PROFILES=cpu"]
    assert {name: service["profiles"] for name, service in compose()["services"].items()} == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
    }
    # Without the file a fresh clone would start nothing.
    assert ".env" not in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_service_is_confined(profile: str) -> None:
    service = compose()["services"][profile]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert service["ports"] == ["${BIND_ADDRESS:-127.0.0.1}:${LIPCERT_PORT:-8000}:8000"]
    assert service["cpus"] == "${CPUS:-1}"
    assert service["pids_limit"] == "${PIDS:-1024}"
    assert service["mem_limit"] == ("${MEMORY:-2g}" if profile == "cpu" else "${MEMORY:-8g}")
    assert service["build"]["target"] == profile
    assert service["build"]["args"] == {"BASE_IMAGE": "${BASE_IMAGE:-python:3.11-slim}"}
    assert "user" not in service
    assert "privileged" not in service


def test_only_the_gpu_profile_reserves_a_gpu() -> None:
    services = compose()["services"]
    assert "deploy" not in services["cpu"]
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert services["cpu"]["environment"]["LIPCERT_PROVIDER"] == "cpu"
    assert services["gpu"]["environment"]["LIPCERT_PROVIDER"] == "cuda"


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_setting_reaches_the_container(profile: str) -> None:
    passed = compose()["services"][profile]["environment"]
    assert {name for name, value in passed.items() if value is None} == {
        f"LIPCERT_{field.upper()}" for field in Settings.model_fields if field not in CONTAINER_OWNS
    }
