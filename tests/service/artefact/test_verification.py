"""Verification: proof of the model, and the graphs written from it run on the CPU; a fault is found, not raised."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from builders import linear, random_groupsort, write
from fake_gpu import FakeGpu

from service.artefact.engines import probe
from service.artefact.verification import verify
from service.errors import ArtefactError
from service.network.graphs import forward_graph
from service.network.reader import read
from service.runtime.engine import Engine


def test_findings_name_the_bytes_the_certificate_and_the_logits_of_the_probe(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(2, 4))
    graphs = linear(weight, np.array([0.5, -0.5]), (1, 2, 2))
    written = write(tmp_path, graphs)
    found = verify(tmp_path)
    assert found.fault is None
    assert found.digest == written.digest
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


def test_a_missing_file_is_a_fault_without_a_digest(tmp_path: Path) -> None:
    found = verify(tmp_path)
    assert found.read_digest is None
    for stated in (found.facts, lambda: found.digest):
        with pytest.raises(ArtefactError, match="missing"):
            stated()


def test_both_graphs_are_pieces_of_the_file(tmp_path: Path) -> None:
    network = random_groupsort(0, width=32)
    write(tmp_path, network)
    facts = verify(tmp_path).facts()
    for splice, written in ((facts.forward, forward_graph(read(network.model))), (facts.gradient, network.gradient)):
        content = written if isinstance(written, bytes) else written.content
        assert splice.join(network.model) == content
        assert len(pickle.dumps(splice)) < len(content) / 2


def test_logits_beside_a_gradient_are_those_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, random_groupsort(0))
    run = Engine.run

    def drift(self: Engine, outputs: object, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        results = run(self, outputs, inputs)  # type: ignore[arg-type]
        return [result + (1e-9 if "margin_weights" in inputs else 0.0) for result in results]

    monkeypatch.setattr(Engine, "run", drift)
    assert "computes other logits beside a gradient" in (verify(tmp_path).fault or (Path(), ""))[1]
