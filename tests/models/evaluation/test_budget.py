"""Attacks end when their time is used up; the images attacked until then are spread over the test set."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import numpy as np
import pytest
from builders import load, random_groupsort

pytest.importorskip("foolbox")
pytest.importorskip("torch")

from models.evaluation import attacks, budget
from models.evaluation.attacks import AttackResult
from models.evaluation.budget import Attacked, attack_within, duration, groups_of, spread_order

IMAGES = np.random.default_rng(0).integers(0, 256, (50, 1, 4, 4)) / 255


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_every_beginning_of_the_order_is_spread_over_all_images(n: int) -> None:
    order = spread_order(n)
    assert sorted(order.tolist()) == list(range(n))
    for taken in range(2, n + 1):
        gaps = np.diff(np.sort(order[:taken]), prepend=0, append=n)
        assert gaps.max() <= 4 * n / taken + 1


@pytest.mark.parametrize("n", [1, 3, 9, 50])
def test_groups_begin_small_and_hold_every_image_once(n: int) -> None:
    groups = groups_of(n)
    assert np.concatenate(groups).tolist() == spread_order(n).tolist()
    assert [len(group) for group in groups] == {1: [1], 3: [1, 1, 1], 9: [1, 1, 2, 4, 1]}.get(
        n, [1, 1, 2, 4, 8, 8, 8, 8, 8, 2]
    )


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """Radii of the images of each group; an image takes 1.25 s, and an image is flipped at ten times its radius."""
    attacked: list[list[float]] = []
    now = 0.0

    def run_attacks(_: Any, image_NCHW: np.ndarray, best_N: np.ndarray, **__: Any) -> list[AttackResult]:
        nonlocal now
        now += 1.25 * len(best_N)
        attacked.append(best_N.tolist())
        return [AttackResult(name, "none", {}, 10 * best_N, best_N / 2, best_N) for name in ("A", "B")]

    monkeypatch.setattr(attacks, "run_attacks", run_attacks)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    return attacked


def within(seconds: float | None) -> Attacked:
    return attack_within(load(random_groupsort(0)), IMAGES, np.arange(50.0), seconds)


@pytest.mark.parametrize(("seconds", "count"), [(0.1, 1), (5.0, 4), (10.0, 8), (19.0, 8), (1e6, 50)])
def test_group_starts_only_if_its_time_is_left_and_the_first_always(
    groups: list[list[float]], seconds: float, count: int
) -> None:
    found = within(seconds)
    assert len(found.index_M) == count
    assert found.seconds == 1.25 * count
    assert [len(group) for group in groups] == [len(group) for group in groups_of(50)][: len(groups)]
    assert found.index_M.tolist() == sorted(found.index_M.tolist())
    assert [result.name for result in found.results] == ["A", "B"]
    for result in found.results:
        assert result.best_N.tolist() == found.index_M.tolist()
        assert result.distance_N.tolist() == (10.0 * found.index_M).tolist()
        assert result.radius_N.tolist() == (found.index_M / 2).tolist()


def test_without_a_budget_all_images_are_attacked_at_once(groups: list[list[float]]) -> None:
    assert within(None).index_M.tolist() == list(range(50))
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("seconds", "message"), [(None, "attacks on 50 images: about .*--n-attack"), (30.0, "within --attack-seconds 30")]
)
def test_estimate_is_logged_before_the_attacks_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: float | None, message: str
) -> None:
    caplog.set_level(logging.INFO)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attacks, "run_attacks", stop)
    with pytest.raises(KeyboardInterrupt):
        within(seconds)
    assert len([record for record in caplog.records if record.name == budget.__name__]) == 1
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (99.0, "99 s"), (150.0, "2 min"), (5400.0, "90 min"), (9000.0, "2.5 h")]
)
def test_duration_has_the_unit_that_reads_best(seconds: float, text: str) -> None:
    assert duration(seconds) == text
