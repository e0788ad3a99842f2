"""Whoever measures an artefact runs it as the server does: the same verification, engine and session options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from builders import card_for, load, random_groupsort

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from models import export  # noqa: E402
from models.data.labelled import DataSet, LabelledImages  # noqa: E402
from models.evaluation import measure  # noqa: E402
from models.nets.networks import dense_network  # noqa: E402
from service.artefact.card import write_artefact  # noqa: E402
from service.inference.loading import load_classifiers  # noqa: E402
from service.settings import Settings  # noqa: E402

ATTRIBUTES = (
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "enable_mem_reuse",
    "execution_mode",
    "graph_optimization_level",
    "inter_op_num_threads",
    "use_deterministic_compute",
)
ENTRIES = ("session.intra_op.allow_spinning", "session.set_denormal_as_zero")


def images(n: int) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)
    return LabelledImages(torch.from_numpy(pixels), torch.arange(n) % 3)


def write(folder: Path) -> Path:
    graphs = random_groupsort(0)
    data = {"name": "MNIST", "options": {"dataset": "mnist", "classes": ["0", "1", "2"]}}
    card = card_for(graphs, folder.name).model_copy(
        update={"labels": ["0", "1", "2"], "data": data, "recipe": {"epsilons": [0.1]}}
    )
    write_artefact(folder, card, graphs.model)
    return folder


def serve(folder: Path) -> None:
    classifiers = load_classifiers(Settings(models=folder.parent, default_model=folder.name, provider="cpu"))
    classifiers[folder.name].warm_up()


def evaluate(folder: Path) -> None:
    measure.evaluate(folder, Path("unused"), attacks=False, provider="cpu")


def export_again(folder: Path) -> None:
    export.export_artefact(
        dense_network((1, 4, 4), (8,), 3),
        folder.parent / "exported",
        labels=["0", "1", "2"],
        lipschitz_constant=1.0,
        test=images(600),
        epsilons=(0.1,),
        data={},
        recipe={"loss": {}},
        seed=0,
        wall_time_s=1.0,
    )


def build_for_a_test(_: Path) -> None:
    load(random_groupsort(0))


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of each session that is made, but for the number of threads."""
    made: list[dict[str, Any]] = []
    session = onnxruntime.InferenceSession

    def record(graph: bytes, sess_options: onnxruntime.SessionOptions, **options: Any) -> onnxruntime.InferenceSession:
        assert isinstance(graph, bytes)
        made.append(
            {
                **options,
                **{name: getattr(sess_options, name) for name in ATTRIBUTES},
                **{name: sess_options.get_session_config_entry(name) for name in ENTRIES},
            }
        )
        return session(graph, sess_options=sess_options, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    return made


@pytest.mark.usefixtures("without_drawing")
@pytest.mark.parametrize(
    ("run", "count"),
    # A verification runs both graphs, and so does a classifier; the exporter compares both, measures the model, and
    # verifies before it writes.
    [(evaluate, 4), (export_again, 5), (build_for_a_test, 6)],
)
def test_session_options_are_those_of_the_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sessions: list[dict[str, Any]],
    run: Callable[[Path], None],
    count: int,
) -> None:
    folder = write(tmp_path / "small")
    monkeypatch.setattr(measure, "load_dataset", lambda *_, **__: DataSet(images(1), images(12), ("0", "1", "2")))
    serve(folder)
    assert sessions
    served = sessions[0]
    assert served["graph_optimization_level"] != onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert all(session == served for session in sessions)
    sessions.clear()
    run(folder)
    assert len(sessions) == count
    assert all(session == served for session in sessions)


def test_figures_of_an_export_are_those_of_the_served_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.inference.classifier import Classifier

    export_again(tmp_path / "small")
    classifier, test = Classifier.load(tmp_path / "exported", "cpu", 1), images(600)
    _, radii = classifier.classify(test.pixels(torch.float64).numpy())
    right_N = radii.class_id_N == test.labels_N.numpy()
    card = classifier.card
    assert card.accuracy == right_N.mean()
    assert [entry.value for entry in card.certified_accuracy] == [(right_N & (radii.radius_N > 0.1)).mean()]


def test_artefact_without_a_proof_is_not_measured(tmp_path: Path) -> None:
    from service.errors import ArtefactError

    folder = write(tmp_path / "small")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="digest"):
        evaluate(folder)
