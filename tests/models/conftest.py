"""Set-up of the tests of the trainer and its evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

FIGURES = ("certified_accuracy", "radii", "tightness", "mistakes", "counterfactuals", "saliency")


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of a report empty: drawing them takes nine tenths of the evaluation of a small model."""
    from models.evaluation import figures

    def leave_empty(*arguments: object) -> None:
        path = arguments[-1]
        assert isinstance(path, Path)
        path.touch()

    for name in FIGURES:
        monkeypatch.setattr(figures, f"plot_{name}", leave_empty)
