"""The choice of an epoch by held-out images."""

from __future__ import annotations

from models.training.choice import BestEpoch, reachable
from models.training.scores import Scores

EPSILONS = (0.1, 0.5, 1.0)


def scores(accuracy: float, *certified: float) -> Scores:
    return Scores(accuracy, dict(zip(EPSILONS, certified, strict=True)))


def test_a_radius_is_reached_where_it_certifies_nine_of_ten_right_images() -> None:
    assert reachable(scores(0.8, 0.8, 0.75, 0.5), EPSILONS) == 0.5
    assert reachable(scores(0.8, 0.8, 0.7, 0.5), EPSILONS) == 0.1
    assert reachable(scores(0.8, 0.1, 0.0, 0.0), EPSILONS) == 0.1


def test_no_epoch_is_best_before_the_radius_is_chosen() -> None:
    best = BestEpoch(EPSILONS, from_epoch=1)
    assert not best.is_best(0, scores(1.0, 1.0, 1.0, 1.0), 0.1)
    assert best.is_best(1, scores(0.5, 0.5, 0.2, 0.0), 0.1)
    # The radius is 0.1 from now on, whatever is certified at others.
    assert not best.is_best(2, scores(0.5, 0.4, 0.4, 0.4), 0.1)
    assert best.is_best(3, scores(0.5, 0.6, 0.0, 0.0), 0.1)


def test_of_equal_epochs_the_later_is_best() -> None:
    best = BestEpoch(EPSILONS)
    assert [best.is_best(epoch, scores(1.0, 1.0, 1.0, 0.5), 0.1) for epoch in range(3)] == [True] * 3


def test_without_radii_the_smallest_loss_is_best() -> None:
    best = BestEpoch(())
    nothing = Scores(0.0, {})
    assert [best.is_best(epoch, nothing, loss) for epoch, loss in enumerate((0.5, 0.6, 0.4))] == [True, False, True]


def test_epochs_are_due_once_per_patience_and_not_before_there_is_a_best_one() -> None:
    best = BestEpoch(EPSILONS, from_epoch=2)
    due = []
    for epoch in range(12):
        best.is_best(epoch, scores(1.0, 1.0 - 0.01 * epoch, 0.0, 0.0), 0.1)
        due.append(best.due(epoch, 3))
    assert [epoch for epoch, is_due in enumerate(due) if is_due] == [5, 8, 11]


def test_the_choice_continues_from_a_checkpoint() -> None:
    first, second = BestEpoch(EPSILONS, from_epoch=0), BestEpoch(EPSILONS, from_epoch=0)
    assert first.is_best(0, scores(0.9, 0.9, 0.9, 0.0), 0.1)
    second.load_state_dict(first.state_dict())
    assert not second.is_best(1, scores(1.0, 1.0, 0.8, 0.8), 0.1)
    assert second.due(3, 3)
