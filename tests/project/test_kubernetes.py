"""The chart and the manifests of `deploy` fit the service; `make manifests` renders them and checks their schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import iter_route_contexts

from service import __version__
from service.api.app import create_app
from service.inference.classifier import Classifier
from service.metrics import Metrics
from service.settings import Settings, variable_names

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "lipcert"
KSERVE = DEPLOY / "kserve"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
FILES = {
    str(path.relative_to(DEPLOY)): path.read_text(encoding="utf-8")
    for folder in (CHART, KSERVE)
    for path in sorted(folder.rglob("*"))
    if path.is_file()
}


def containers(value: Any) -> list[dict[str, Any]]:
    """Every container in a manifest."""
    if isinstance(value, list):
        return [found for inner in value for found in containers(inner)]
    if not isinstance(value, dict):
        return []
    return value.get("containers", []) + [found for inner in value.values() for found in containers(inner)]


def of_kserve() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(KSERVE.glob("*.yaml"))]


@pytest.mark.parametrize("name", FILES)
def test_every_setting_exists(name: str) -> None:
    # LIPCERT_* stands for all of them.
    named = set(re.findall(r"\bLIPCERT_[A-Z0-9_]*[A-Z0-9]\b", FILES[name]))
    assert named <= set(variable_names())


def test_a_setting_that_the_chart_sets_from_other_values_cannot_be_set_twice() -> None:
    refused = set(SCHEMA["properties"]["settings"]["propertyNames"]["not"]["enum"])
    owned = set(re.findall(r"name: (LIPCERT_\w+)", FILES["helm/lipcert/templates/_container.tpl"]))
    assert owned | {"LIPCERT_HOST", "LIPCERT_PORT", "LIPCERT_API_KEYS"} == refused
    assert not refused & set(VALUES["settings"])


def test_defaults_of_settings_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VALUES["settings"].items():
        monkeypatch.setenv(name, str(value))
    assert Settings().client_share == 1.0
    for manifest in of_kserve():
        for container in containers(manifest):
            variables = {variable["name"]: variable["value"] for variable in container["env"]}
            for name in variables.keys() & set(variable_names()):
                monkeypatch.setenv(name, variables[name])
            port = int(variables["LIPCERT_PORT"])
            assert Settings().port == port == container["ports"][0]["containerPort"]


def test_probes_ask_paths_that_exist(classifiers: Mapping[str, Classifier]) -> None:
    app = create_app(Settings(default_model="grey"), classifiers)
    paths = {context.path for context in iter_route_contexts(app.routes)}
    asked = {path for text in FILES.values() for path in re.findall(r"\bpath: (/[\w/]+),", text)}
    assert {"/health/live", "/health/ready"} == asked
    assert asked <= paths
    scraped = {path for text in FILES.values() for path in re.findall(r"\b(?:path|/path): (/metrics)\b", text)}
    assert scraped <= paths
    assert scraped


def test_the_autoscaler_and_its_adapter_name_a_metric_that_is_exposed() -> None:
    exposed = re.findall(r"^# TYPE (\w+) gauge$", Metrics().exposition().decode(), re.MULTILINE)
    (scaled,) = re.findall(r"metric: \{name: (\w+)\}", FILES["helm/lipcert/templates/autoscaler.yaml"])
    (rule,) = yaml.safe_load((DEPLOY / "prometheus" / "adapter.yml").read_text(encoding="utf-8"))["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == scaled
    assert scaled in exposed


def test_rules_and_dashboard_have_one_source() -> None:
    sources = {"rules.yml": DEPLOY / "prometheus" / "rules.yml", "dashboard.json": DEPLOY / "grafana" / "lipcert.json"}
    for name, source in sources.items():
        assert (CHART / "files" / name).samefile(source)
        assert f'Files.Get "files/{name}"' in FILES["helm/lipcert/templates/monitoring.yaml"]


def test_the_schema_has_the_values_and_refuses_others() -> None:
    def compare(values: dict[str, Any], schema: dict[str, Any]) -> None:
        assert schema["additionalProperties"] is False
        assert set(values) == set(schema["properties"]) - {"global", "claims"}
        for name, inner in schema["properties"].items():
            if "properties" in inner and name in values:
                compare(values[name], inner)

    compare(VALUES, SCHEMA)


def test_the_chart_has_the_version_of_the_service() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == __version__


def test_kserve_fetches_one_folder_for_the_predictor_and_the_explainer() -> None:
    service, runtime = of_kserve()
    predictor, explainer = service["spec"]["predictor"], service["spec"]["explainer"]
    variables = {variable["name"]: variable["value"] for variable in explainer["containers"][0]["env"]}
    of_runtime = {variable["name"]: variable["value"] for variable in containers(runtime)[0]["env"]}
    assert variables["STORAGE_URI"] == predictor["model"]["storageUri"]
    assert variables["LIPCERT_DEFAULT_MODEL"] == service["metadata"]["name"]
    assert variables == of_runtime | {name: variables[name] for name in ("STORAGE_URI", "LIPCERT_DEFAULT_MODEL")}
    assert predictor["model"]["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert predictor["model"]["protocolVersion"] in runtime["spec"]["protocolVersions"]
