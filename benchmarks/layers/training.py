"""Train one row of the comparison at the common budget, prove its exported graph, measure it.

Everything but the parametrisation and its learning rate is shared: images and their order, loss, epochs, schedule,
seed. The learning rate is the one with the best certified accuracy on images held out from the training set, each
candidate after a short run; no test image takes part in the choice. Certified accuracies come from the proved bounds.

Axes: N batch, C H W image, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layers.networks import ADAM, CONVOLUTIONAL, DENSE, Method
from models.data import DataSet, LabelledImages
from models.datasets import load_dataset
from models.losses import margin_cross_entropy_loss
from models.networks import LipschitzNetwork
from models.onnx_graph import GraphBuilder
from models.optimisers import optimisers_of
from models.recipes import DataOptions, Schedule
from models.training import Batch, ImageBatches, generator_for
from service.certificate import certified_radius, certify

WARM_UP = 0.2
MOST_RATES = 5
ROUNDS = 15
AT_ONCE = 500
"""Test images in one batch."""
PROBES = 2
"""Images on which graph and folded network are compared."""


@dataclass(frozen=True)
class Budget:
    """What all rows of a table share."""

    name: str
    dataset: str
    methods: tuple[Method, ...]
    train_images: int
    held_out: int
    short_images: int
    """Of the one epoch for each candidate learning rate."""
    epochs: int
    batch_size: int
    min_margin: float
    temperature: float
    epsilons: tuple[float, ...]
    """The second one chooses the learning rate."""
    names: tuple[str, ...]
    """How the epsilons are written."""


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget("dense", "fashion-mnist", DENSE, 55_000, 5_000, 20_000, 4, 512, 0.8, 0.2, (0.25, 0.5, 1.0),
               ("0.25", "0.5", "1.0")),
        Budget("convolutional", "cifar10", CONVOLUTIONAL, 20_000, 2_000, 10_000, 3, 256, 0.4, 0.15,
               (36 / 255, 72 / 255, 108 / 255), ("36/255", "72/255", "108/255")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What was measured of one network."""

    method: str
    seed: int
    epochs: int
    rate: float
    tried: dict[str, float]
    """Learning rate -> certified accuracy at the second epsilon, on the images held out, after the short run."""
    parameters: int
    multiply_adds: int
    seconds: float
    """Processor seconds of the training."""
    proved_bound: float
    """Of the map before the head: the largest `K_ij / ||w_i - w_j||`, from the exported graph."""
    slope: float
    """Median over the first `AT_ONCE` test images of `||grad (f_i - f_j)|| / K_ij` for the two largest logits."""
    logit_error: float
    accuracy: float
    """Share that is right, with a positive radius."""
    certified: list[float]
    held_out: float
    """Certified accuracy at the second epsilon on the images held out."""
    n: int


def images_of(budget: Budget, directory: Path) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """Training, held-out and test images; the same for all rows."""
    found: DataSet = load_dataset(DataOptions(dataset=budget.dataset), directory)
    held_out, rest = found.train.stratified(budget.held_out, generator_for(0, 7))
    if budget.train_images < len(rest):
        rest, _ = rest.stratified(budget.train_images, generator_for(0, 8))
    return rest, held_out, found.test


def trained(
    method: Method, budget: Budget, images: LabelledImages, rate: float, epochs: int, seed: int
) -> tuple[LipschitzNetwork, float]:
    """A network after `epochs` of one cycle, and the processor seconds that took."""
    torch.manual_seed(seed)
    network = method.build().train()
    adam = ADAM[len(ADAM) // 2] if method.on_manifold else rate
    schedule = Schedule(epochs=epochs, learning_rate=adam, rotation_rate=rate, warm_up=WARM_UP)
    batches = ImageBatches(images, budget.batch_size, seed, None)
    steps = epochs * batches.steps_per_epoch
    optimisers = optimisers_of(network, schedule)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimiser, optimiser.param_groups[0]["lr"], total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
        )
        for optimiser in optimisers
    ]
    started = time.process_time()
    for epoch in range(epochs):
        for step in range(batches.steps_per_epoch):
            _step(network, batches.batch(epoch, step), budget, optimisers)
            for scheduler in schedulers:
                scheduler.step()
    return network.eval(), time.process_time() - started


def _step(network: LipschitzNetwork, batch: Batch, budget: Budget, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    pixels, labels = batch
    loss = margin_cross_entropy_loss(
        network(pixels), labels, min_margin=budget.min_margin, temperature=budget.temperature
    )
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()


def step_seconds(budget: Budget, images: LabelledImages) -> dict[str, list[float]]:
    """Processor seconds of one training step of each method, `ROUNDS` of each.

    The methods take turns, so that what else the machine does meets all of them alike.
    """
    running: list[tuple[Method, LipschitzNetwork, list[torch.optim.Optimizer]]] = []
    for method in budget.methods:
        torch.manual_seed(0)
        network = method.build().train()
        # The rates only have to be harmless.
        running.append((method, network, optimisers_of(network, Schedule(epochs=1, learning_rate=1e-4))))
    batches = ImageBatches(images, budget.batch_size, 0, None)
    seconds: dict[str, list[float]] = {method.name: [] for method in budget.methods}
    for round_ in range(ROUNDS + 1):
        for method, network, optimisers in running:
            batch = batches.batch(0, round_ % batches.steps_per_epoch)
            started = time.process_time()
            _step(network, batch, budget, optimisers)
            if round_:  # the first one warms up
                seconds[method.name].append(time.process_time() - started)
    return seconds


def chosen_rate(
    method: Method, budget: Budget, images: LabelledImages, held_out: LabelledImages, say: Callable[[str], None]
) -> tuple[float, dict[str, float]]:
    """The candidate that certifies most held-out images after one epoch of `short_images`.

    Where the largest or smallest candidate is best, its double or half is tried as well, up to `MOST_RATES` in all.
    """
    short, _ = images.stratified(budget.short_images, generator_for(0, 9))
    tried: dict[float, float] = {}
    waiting = list(method.rates)
    while waiting:
        rate = waiting.pop(0)
        network, seconds = trained(method, budget, short, rate, 1, seed=0)
        tried[rate] = Proof(network).certified(held_out, budget.epsilons)[1] if is_finite(network) else 0.0
        say(f"{method.name}: rate {rate:g} certifies {tried[rate]:.2%} in {seconds:.1f} s")
        best = max(tried, key=lambda rate: tried[rate])
        if not waiting and len(tried) < MOST_RATES:
            waiting = [2 * best] if best == max(tried) else [best / 2] if best == min(tried) else []
    return best, {f"{rate:g}": tried[rate] for rate in sorted(tried)}


def is_finite(network: LipschitzNetwork) -> bool:
    """Whether training diverged: Newton-Schulz turns large steps into infinities."""
    with torch.no_grad():
        probe = network(torch.zeros(1, *network.input_shape))
    return bool(torch.isfinite(probe).all()) and all(bool(torch.isfinite(p).all()) for p in network.parameters())


class Proof:
    """A folded network and the certificate of its graph.

    Args:
        network: trained.

    Raises:
        UnsupportedGraphError: the certifier has no bound.
        RuntimeError: the graph computes something else than the folded network.
    """

    def __init__(self, network: LipschitzNetwork) -> None:
        self.folded = network.fold()
        content = forward_graph(self.folded)
        self.certificate = certify(content)
        image = torch.rand(PROBES, *network.input_shape, dtype=torch.float64, generator=generator_for(0, 10))
        (found,) = ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"image": image.numpy()})
        with torch.no_grad():
            difference = float(np.abs(found - self.folded(image).numpy()).max())
        # Each side is a float64 evaluation in some order, within logit_error of the exact value.
        if not difference <= 2 * self.certificate.logit_error:
            raise RuntimeError(f"the graph differs from the network by {difference}")

    def certified(self, images: LabelledImages, epsilons: Sequence[float]) -> list[float]:
        """Share of the images that are right with a radius above each epsilon; 0 asks for a positive one."""
        parts = [images.at(slice(start, start + AT_ONCE)) for start in range(0, len(images), AT_ONCE)]
        with torch.no_grad():
            logits_NK = np.concatenate([self.folded(part.pixels(torch.float64)).numpy() for part in parts])
        radii = certified_radius(logits_NK, self.certificate.margin_bounds_KK, self.certificate.logit_error)
        right_N = radii.class_id_N == images.labels_N.numpy()
        return [float((right_N & (radii.radius_N > epsilon)).mean()) for epsilon in epsilons]

    def body_bound(self) -> float:
        """The largest `K_ij / ||w_i - w_j||`."""
        rows = self.folded.head.weight()
        distance_KK = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        different = ~np.eye(len(rows), dtype=bool)
        return float((self.certificate.margin_bounds_KK[different] / distance_KK[different]).max())

    def slope(self, images: LabelledImages) -> float:
        """Median over images of `||grad (f_i - f_j)|| / K_ij`, i and j the two largest logits."""
        pixels = images.pixels(torch.float64).requires_grad_()
        largest = self.folded(pixels).topk(2, dim=1)
        (gradient,) = torch.autograd.grad((largest.values[:, 0] - largest.values[:, 1]).sum(), pixels)
        norm_N = gradient.flatten(1).norm(dim=1).numpy()
        first, second = largest.indices.T.numpy()
        return float(np.median(norm_N / self.certificate.margin_bounds_KK[first, second]))


def forward_graph(folded: LipschitzNetwork) -> bytes:
    """The ONNX bytes of a folded network, in float64."""
    graph = GraphBuilder("model")
    hidden, _ = folded.body.emit(graph, graph.input("image", folded.input_shape))
    logits, _ = folded.head.emit(graph, hidden)
    return graph.build({"logits": logits})


def multiply_adds(network: LipschitzNetwork) -> int:
    """Multiply-adds of one image in a forward pass, weights as given."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *network.input_shape, dtype=torch.float64))
    return counter.get_total_flops() // 2


def measured(
    method: Method,
    budget: Budget,
    directory: Path,
    seed: int,
    epochs: int,
    say: Callable[[str], None],
    like: Row | None = None,
) -> Row:
    """Choose the rate, or take that of `like`; train, fold, prove, measure on the whole test set."""
    images, held_out, test = images_of(budget, directory)
    rate, tried = (like.rate, like.tried) if like else chosen_rate(method, budget, images, held_out, say)
    network, seconds = trained(method, budget, images, rate, epochs, seed)
    proof = Proof(network)
    accuracy, *certified = proof.certified(test, (0.0, *budget.epsilons))
    return Row(
        method=method.name,
        seed=seed,
        epochs=epochs,
        rate=rate,
        tried=tried,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=multiply_adds(proof.folded),
        seconds=seconds,
        proved_bound=proof.body_bound(),
        slope=proof.slope(test.at(slice(AT_ONCE))),
        logit_error=proof.certificate.logit_error,
        accuracy=accuracy,
        certified=certified,
        held_out=proof.certified(held_out, budget.epsilons)[1],
        n=len(test),
    )
