"""Certified shares count margins above epsilon times the declared constant of the pair."""

from __future__ import annotations

import torch

from models.nets.layers.sorting import GroupSort2
from models.nets.networks import LipschitzNetwork, dense_network
from models.training.scores import RunningScores, correct_within


def test_certified_share_counts_margins_above_epsilon_times_the_pairs_constant() -> None:
    logits = torch.tensor([[3.0, 0.0, -9.0], [3.0, 0.0, 2.9], [0.0, 3.0, 0.0]])
    labels = torch.tensor([0, 0, 0])
    bounds = torch.tensor([[0.0, 2.0, 0.5], [2.0, 0.0, 1.0], [0.5, 1.0, 0.0]])
    assert correct_within(logits, labels, bounds, 0.0).tolist() == [True, True, False]
    assert correct_within(logits, labels, bounds, 1.4).tolist() == [True, False, False]
    assert correct_within(logits, labels, bounds, 1.5).tolist() == [False, False, False]


def test_certified_share_of_one_output_is_its_absolute_value() -> None:
    network = LipschitzNetwork(
        (1, 1, 2), dense_network((1, 1, 2), (2,), 1).body, dense_network((1, 1, 2), (2,), 1).head
    )
    assert any(isinstance(layer, GroupSort2) for layer in network.modules())
    logits, labels = torch.tensor([[0.8], [-0.8], [0.3]]), torch.tensor([0, 1, 1])
    bounds = network.declared_margin_bounds_KK().detach()
    assert correct_within(logits, labels, bounds, 0.79).tolist() == [True, True, False]
    assert correct_within(logits, labels, bounds, 0.81).tolist() == [False, False, False]


def test_running_scores_are_those_of_all_images_since_the_last_reset() -> None:
    running = RunningScores((0.5,), torch.device("cpu"), classifies=True)
    running.add(9.0, torch.tensor([1, 1]), 1)
    running.reset()
    running.add(1.0, torch.tensor([3, 1]), 4)
    running.add(4.0, torch.tensor([0, 0]), 2)
    assert str(running) == "loss 2.0000, accuracy 50.00%, certified 16.67% at 0.5"
    resumed = RunningScores((0.5,), torch.device("cpu"), classifies=True)
    resumed.load_state_dict(running.state_dict())
    assert str(resumed) == str(running)


def test_network_that_does_not_classify_is_reported_by_its_loss_alone() -> None:
    running = RunningScores((), torch.device("cpu"), classifies=False)
    running.add(-3.0, None, 2)
    assert str(running) == "loss -3.0000"
