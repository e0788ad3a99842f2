"""The dashboard, the alert rules and their document name metrics and labels that the service really exposes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from client import Client
from encoding import npy
from prometheus_client.parser import text_string_to_metric_families

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "lipcert.json"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
OF_PROMETHEUS = {"job", "instance", "le"}


def expressions() -> list[str]:
    """Every query of the dashboard and of the rules."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(text for key, text in value.items() if key == "expr" or (key == "query" and "(" in str(text)))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(json.loads(DASHBOARD.read_text()))
    walk(yaml.safe_load(RULES.read_text()))
    return found


@pytest.fixture(scope="module")
def exposed(classifiers: Mapping[str, Classifier], runner: Any) -> dict[str, set[str]]:
    """Names of the labels of each sample, after requests of every kind."""
    client = Client(create_app(Settings(default_model="grey"), classifiers), runner)
    image, headers = npy(np.full((1, 4, 5), 0.5)), {"Content-Type": "application/x-npy"}
    assert client.post("/predict", content=image, headers=headers).status_code == 200
    params = {"counterfactual": "true"}
    assert client.post("/predict", params=params, content=image, headers=headers).status_code == 200
    assert client.get("/nothing").status_code == 404
    samples: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


@pytest.mark.parametrize("expression", expressions())
def test_a_query_names_metrics_and_labels_that_are_exposed(exposed: Mapping[str, set[str]], expression: str) -> None:
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
    names = set(re.findall(r"\b(?:lipcert|process|up)\w*", bare))
    assert names, expression
    assert names <= set(exposed), names - set(exposed)
    labels = set.union(*(exposed[name] for name in names)) | OF_PROMETHEUS
    used = {
        label for inside in re.findall(r"\{([^}]*)\}", bare) for label in re.findall(r"(\w+)\s*(?:=~|!=|=)", inside)
    }
    used |= {label.strip() for inside in re.findall(r"by \(([^)]*)\)", bare) for label in inside.split(",")}
    assert used <= labels, used - labels


def test_every_alert_has_its_place_in_the_document() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert all(f"`{rule['alert']}`" in page for rule in group["rules"])


def test_names_follow_the_conventions_of_prometheus(exposed: Mapping[str, set[str]]) -> None:
    own = {name for name in exposed if name.startswith("lipcert_")}
    assert not [name for name in own if re.search(r"_(ms|millis|mb|kb|percent)(_|$)", name)]
    assert {name for name in own if name.endswith("_created")} <= own
    for name in own:
        if "duration" in name:
            assert "_seconds" in name, name
