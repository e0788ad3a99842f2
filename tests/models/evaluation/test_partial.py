"""Parts of a measurement: found again under the same settings alone, and never half of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.evaluation.partial import PartialResults, digest_of


def measured(value: float) -> dict[str, np.ndarray]:
    return {"value": np.array([value, np.inf])}


def refuse() -> dict[str, np.ndarray]:
    pytest.fail("the part was kept")


def test_part_is_measured_once(tmp_path: Path) -> None:
    keep = PartialResults(tmp_path / "partial")
    assert keep.count() == 0
    assert keep.part({"attack": "a"}, lambda: measured(1.0))["value"].tolist() == [1.0, np.inf]
    assert keep.part({"attack": "a"}, refuse)["value"].tolist() == [1.0, np.inf]
    assert keep.count() == 1


def test_part_of_other_settings_is_measured_again(tmp_path: Path) -> None:
    keep = PartialResults(tmp_path)
    keep.part({"model": "sha256:1", "steps": 3}, lambda: measured(1.0))
    assert keep.part({"model": "sha256:2", "steps": 3}, lambda: measured(2.0))["value"][0] == 2.0
    assert keep.part({"model": "sha256:1", "steps": 4}, lambda: measured(3.0))["value"][0] == 3.0
    assert keep.part({"steps": 3, "model": "sha256:1"}, refuse)["value"][0] == 1.0


@pytest.mark.parametrize("length", [0, 20, 200])
def test_damaged_part_is_measured_again(tmp_path: Path, length: int) -> None:
    keep = PartialResults(tmp_path)
    keep.part({}, lambda: measured(1.0))
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:length])
    assert keep.part({}, lambda: measured(2.0))["value"][0] == 2.0
    assert keep.part({}, refuse)["value"][0] == 2.0


def test_interrupted_part_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> dict[str, np.ndarray]:
        raise KeyboardInterrupt

    keep = PartialResults(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        keep.part({}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_git_ignores_what_is_kept_and_it_can_be_discarded(tmp_path: Path) -> None:
    keep = PartialResults(tmp_path / "partial")
    keep.part({}, lambda: measured(1.0))
    assert (tmp_path / "partial" / ".gitignore").read_text() == "*\n"
    keep.discard()
    assert not (tmp_path / "partial").exists()
    keep.discard()


def test_digest_tells_contents_shapes_and_types_apart() -> None:
    zeros = np.zeros((2, 3))
    assert digest_of(zeros) == digest_of(np.zeros((3, 2)).T)
    assert len({digest_of(zeros), digest_of(zeros.T), digest_of(zeros.astype(np.float32)), digest_of(zeros + 1)}) == 4
