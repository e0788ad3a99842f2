"""Arguments of the Serve application, and its configurations for clusters; no Ray is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.cluster.options import Options, deployment_options, read_options, replica_settings
from service.errors import SettingsError
from service.settings import Settings, variable_names

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = yaml.safe_load((ROOT / "deploy" / "ray" / "serve.yml").read_text(encoding="utf-8"))
SERVICE = yaml.safe_load((ROOT / "deploy" / "ray" / "rayservice.yml").read_text(encoding="utf-8"))
EXTRA = re.search(r'^ray = \["ray\[serve\]==(\S+)"\]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"replica": 2}, "replica: Extra inputs"),
        ({"replicas": 0}, "replicas: "),
        ({"replicas": "many"}, "replicas: "),
        ({"cpus": float("nan")}, "cpus: "),
        ({"gpus": 2}, "gpus: "),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is below replicas, 3"),
    ],
)
def test_invalid_arguments_are_refused_by_name(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(reason)):
        read_options(given)


def test_replicas_are_fixed_unless_there_is_a_maximum() -> None:
    fixed = deployment_options(read_options({"replicas": 3}), Settings(provider="cpu"))
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    scaled = deployment_options(read_options({"replicas": 3, "max_replicas": 9}), Settings(provider="cpu"))
    assert scaled["autoscaling_config"] == {"min_replicas": 3, "max_replicas": 9, "target_ongoing_requests": 32.0}
    assert "num_replicas" not in scaled


@pytest.mark.parametrize(
    ("provider", "gpus", "expected"), [("cuda", None, 1.0), ("cuda", 0.25, 0.25), ("cpu", None, 0.0)]
)
def test_a_replica_has_the_share_of_a_gpu_that_its_provider_needs(
    provider: Any, gpus: float | None, expected: float
) -> None:
    found = deployment_options(Options(gpus=gpus), Settings(provider=provider))
    assert found["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": expected}


@pytest.mark.parametrize(("provider", "gpus"), [("cuda", 0.0), ("cpu", 0.5), ("auto", 0.5)])
def test_a_gpu_that_the_provider_does_not_use_is_refused(provider: Any, gpus: float) -> None:
    with pytest.raises(SettingsError, match="contradict each other"):
        deployment_options(Options(gpus=gpus), Settings(provider=provider))


def test_tls_of_the_server_is_refused() -> None:
    with pytest.raises(SettingsError, match="no effect on Ray"):
        deployment_options(Options(), Settings(tls_certificate=Path("a.pem"), tls_key=Path("a.key")))


def test_a_replica_is_one_process_with_the_threads_of_its_own_cpus() -> None:
    one = replica_settings(Settings(processes=4), 1)
    assert (one.processes, one.workers, one.threads) == (1, 1, 1)
    two = replica_settings(Settings(), 2)
    assert (two.workers, two.threads) == (2, 1)
    chosen = replica_settings(Settings(workers=3, threads=2), 1)
    assert (chosen.workers, chosen.threads) == (3, 2)


def test_more_requests_than_places_reach_the_replica_which_refuses_them() -> None:
    settings = Settings(max_requests=7, provider="cpu")
    assert deployment_options(Options(), settings)["max_ongoing_requests"] > settings.max_requests


def test_configuration_names_an_application_arguments_and_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    (application,) = CONFIGURATION["applications"]
    module, _, function = application["import_path"].partition(":")
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert re.search(rf"^def {function}\(", source.read_text(encoding="utf-8"), re.MULTILINE)
    variables = application["runtime_env"]["env_vars"]
    assert set(variables) <= set(variable_names())
    for name, value in variables.items():
        assert isinstance(value, str)
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert deployment_options(read_options(application["args"]), settings)["autoscaling_config"]["max_replicas"] == 8
    assert CONFIGURATION["http_options"]["request_timeout_s"] > settings.deadline_s


def test_kubernetes_deploys_the_same_configuration_on_the_version_of_the_extra() -> None:
    assert SERVICE["kind"] == "RayService"
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == CONFIGURATION
    cluster = SERVICE["spec"]["rayClusterConfig"]
    assert EXTRA is not None
    assert cluster["rayVersion"] == EXTRA[1]
    (group,) = cluster["workerGroupSpecs"]
    mounted = {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
    variables = CONFIGURATION["applications"][0]["runtime_env"]["env_vars"]
    assert mounted == {variables["LIPCERT_MODELS"], str(Path(variables["LIPCERT_API_KEYS_FILE"]).parent)}
