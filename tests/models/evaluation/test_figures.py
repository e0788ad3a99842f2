"""Figures: drawn for grey, RGB and degenerate sets; the shares they draw are counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from models.evaluation import figures
from models.evaluation.figures import Attacked, Panel


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def panel(shape: tuple[int, int, int]) -> Panel:
    image, other, gradient = np.random.default_rng(0).random((3, *shape))
    return Panel(image, "cat", 0.5, other, "dog", 0.75, gradient - 0.5, "dog")


def test_shares_count_right_images_beyond_epsilon() -> None:
    right, radius = np.array([True, True, False, True]), np.array([0.0, 1.0, 5.0, 2.0])
    assert figures.share_beyond(right, radius, np.array([0.0, 1.0, 3.0])).tolist() == [50.0, 25.0, 0.0]
    assert figures.share_beyond(right, np.full(4, np.inf), np.array([9.0])).tolist() == [75.0]


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 5), (2, 4, 4)])
@pytest.mark.parametrize("columns", [1, 3])
def test_galleries_are_drawn_for_any_number_of_channels(
    tmp_path: Path, shape: tuple[int, int, int], columns: int
) -> None:
    figures.plot_counterfactuals([panel(shape)] * columns, tmp_path / "counterfactuals.png")
    figures.plot_saliency([panel(shape)] * columns, tmp_path / "saliency.png")
    assert is_png(tmp_path / "counterfactuals.png")
    assert is_png(tmp_path / "saliency.png")


@pytest.mark.parametrize("radius", [0.0, 0.3])
@pytest.mark.parametrize("distance", [0.4, np.inf])
def test_curves_are_drawn_where_nothing_is_certified_or_found(tmp_path: Path, radius: float, distance: float) -> None:
    right_N, radius_N = np.array([True, False, True]), np.full(3, radius)
    attacked = Attacked(right_N[:2], radius_N[:2], np.full(2, distance))
    figures.plot_certified_accuracy(right_N, radius_N, attacked, [0.1], tmp_path / "with.png")
    figures.plot_certified_accuracy(right_N, radius_N, None, [], tmp_path / "without.png")
    figures.plot_radii(right_N, radius_N, tmp_path / "radii.png")
    figures.plot_tightness(attacked, tmp_path / "tightness.png")
    assert all(is_png(tmp_path / f"{name}.png") for name in ("with", "without", "radii", "tightness"))
