"""Verification: proof of the model, and both graphs run on the CPU; a fault is found, not raised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Graphs, dense, linear, random_groupsort, write, write_unverified
from fake_gpu import FakeGpu

from service.artefact.engines import probe
from service.artefact.verification import verify
from service.errors import ArtefactError
from service.runtime.engine import Engine


def test_findings_name_the_bytes_the_certificate_and_the_logits_of_the_probe(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(2, 4))
    graphs = linear(weight, np.array([0.5, -0.5]), (1, 2, 2))
    written = write(tmp_path, graphs)
    found = verify(tmp_path)
    assert found.fault is None
    assert found.digests == written.digests
    facts = found.facts()
    expected = weight @ probe(facts.certificate).ravel() + [0.5, -0.5]
    np.testing.assert_allclose(facts.logits_NK[0], expected, rtol=1e-14)


def test_a_graph_is_verified_on_the_cpu_even_where_a_gpu_will_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu().install(monkeypatch)
    write(tmp_path, random_groupsort(0))
    verify(tmp_path).facts()
    assert gpu.opened == []


@pytest.mark.parametrize(
    ("transport", "complaint"),
    [
        (random_groupsort(1).transport, "belongs to another network"),
        (dense([], (np.eye(3, 9), np.zeros(3)), (1, 3, 3)).transport, "cannot be run"),
        (random_groupsort(0).model, "must take `image` and `margin_weights`"),
        (b"garbage", "ONNX Runtime cannot run the graph"),
    ],
    ids=["another network", "another image size", "another interface", "garbage"],
)
def test_a_transport_graph_that_does_not_fit_is_a_fault_of_its_file(
    tmp_path: Path, transport: bytes, complaint: str
) -> None:
    ours = random_groupsort(0)
    write_unverified(tmp_path, Graphs(ours.model, transport, ours.shape, ours.n_outputs))
    found = verify(tmp_path)
    assert found.verified is None
    with pytest.raises(ArtefactError, match=complaint) as caught:
        found.facts()
    assert caught.value.file == tmp_path / "transport.onnx"


def test_a_missing_file_leaves_the_digests_of_those_that_were_read(tmp_path: Path) -> None:
    written = write(tmp_path, random_groupsort(0))
    (tmp_path / "transport.onnx").unlink()
    found = verify(tmp_path)
    assert found.digests == {"model.onnx": written.digest}
    with pytest.raises(ArtefactError, match="missing"):
        found.facts()


def test_logits_are_compared_as_both_graphs_compute_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, random_groupsort(0))
    run = Engine.run

    def drift(self: Engine, outputs: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = run(self, outputs, inputs)  # type: ignore[arg-type]
        return [result + (1e-3 if "margin_weights" in inputs else 0.0) for result in results]

    monkeypatch.setattr(Engine, "run", drift)
    assert "belongs to another network" in (verify(tmp_path).fault or (Path(), ""))[1]
