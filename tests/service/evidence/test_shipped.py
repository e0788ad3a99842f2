"""The evidence folder of a shipped model; `make evidence` does the same for all of them."""

from __future__ import annotations

from pathlib import Path

from service.evidence.folder import write_evidence

ZOO = Path(__file__).resolve().parents[3] / "models" / "zoo"


def test_the_second_program_accepts_the_folder_of_a_shipped_model(tmp_path: Path) -> None:
    verdict = write_evidence(ZOO / "mnist-0-8", tmp_path / "folder")
    assert verdict.accepted, verdict.line
    assert "17 nodes, 4 norms" in verdict.line
