"""The import contracts of pyproject.toml hold, and each of them can fail."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from copy import deepcopy
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import grimp
import importlinter.configuration
import pytest
from importlinter.application import app_config, use_cases
from importlinter.application.user_options import UserOptions
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract
from importlinter.domain.contract import registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lipcert", "models", "service")


def run_contracts(folder: Path, contract: str | None = None) -> subprocess.CompletedProcess[str]:
    limit = () if contract is None else (contract,)
    code = (
        "import sys; from importlinter.cli import lint_imports; "
        f"sys.exit(lint_imports(limit_to_contracts={limit!r}, no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    for package in PACKAGES:
        for source in (ROOT / package).rglob("*.py"):
            target = tmp_path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_import_contracts_hold() -> None:
    result = run_contracts(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_contracts_hold_in_a_copy_without_a_planted_violation(copied_tree: Path) -> None:
    result = run_contracts(copied_tree)
    assert result.returncode == 0, result.stdout + result.stderr


PLANTED = [
    ("packages", "service/errors/__init__.py", "import lipcert.__main__"),
    ("packages", "models/recipes.py", "import lipcert"),
    ("one-command", "lipcert/__main__.py", "def f():\n    import service.settings"),
    ("one-command", "lipcert/__init__.py", "import models.__main__"),
    ("service-wings", "service/errors/__init__.py", "import service.runtime.engine"),
    ("service-wings", "service/settings.py", "import service.metrics"),
    ("service-wings", "service/runtime/engine.py", "import service.certificate.norms"),
    ("service-wings", "service/certificate/rounding.py", "import service.errors\nimport service.pixels.images"),
    ("service-wings", "service/pixels/images.py", "import service.artefact.card"),
    ("service-wings", "service/audit/verdict.py", "import service.inference.classifier"),
    ("service-wings", "service/inference/classifier.py", "def f():\n    from service.audit import audit"),
    ("service-wings", "service/inference/batching.py", "from service.api import schema"),
    ("service-wings", "service/api/app.py", "import service.processes.serving"),
    ("service-wings", "service/processes/serving.py", "import service.__main__"),
    ("service-wings", "service/unplaced.py", ""),
    ("service-wings", "service/access/keys.py", "import service.settings"),
    ("access-layers", "service/access/watch.py", "import service.access.keys"),
    ("access-layers", "service/access/unplaced.py", ""),
    ("api-layers", "service/api/schema.py", "import service.api.answers"),
    ("api-layers", "service/api/parsing.py", "def f():\n    from service.api import predict"),
    ("api-layers", "service/api/predict.py", "import service.api.openapi"),
    ("api-layers", "service/api/unplaced.py", ""),
    ("pixels-layers", "service/pixels/images.py", "import service.pixels.arrays"),
    ("pixels-layers", "service/pixels/distances.py", "from service.pixels import preprocessing"),
    ("pixels-layers", "service/pixels/unplaced.py", ""),
    ("certificate-layers", "service/certificate/rounding.py", "import service.certificate.norms"),
    ("certificate-layers", "service/certificate/rules/table.py", "import service.certificate.analysis"),
    ("certificate-layers", "service/certificate/unplaced.py", ""),
    ("certificate-layers", "service/certificate/matrices.py", "import service.certificate.joint"),
    ("certificate-rules-layers", "service/certificate/rules/table.py", "import service.certificate.rules.windows"),
    (
        "certificate-rules-layers",
        "service/certificate/rules/pooling.py",
        "import service.certificate.rules.convolution",
    ),
    ("certificate-rules-layers", "service/certificate/rules/operands.py", "import service.certificate.rules.squares"),
    ("certificate-rules-layers", "service/certificate/rules/unplaced.py", ""),
    ("certificate-alone", "service/certificate/rounding.py", "import service.errors"),
    ("certificate-alone", "service/certificate/rules/pooling.py", "def f():\n    import service.runtime.engine"),
    ("audit-on-its-own", "service/audit/verdict.py", "import service.certificate"),
    ("audit-on-its-own", "service/audit/verdict.py", "from service.certificate.radius import certified_radius"),
    ("audit-on-its-own", "service/audit/preprocessing.py", "import service.pixels.preprocessing"),
    ("audit-on-its-own", "service/audit/records.py", "from service.pixels import arrays"),
    ("audit-on-its-own", "service/audit/records.py", "from service.api.schema import PredictAnswer"),
    ("audit-on-its-own", "service/audit/graph.py", "def f():\n    import onnxruntime"),
    ("audit-on-its-own", "service/audit/images.py", "import service.pixels.distances"),
    ("audit-on-its-own", "service/audit/graph.py", "import service.network"),
    ("audit-on-its-own", "service/pixels/images.py", "import service.certificate.norms"),
    ("audit-layers", "service/audit/balls.py", "import service.audit.matrices"),
    ("audit-layers", "service/audit/network.py", "def f():\n    import service.audit.operators"),
    ("audit-layers", "service/audit/statements.py", "from service.audit.comparison import proof"),
    ("audit-layers", "service/audit/unplaced.py", ""),
    ("service-wings", "service/evidence/folder.py", "import service.api.schema"),
    ("service-wings", "service/audit/verdict.py", "import service.evidence.record"),
    ("evidence-layers", "service/evidence/record.py", "import service.evidence.page"),
    ("evidence-layers", "service/evidence/vectors.py", "def f():\n    import service.evidence.derivation"),
    ("evidence-layers", "service/evidence/document.py", "import service.evidence.page"),
    ("evidence-layers", "service/evidence/unplaced.py", ""),
    ("second-program", "service/evidence/check.py", "import service.certificate.norms"),
    ("second-program", "service/evidence/check.py", "def f():\n    import onnx"),
    ("inference-layers", "service/inference/queues.py", "def f():\n    import service.inference.workers"),
    ("inference-layers", "service/inference/workers.py", "from service.inference.batching import Batcher"),
    ("inference-layers", "service/inference/closest.py", "import service.inference.counterfactual"),
    ("inference-layers", "service/inference/unplaced.py", ""),
    ("network-layers", "service/network/operators.py", "import service.network.reader"),
    ("network-layers", "service/network/unplaced.py", ""),
    ("artefact-layers", "service/artefact/files.py", "import service.artefact.findings"),
    (
        "artefact-layers",
        "service/artefact/engines.py",
        "def f():\n    from service.artefact.verification import verify",
    ),
    ("artefact-layers", "service/artefact/card.py", "import service.artefact.pool"),
    ("artefact-layers", "service/artefact/unplaced.py", ""),
    ("runtime-layers", "service/runtime/driver.py", "import service.runtime.provider"),
    ("runtime-layers", "service/runtime/session.py", "import service.runtime.engine"),
    ("runtime-layers", "service/runtime/unplaced.py", ""),
    ("service-wings", "service/api/app.py", "import service.connection.protocol"),
    ("service-wings", "service/connection/protocol.py", "from service.processes import server"),
    ("service-wings", "service/client/clients.py", "import service.sheets.rows"),
    ("service-wings", "service/sheets/command.py", "import service.connection.limits"),
    ("client-layers", "service/client/errors.py", "import service.client.retries"),
    ("client-layers", "service/client/calls.py", "def f():\n    import service.client.parts"),
    ("client-layers", "service/client/unplaced.py", ""),
    ("client-alone", "service/client/images.py", "import service.pixels.images"),
    ("client-alone", "service/client/parts.py", "def f():\n    import service.api.parsing"),
    ("client-alone", "service/client/calls.py", "import onnx"),
    ("schema-alone", "service/api/schema.py", "import service.shapes"),
    ("schema-alone", "service/api/schema.py", "def f():\n    import numpy"),
    ("sheets-layers", "service/sheets/rows.py", "import service.sheets.writers"),
    ("sheets-layers", "service/sheets/remote.py", "def f():\n    import service.sheets.in_process"),
    ("sheets-layers", "service/sheets/unplaced.py", ""),
    ("service-wings", "service/sheets/command.py", "import service.bulk.work"),
    ("service-wings", "service/bulk/local.py", "import service.processes.prefork"),
    ("bulk-layers", "service/bulk/tables.py", "import service.bulk.work"),
    ("bulk-layers", "service/bulk/local.py", "from service.bulk import cluster"),
    ("bulk-layers", "service/bulk/unplaced.py", ""),
    ("connection-layers", "service/connection/heads.py", "import service.connection.reading"),
    ("connection-layers", "service/connection/registry.py", "from service.connection import reading"),
    ("connection-layers", "service/connection/unplaced.py", ""),
    ("service-wings", "service/processes/serving.py", "import service.cluster.options"),
    ("cluster-layers", "service/cluster/options.py", "import service.cluster.replica"),
    ("cluster-layers", "service/cluster/replica.py", "def f():\n    import service.cluster.ray"),
    ("service-wings", "service/rpc/calls.py", "import service.connection.limits"),
    ("rpc-layers", "service/rpc/messages.py", "import service.rpc.calls"),
    ("rpc-layers", "service/rpc/unplaced.py", ""),
    ("processes-layers", "service/processes/prefork.py", "import service.processes.serving"),
    ("processes-layers", "service/processes/prefork.py", "from service.processes import server"),
    ("processes-layers", "service/processes/unplaced.py", ""),
    ("service-without-training", "service/runtime/engine.py", "def f():\n    import torch"),
    ("service-without-training", "service/runtime/engine.py", "import models.data.published"),
    ("service-without-training", "service/certificate/rounding.py", "from models import data"),
    ("models-wings", "models/recipes.py", "import models.nets.networks"),
    ("models-wings", "models/nets/layers/linear.py", "import models.training.loop"),
    ("models-wings", "models/nets/networks.py", "import models.data.folders"),
    ("models-wings", "models/training/loop.py", "import models.export"),
    ("models-wings", "models/evaluation/page.py", "import models.runs"),
    ("models-wings", "models/unplaced.py", ""),
    ("data-layers", "models/data/labelled.py", "import models.data.datasets"),
    ("data-layers", "models/data/published.py", "def f():\n    import models.data.folders"),
    ("data-layers", "models/data/unplaced.py", ""),
    ("evaluation-layers", "models/evaluation/figures.py", "import models.evaluation.attacks"),
    ("evaluation-layers", "models/evaluation/libraries.py", "from models.evaluation import summary"),
    ("evaluation-layers", "models/evaluation/details.py", "import models.evaluation.page"),
    ("evaluation-layers", "models/evaluation/unplaced.py", ""),
    ("training-layers", "models/training/loop.py", "from models.training import processes"),
    ("training-layers", "models/training/checkpoints.py", "def f():\n    import models.training.loop"),
    ("training-layers", "models/training/progress.py", "import models.training.checkpoints"),
    ("training-layers", "models/training/history.py", "import models.training.progress"),
    ("training-layers", "models/training/losses.py", "import models.training.objective"),
    ("training-layers", "models/training/unplaced.py", ""),
    ("nets-layers", "models/nets/onnx_graph.py", "import models.nets.layers.base"),
    ("nets-layers", "models/nets/layers/linear.py", "import models.nets.networks"),
    ("nets-layers", "models/nets/unplaced.py", ""),
    ("kinds-of-layers", "models/nets/layers/base.py", "import models.nets.layers.linear"),
    ("kinds-of-layers", "models/nets/layers/sorting.py", "import models.nets.layers.reshaping"),
    ("kinds-of-layers", "models/nets/layers/unplaced.py", ""),
    ("models-and-service", "models/data/published.py", "from service import settings"),
    ("models-and-service", "models/unplaced.py", "import service.metrics"),
    ("models-and-service", "models/export.py", "import service.inference.classifier"),
    ("models-and-service", "models/export.py", "import service.evidence.document"),
    ("models-and-service", "models/evaluation/page.py", "import service.evidence.page"),
    ("models-and-service", "models/nets/layers/base.py", "import service.network.operators"),
    ("models-and-service", "models/evaluation/measure.py", "import service.settings"),
    ("models-and-service", "models/evaluation/measure.py", "import service.api.schema"),
]
"""Contract, module, and the lines that break the contract when they are appended to the module."""


def test_every_contract_has_a_planted_violation() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = [contract["id"] for contract in configuration["tool"]["importlinter"]["contracts"]]
    assert len(contracts) == len(set(contracts))
    assert {contract for contract, _, _ in PLANTED} == set(contracts)


END_TO_END = [
    ("audit-on-its-own", "service/audit/verdict.py", "from service.certificate.radius import certified_radius"),
    ("service-without-training", "service/runtime/engine.py", "def f():\n    import torch"),
    ("models-wings", "models/unplaced.py", ""),
]
"""Some of `PLANTED`, one of each form."""


@pytest.mark.parametrize(("contract", "module", "planted"), END_TO_END)
def test_planted_violation_is_found_by_the_command(copied_tree: Path, contract: str, module: str, planted: str) -> None:
    assert (contract, module, planted) in PLANTED
    path = copied_tree / module
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before}\n{planted}\n", encoding="utf-8")
    result = run_contracts(copied_tree, contract)
    assert result.returncode != 0, result.stdout
    assert "BROKEN" in result.stdout, result.stdout + result.stderr


@pytest.fixture(scope="module")
def options() -> UserOptions:
    importlinter.configuration.configure()
    registry.register(ForbiddenContract, "forbidden")
    registry.register(LayersContract, "layers")
    return use_cases.read_user_options(str(ROOT / "pyproject.toml"))


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)


def plant(graph: grimp.ImportGraph, importer: str, text: str) -> None:
    """Add a module and its imports to a graph, as if the text were appended to its file."""
    graph.add_module(importer)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported = [name if name in graph.modules else str(node.module) for name in names]
        else:
            continue
        for name in imported:
            is_ours = name.split(".")[0] in PACKAGES
            assert name in graph.modules or not is_ours, name
            if name not in graph.modules:
                graph.add_module(name, is_squashed=True)
            graph.add_import(importer=importer, imported=name)


def broken_contracts(options: UserOptions, graph: grimp.ImportGraph, contract: str) -> list[str]:
    """Return the name of a contract that a graph breaks, or nothing."""
    builder = SimpleNamespace(build=lambda **_: graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_config.settings, "GRAPH_BUILDER", builder)
        report = use_cases.create_report(options, (contract,))
    assert not report.invalid_contract_options
    assert len(report.contracts) == 1
    return [one.name for one, check in report.get_contracts_and_checks() if not check.kept]


@pytest.mark.parametrize(("contract", "module", "planted"), PLANTED)
def test_planted_violation_breaks_its_contract(
    options: UserOptions, imports: grimp.ImportGraph, contract: str, module: str, planted: str
) -> None:
    path = Path(module)
    assert (ROOT / path).exists() or path.stem == "unplaced"
    graph = deepcopy(imports)
    plant(graph, ".".join((path.parent if path.name == "__init__.py" else path.with_suffix("")).parts), planted)
    assert len(broken_contracts(options, graph, contract)) == 1


@pytest.mark.parametrize("contract", sorted({contract for contract, _, _ in PLANTED}))
def test_contract_holds_in_the_graph_without_a_planted_violation(
    options: UserOptions, imports: grimp.ImportGraph, contract: str
) -> None:
    assert broken_contracts(options, imports, contract) == []


def test_no_modules_of_a_package_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    packages = {module for module in graph.modules if graph.find_children(module)}
    assert {"service", "service.certificate", "models.nets"} <= packages
    circles = {package: graph.nominate_cycle_breakers(package) for package in packages}
    assert {package: imports for package, imports in circles.items() if imports} == {}


def test_certificate_needs_numpy_and_onnx_only() -> None:
    graph = grimp.build_graph("service", include_external_packages=True, cache_dir=None)
    imported = {
        name
        for module in {"service.certificate", *graph.find_descendants("service.certificate")}
        for name in graph.find_modules_directly_imported_by(module)
        if not name.startswith("service")
    }
    # google.protobuf: the errors of onnx's own parser.
    assert imported - sys.stdlib_module_names <= {"numpy", "onnx", "google"}


def test_everything_that_service_imports_is_in_the_lock_of_make_serve() -> None:
    graph = grimp.build_graph("service", include_external_packages=True, cache_dir=None)
    third_party = {module for module in graph.modules if graph.is_module_squashed(module)} - sys.stdlib_module_names
    assert "numpy" in third_party
    # The extra `client`.
    assert graph.find_modules_that_directly_import("httpx") == {"service.client.clients"}
    # The extra `grpc`.
    assert graph.find_modules_that_directly_import("grpc") == {"service.rpc.calls", "service.rpc.server"}
    # The extra `heic`.
    assert graph.find_modules_that_directly_import("pillow_heif") == {"service.pixels.heif"}
    third_party -= {"grpc", "httpx", "pillow_heif"}
    lock = (ROOT / "requirements/serve-cpu.txt").read_text(encoding="utf-8")
    locked = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    locked.add("onnxruntime-gpu")  # takes the place of onnxruntime in serve-gpu.txt
    providers = packages_distributions()
    missing = {
        module
        for module in third_party
        if not locked & {name.lower().replace("_", "-") for name in providers.get(module.split(".")[0], [])}
    }
    assert missing == set()


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    found = [
        path
        for folder in (*PACKAGES, "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if drawers & {path.stem, path.parent.name}
    ]
    assert found == []


WATCHED_IMPORT = """
import json, sys
seen = []
def watch(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".onnx", "card.json")):
        seen.append(f"opened {arguments[0]}")
    elif event in ("socket.bind", "socket.connect", "subprocess.Popen", "os.fork"):
        seen.append(event)
sys.addaudithook(watch)
import service.api.app
import threading
seen += [f"thread {thread.name}" for thread in threading.enumerate() if thread is not threading.main_thread()]
print(json.dumps({"seen": seen, "modules": sorted(name for name in sys.modules if "." not in name)}))
"""


def test_nothing_happens_when_the_app_is_imported() -> None:
    # An impossible setting: whoever read the environment at import would fail.
    environment = {**os.environ, "LIPCERT_PROVIDER": "none", "LIPCERT_MODELS": "/nowhere"}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WATCHED_IMPORT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["seen"] == []
    assert not {"torch", "models", "matplotlib", "foolbox", "scipy"} & set(answer["modules"])
