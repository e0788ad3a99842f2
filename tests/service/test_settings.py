from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import SettingsError
from service.settings import Settings, read_settings, threads_of, variable_names


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("LIPCERT_"):
            monkeypatch.delenv(name)


def test_the_contract_holds_without_any_variable() -> None:
    settings = read_settings()
    assert (settings.port, settings.default_model, settings.provider) == (8000, "mnist", "auto")
    assert settings.models == Path(__file__).resolve().parents[2] / "models" / "zoo"


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIPCERT_HOST", "0.0.0.0")
    monkeypatch.setenv("LIPCERT_PORT", "9001")
    monkeypatch.setenv("LIPCERT_MODELS", str(tmp_path))
    monkeypatch.setenv("LIPCERT_PROVIDER", "cpu")
    settings = read_settings()
    assert (settings.host, settings.port, settings.models) == ("0.0.0.0", 9001, tmp_path)


def test_the_only_model_is_the_default_one_unless_another_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIPCERT_MODELS", str(tmp_path))
    assert read_settings().default_model == "mnist"
    for name in ("cells", ".hidden", "_old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "card.json").touch()
    assert read_settings().default_model == "cells"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "card.json").touch()
    assert read_settings().default_model == "mnist"
    (tmp_path / "other" / "card.json").unlink()
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "mnist")
    assert read_settings().default_model == "mnist"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_every_setting_is_documented() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("LIPCERT_PROT", "LIPCERT_PORT"), ("LIPCERT_MAX_PIXEL", "LIPCERT_MAX_PIXELS"), ("lipcert_hosts", "LIPCERT_HOST")],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_known_name(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"{name} .* did you mean {nearest}"):
        read_settings()


def test_a_variable_like_no_other_is_refused_with_the_known_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPCERT_QQQQQQ", "1")
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert all(name in str(caught.value) for name in variable_names())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LIPCERT_PORT", "eighty"),
        ("LIPCERT_PORT", "70000"),
        ("LIPCERT_PROVIDER", "gpu"),
        ("LIPCERT_MAX_BODY_BYTES", "0"),
        ("LIPCERT_MAX_PIXELS", "1000000000"),
        ("LIPCERT_THREADS", "-1"),
        ("LIPCERT_PROCESSES", "-1"),
        ("LIPCERT_PROCESSES", "257"),
        ("LIPCERT_LOG_LEVEL", "loud"),
        ("LIPCERT_GPU_MEMORY_BYTES", "-1"),
        ("LIPCERT_RATE_PER_KEY", "-1"),
        ("LIPCERT_RATE_BURST", "0"),
        ("LIPCERT_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("LIPCERT_TRUSTED_PROXIES", "127.0.0.1, proxy"),
        ("LIPCERT_CORS_ORIGINS", "https://example.org/path"),
        ("LIPCERT_CORS_ORIGINS", "example.org"),
    ],
)
def test_an_invalid_value_is_refused_in_one_line_that_names_variable_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings()
    assert str(caught.value).startswith(f"{name}={value!r} is not valid: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", variable_names())
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = Settings()
    monkeypatch.setenv(name, "")
    assert read_settings() == expected


def test_an_empty_variable_that_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPCERT_THREAD", "")
    with pytest.raises(SettingsError, match="did you mean LIPCERT_THREADS"):
        read_settings()


def service_links(service: str, protocol: str = "tcp") -> dict[str, str]:
    """Variables of Kubernetes for a service of this name with two ports, `http` and 9000."""
    upper = protocol.upper()
    ports = {
        f"{service}_PORT_{port}_{upper}{suffix}": value
        for port in (8000, 9000)
        for suffix, value in (
            ("", f"{protocol}://10.96.0.7:{port}"),
            ("_PROTO", protocol),
            ("_PORT", str(port)),
            ("_ADDR", "10.96.0.7"),
        )
    }
    return {
        f"{service}_SERVICE_HOST": "10.96.0.7",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_PORT": f"{protocol}://10.96.0.7:8000",
        **ports,
    }


@pytest.mark.parametrize("service", ["LIPCERT", "LIPCERT_GPU", "LIPCERT_2"])
@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_variables_that_kubernetes_sets_for_a_service_are_ignored_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, service: str, protocol: str
) -> None:
    links, expected = service_links(service, protocol), Settings(threads=3)
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LIPCERT_THREADS", "3")
    assert read_settings() == expected
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "enableServiceLinks: false" in record.getMessage()
    assert all(name in record.getMessage() for name in links)


def test_a_port_that_was_chosen_stays_beside_the_variables_of_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (service_links("LIPCERT") | {"LIPCERT_PORT": "9001"}).items():
        monkeypatch.setenv(name, value)
    assert read_settings().port == 9001


@pytest.mark.parametrize(
    ("name", "value"),
    [("LIPCERT_SERVICE", "x"), ("LIPCERT_PORT_8000", "1"), ("LIPCERT_GPU_PORT", "80"), ("LIPCERT_HOST_TCP", "tcp")],
)
def test_a_variable_that_only_looks_like_one_of_kubernetes_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} is not a setting"):
        read_settings()


@pytest.mark.parametrize("processes", [0, 1, 2, 3, 16])
@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 12, 64])
def test_processes_workers_and_threads_share_the_cpus_and_never_ask_for_more(cpus: int, processes: int) -> None:
    threads = threads_of(Settings(processes=processes), cpus)
    assert threads.processes == (processes or cpus)
    assert min(threads.workers, threads.inference) >= 1
    assert threads.processes * threads.workers * threads.inference <= max(cpus, threads.processes)
