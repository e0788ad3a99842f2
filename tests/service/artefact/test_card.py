"""The contract of an artefact: a written artefact is accepted, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from builders import card_for, linear, random_groupsort, write
from onnx import TensorProto, helper
from pydantic import ValidationError

from service.artefact.card import (
    AcceptanceThreshold,
    Calibration,
    Card,
    ConformalQuantile,
    check_card,
    read_card,
    write_artefact,
    write_card,
)
from service.artefact.files import digest
from service.artefact.verification import verify
from service.errors import ArtefactError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "test", random_groupsort(0))
    return tmp_path / "test"


def _edit_card(folder: Path, **changes: object) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def accept(folder: Path) -> None:
    """Check an artefact as the server does."""
    findings = verify(folder)
    check_card(folder, read_card(folder), findings)


def test_a_written_artefact_is_accepted_with_the_findings_of_its_writer(tmp_path: Path) -> None:
    graphs = random_groupsort(0)
    written = write(tmp_path / "test", graphs)
    accept(tmp_path / "test")
    found = verify(tmp_path / "test")
    assert found.digest == written.digest == digest(graphs.model)
    assert (tmp_path / "test" / "model.onnx").read_bytes() == graphs.model
    np.testing.assert_array_equal(
        found.facts().certificate.margin_bounds_KK, written.facts().certificate.margin_bounds_KK
    )


def test_writing_leaves_no_other_file_behind(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "card.json"}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened as those of an artefact."""
    names: list[str] = []
    real = os.open

    def recording(path: Path, flags: int, mode: int = 0o777, **options: int) -> int:
        names.append(Path(path).name)
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", recording)
    return names


def test_each_file_is_read_once(folder: Path, opened: list[str]) -> None:
    accept(folder)
    assert sorted(opened) == ["card.json", "model.onnx"]


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
def test_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ArtefactError, match="missing") as caught:
        accept(folder)
    assert caught.value.file == folder / file


def test_one_changed_bit_is_noticed(folder: Path) -> None:
    file = "model.onnx"
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(ArtefactError, match="digest") as caught:
        accept(folder)
    assert caught.value.file == folder / file


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b"{}", b"\xff\xfe"])
def test_corrupt_card_is_refused(folder: Path, content: bytes) -> None:
    (folder / "card.json").write_bytes(content)
    with pytest.raises(ArtefactError, match="not a valid card"):
        accept(folder)


def test_unknown_card_field_is_named(folder: Path) -> None:
    _edit_card(folder, certified_acuracy=[])
    with pytest.raises(ArtefactError, match="certified_acuracy"):
        accept(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"graphs": {}}, "no digest"),
        ({"labels": ["a", "b"]}, "3 classes.*2 labels"),
        ({"labels": ["a", "b", "b"]}, "repeat"),
        ({"input": {"channels": 1, "height": 8, "width": 2}}, r"\(1, 4, 4\).*\(1, 8, 2\)"),
        ({"name": "../elsewhere"}, "name"),
        ({"format": 2}, "format"),
    ],
)
def test_card_that_contradicts_the_graphs_is_refused(folder: Path, change: dict[str, object], complaint: str) -> None:
    _edit_card(folder, **change)
    with pytest.raises(ArtefactError, match=complaint):
        accept(folder)


def test_graph_without_a_proof_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    graphs = linear(np.eye(2, 4), np.zeros(2), (1, 2, 2))
    image = helper.make_tensor_value_info("image", TensorProto.DOUBLE, ["N", 1, 2, 2])
    logits = helper.make_tensor_value_info("logits", TensorProto.DOUBLE, ["N", 1, 2, 2])
    graph = helper.make_graph([helper.make_node("Exp", ["image"], ["logits"])], "wild", [image], [logits])
    wild = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString()
    with pytest.raises(ArtefactError, match=r"no proved Lipschitz bound(?s:.*)Exp"):
        write_artefact(tmp_path / "test", card_for(graphs), wild)
    assert not (tmp_path / "test").exists()


def test_bytes_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        write_artefact(tmp_path / "test", card_for(random_groupsort(0)), b"\x00garbage")


def test_write_that_fails_half_way_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "card.json").read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_card(folder, read_card(folder).model_copy(update={"accuracy": 0.5}))
    assert (folder / "card.json").read_bytes() == before
    assert len(list(folder.iterdir())) == 2


def test_an_older_artefact_is_read_and_its_second_graph_is_not(folder: Path, opened: list[str]) -> None:
    (folder / "transport.onnx").write_bytes(b"of another network")
    card = read_card(folder)
    _edit_card(folder, graphs={**card.graphs, "transport.onnx": digest(b"of any network")})
    accept(folder)
    assert "model.onnx" in opened
    assert "transport.onnx" not in opened


def test_card_is_frozen_and_refuses_shares_above_one() -> None:
    card = card_for(random_groupsort(0))
    with pytest.raises(ValidationError):
        card.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Card.model_validate(card.model_dump() | {"accuracy": 98.3})


def calibration(model: str, *coverages: float) -> Calibration:
    return Calibration(
        model=model,
        n=50,
        source="drawn",
        quantiles=[ConformalQuantile(coverage=coverage, quantile=-coverage) for coverage in coverages],
        confidence=0.95,
        thresholds=[AcceptanceThreshold(radius=0.5, accepted=40, errors=1, error_bound=0.2)],
    )


def test_a_card_keeps_its_calibration_and_one_without_stays_readable(folder: Path) -> None:
    card = read_card(folder)
    assert card.calibration is None
    block = calibration(card.graphs["model.onnx"], 0.5, 0.9)
    write_card(folder, card.model_copy(update={"calibration": block}))
    assert read_card(folder).calibration == block
    accept(folder)
    written = json.loads((folder / "card.json").read_text())
    del written["calibration"]
    (folder / "card.json").write_text(json.dumps(written))
    assert read_card(folder) == card


def test_a_calibration_of_another_model_is_refused(folder: Path) -> None:
    _edit_card(folder, calibration=calibration(digest(b"another"), 0.9).model_dump())
    with pytest.raises(ArtefactError, match=r"calibration is about another model\.onnx"):
        read_card(folder)


@pytest.mark.parametrize("coverages", [(0.9, 0.5), (0.9, 0.9)])
def test_coverages_that_do_not_rise_are_refused(coverages: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="must rise"):
        calibration(digest(b""), *coverages)


def test_a_coverage_that_the_images_do_not_support_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"too few for the coverage 0\.9999"):
        calibration(digest(b""), 0.9, 0.9999)
