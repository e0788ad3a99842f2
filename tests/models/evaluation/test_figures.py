"""Figures: drawn for grey, RGB and degenerate sets; the shares they draw are counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot
from matplotlib.figure import Figure

from models.evaluation import figures
from models.evaluation.figures import Attacked, EarlierAttacks, Panel, Proved


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def panel(shape: tuple[int, int, int]) -> Panel:
    image, other, gradient = np.random.default_rng(0).random((3, *shape))
    return Panel(image, "cat", 0.5, 0.6, other, "dog", 0.75, gradient - 0.5, "dog")


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
    proved = Proved(np.array([True, False, True]), np.full(3, radius), np.full(3, 1.2 * radius))
    attacked = Attacked(proved.right_N[:2], proved.radius_N[:2], proved.best_N[:2], np.full(2, distance))
    earlier = EarlierAttacks(proved.right_N, proved.radius_N, proved.best_N, np.array([0.1, 0.2]), np.array([0.9, 0.8]))
    for name, known in (("with", attacked), ("earlier", earlier), ("without", None)):
        figures.plot_certified_accuracy(proved, known, [0.1] if known else [], tmp_path / f"{name}.png")
    figures.plot_radii(proved, tmp_path / "radii.png")
    figures.plot_tightness(attacked, tmp_path / "tightness.png")
    assert all(is_png(tmp_path / f"{name}.png") for name in ("with", "earlier", "without", "radii", "tightness"))


def curves(monkeypatch: pytest.MonkeyPatch, proved: Proved, attacked: Attacked | EarlierAttacks | None) -> list[str]:
    drawn: list[str] = []

    def save(figure: Figure, _: Path) -> None:
        drawn.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())  # type: ignore[union-attr]
        pyplot.close(figure)

    monkeypatch.setattr(figures, "_save", save)
    figures.plot_certified_accuracy(proved, attacked, [], Path("unused"))
    return drawn


def test_both_radii_are_drawn_with_and_without_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    proved = Proved(np.ones(3, np.bool_), np.full(3, 0.5), np.full(3, 0.6))
    attacked = Attacked(proved.right_N[:2], proved.radius_N[:2], proved.best_N[:2], np.ones(2))
    assert curves(monkeypatch, proved, None) == ["certified, with reference images, n = 3", "certified, fast, n = 3"]
    of_attacked = ["certified, with reference images, n = 2", "certified, fast, n = 2"]
    of_all = ["certified, with reference images, all n = 3", "certified, fast, all n = 3"]
    assert curves(monkeypatch, proved, attacked)[2:] == of_attacked + of_all
    sample = (attacked.right_N, attacked.radius_N, attacked.best_N)
    earlier = EarlierAttacks(*sample, np.array([0.1]), np.array([0.9]))
    assert curves(monkeypatch, proved, earlier)[1:] == of_attacked + of_all
