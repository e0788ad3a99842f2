"""`python -m service`: a failed start is one line and an exit status, and a signal ends it cleanly."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import builders
import numpy as np
import onnx
import pytest
from process_table import children_of, is_running, wait_until

from service.__main__ import main
from service.artefact.card import digest


@pytest.fixture(autouse=True)
def process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, without_settings: None) -> Iterator[None]:
    monkeypatch.setenv("LIPCERT_PORT", "0")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.captureWarnings(False)


@pytest.fixture
def copy(zoo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo, tmp_path / "zoo"))


def only_error(caplog: pytest.LogCaptureFixture) -> str:
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert errors[0].exc_info is None
    return errors[0].getMessage()


def test_a_misspelt_setting_ends_it_with_status_2(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LIPCERT_MODEL", "x")
    assert main([]) == 2
    assert only_error(caplog) == "LIPCERT_MODEL is not a setting of this server; did you mean LIPCERT_MODELS?"


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("LIPCERT_API_KEYS", "ci predict", "LIPCERT_API_KEYS, line 1: it has 2 words"),
        ("LIPCERT_API_KEYS", ";", "LIPCERT_API_KEYS has no key"),
        ("LIPCERT_API_KEYS_FILE", "/nowhere/keys", "LIPCERT_API_KEYS_FILE='/nowhere/keys' cannot be read"),
        ("LIPCERT_TLS_KEY", "/nowhere/key", "LIPCERT_TLS_CERTIFICATE and LIPCERT_TLS_KEY belong together"),
    ],
)
def test_access_that_cannot_be_controlled_ends_it_with_status_2(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, fault: str
) -> None:
    monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert only_error(caplog).startswith(fault)


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "empty"])
def test_a_missing_or_damaged_file_of_the_default_model_ends_it_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, copy: Path, file: str, damage: str
) -> None:
    broken = copy / "grey" / file
    content = broken.read_bytes()
    broken.unlink()
    if damage != "missing":
        broken.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"")
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "grey")
    monkeypatch.setenv("LIPCERT_MODELS", str(copy))
    assert main([]) == 1
    assert only_error(caplog).startswith(f"{broken}: ")


def test_a_default_model_without_a_proof_ends_it_and_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, copy: Path
) -> None:
    model_file, card_file = copy / "grey" / "model.onnx", copy / "grey" / "card.json"
    model = onnx.load(model_file)
    for node in model.graph.node:
        if node.output[0] == "logits":
            node.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Exp", ["before"], ["logits"], name="growth"))
    model_file.write_bytes(model.SerializeToString())
    card = json.loads(card_file.read_text())
    card["graphs"]["model.onnx"] = digest(model_file.read_bytes())
    card_file.write_text(json.dumps(card))
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "grey")
    monkeypatch.setenv("LIPCERT_MODELS", str(copy))
    assert main([]) == 1
    message = only_error(caplog)
    assert message.startswith(f"{model_file}: ")
    assert "Exp" in message


def test_two_artefacts_with_the_name_of_the_default_model_end_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, copy: Path
) -> None:
    graphs = builders.linear(np.ones((2, 4)), np.zeros(2), (1, 2, 2))
    builders.write(copy / "another", graphs, "grey")
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "grey")
    monkeypatch.setenv("LIPCERT_MODELS", str(copy))
    assert main([]) == 1
    assert "the name 'grey' is taken" in only_error(caplog)


def test_in_strict_mode_any_broken_model_ends_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, copy: Path
) -> None:
    (copy / "colour" / "model.onnx").unlink()
    monkeypatch.setenv("LIPCERT_MODELS", str(copy))
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "grey")
    monkeypatch.setenv("LIPCERT_STRICT", "1")
    assert main([]) == 1
    assert only_error(caplog).startswith(f"{copy / 'colour' / 'model.onnx'}: ")


def test_an_unknown_default_model_ends_it_with_status_2(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, zoo: Path
) -> None:
    monkeypatch.setenv("LIPCERT_MODELS", str(zoo))
    monkeypatch.setenv("LIPCERT_DEFAULT_MODEL", "gray")
    assert main([]) == 2
    assert "'gray'" in only_error(caplog)
    assert "binary, colour, grey" in only_error(caplog)


def test_a_port_in_use_ends_it_before_any_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("LIPCERT_PORT", str(port))
        assert main([]) == 1
    assert re.match(rf"port {port} of 127.0.0.1 is not available \(.*in use\); .* set LIPCERT_PORT", only_error(caplog))


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fly"])
    assert stopped.value.code == 2
    assert "serve" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_says_so_and_stops_on_a_signal_with_status_0(zoo: Path, stop: signal.Signals) -> None:
    environment = {**os.environ, "LIPCERT_MODELS": str(zoo), "LIPCERT_DEFAULT_MODEL": "grey"}
    command = [sys.executable, "-m", "service"]
    log: list[str] = []
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            url = None
            for line in process.stderr:
                log.append(line)
                found = re.search(r"serving on (http://\S+)", line)
                url = found[1] if found else url
                if "startup complete" in line:
                    break
            assert url is not None, "".join(log)
            with urllib.request.urlopen(f"{url}/health/ready", timeout=10) as response:
                assert response.status == 200
            process.send_signal(stop)
            log += process.stderr.readlines()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert not any("Traceback" in line for line in log)
    for name in ("grey", "colour", "binary"):
        assert any(name in line and "CPUExecutionProvider" in line for line in log)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_models_are_proved_ends_it_at_once_with_status_0(tmp_path: Path, stop: signal.Signals) -> None:
    builders.write(tmp_path / "large", builders.random_groupsort(0, shape=(1, 24, 24), width=400, depth=4))
    environment = {**os.environ, "LIPCERT_MODELS": str(tmp_path)}
    command = [sys.executable, "-m", "service"]
    # A group of its own, to which a terminal would send its Ctrl-C.
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        try:
            wait_until(lambda: children_of(process.pid) != [])
            started = children_of(process.pid)
            os.killpg(process.pid, stop)
            assert process.stderr is not None
            log = process.stderr.read()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert log == ""
    assert not any(is_running(pid) for pid in started)


def test_a_signal_during_the_import_of_an_extension_module_ends_it_after_that_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported: list[str] = []

    class Loader(ExtensionFileLoader):
        def exec_module(self, module: ModuleType) -> None:
            signal.raise_signal(signal.SIGTERM)
            imported.append(module.__name__)

    def load() -> None:
        Loader("extension", "extension.so").exec_module(ModuleType("extension"))
        time.sleep(10)
        imported.append("everything")

    monkeypatch.setattr("service.settings.read_settings", load)
    assert main([]) == 0
    assert imported == ["extension"]


@pytest.mark.parametrize("failure", [ImportError, BaseException])
def test_a_signal_that_other_code_takes_for_a_failure_ends_it_with_status_0(
    monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    def load() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit as stopped:
            raise failure("initialization failed") from stopped

    monkeypatch.setattr("service.settings.read_settings", load)
    assert main([]) == 0
