"""Mutants of the certifier: each is caught by the checks of `test_random_graphs`.

A mutant replaces one step of a proof by a plausible mistake. The seeds of its search are fixed, so that the
graph that refutes it is the same everywhere; without the mutation the same graph is certified rightly.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from exact_matrices import exceeds_norm
from graph_checks import Bounds, error_findings, lipschitz_findings, runnable
from random_graphs import Graph, seeded_graph

from service.certificate import (
    analysis,
    convolutions,
    descent,
    facts,
    joint,
    kernels,
    matrices,
    norms,
    rounding,
    torus,
    values,
)
from service.certificate.rules import (
    activations,
    arithmetic,
    blocks,
    convolution,
    linear,
    operands,
    piecewise,
    pooling,
    products,
    rearrangements,
    reductions,
    resizing,
    selections,
    squares,
    table,
    windows,
)
from service.network import operators

RULES = (
    *(activations, arithmetic, blocks, convolution, linear, operands),
    *(piecewise, pooling, products, rearrangements, reductions),
    *(resizing, selections, squares, table, windows),
)
MODULES = (analysis, convolutions, descent, facts, joint, kernels, matrices, norms, torus, values, *RULES)
Patch = pytest.MonkeyPatch


def everywhere(patch: Patch, name: str, function: Callable[..., Any], *modules: ModuleType) -> None:
    """Replace `name` in all modules that know it."""
    known = [module for module in modules or MODULES if hasattr(module, name)]
    assert known, name
    for module in known:
        patch.setattr(module, name, function)


class Numpy:
    """numpy with some functions replaced."""

    def __init__(self, **replaced: Callable[..., Any]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def power_iteration(matrix_MN: np.ndarray) -> float:
    """20 steps: a lower bound of the spectral norm, however good it looks."""
    vector = 1.0 + 0.5 * np.cos(2.399963 * np.arange(matrix_MN.shape[1]))
    for _ in range(20):
        vector = matrix_MN.conj().T @ (matrix_MN @ vector)
        size = np.linalg.norm(vector)
        if size == 0.0:
            return 0.0
        vector = vector / size
    return float(np.linalg.norm(matrix_MN @ vector))


def torus_by_power_iteration(kernel: np.ndarray, torus: Any, window: Any = None) -> float:
    wrapped = np.zeros((*kernel.shape[:2], *torus))
    for tap in np.ndindex(*kernel.shape[2:]):
        place = tuple(t % n for t, n in zip(tap, torus, strict=True))
        wrapped[(slice(None), slice(None), *place)] += kernel[(slice(None), slice(None), *tap)]
    symbols = np.fft.fftn(wrapped, axes=tuple(range(2, wrapped.ndim))).reshape(*kernel.shape[:2], -1)
    return max(power_iteration(symbols[..., f]) for f in range(symbols.shape[-1]))


def circular_of_the_image(kernel: np.ndarray, torus: Any, window: Any = None) -> float:
    return convolutions_torus(kernel, torus if window is None else window)


convolutions_torus = convolutions.torus_norm_bound
certified = analysis._certificate
image = analysis._image
composed = kernels.compose_kernels
gradient_step = joint.Joint.gradient_step
period = convolution._period
activated = activations._activated
mul_up = rounding.mul_up


def without_error(*arguments: Any) -> Any:
    return replace(certified(*arguments), logit_error=0.0)


def exact_image(context: Any, graph: Any) -> Any:
    return context.source(image(context, graph).center, facts.Facts(lipschitz=1.0, error=0.0))


def zero_wins(*factors: float) -> float:
    return 0.0 if 0.0 in factors else mul_up(*factors)


def borders_forgotten(outer: Any, inner: Any, *rest: Any) -> Any:
    return inner if kernels._is_identity(outer) else composed(outer, inner, *rest)


def without_deviation(compose: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any) -> Any:
        kernel = compose(*arguments)
        return None if kernel is None else replace(kernel, deviation=0.0)

    return made


def kernels_without_deviation(patch: Patch) -> None:
    for name in ("compose_kernels", "add_kernels"):
        everywhere(patch, name, without_deviation(getattr(kernels, name)))


def negative_weights(patch: Patch) -> None:
    def fitted(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return (first * last).sum(axis=0) / np.maximum((first * first).sum(axis=0), 1e-9)

    patch.setattr(descent, "_least_squares", fitted)
    patch.setattr(descent, "np", Numpy(sqrt=lambda v: np.sqrt(np.abs(v)), max=lambda v, **_: np.max(np.abs(v))))


def any_mean_centres(left: Any, right: Any) -> bool:
    step = right.source.step
    return step is not None and step.mean and step.operands[0].source is left.source


def parts_in_turn() -> Callable[..., Any]:
    signs = itertools.cycle([False, True])
    return lambda of, negative: values.Part(of, next(signs))


@dataclass(frozen=True)
class Mutant:
    first: int
    """The first seed of the search, near one that refutes the mutant."""
    name: str
    mutate: Callable[[Patch], None]
    steps: tuple[str, ...]
    most: int = 1
    of_errors: bool = False

    def __str__(self) -> str:
        return self.name


SLOPED = (piecewise, activations)
SPATIAL = ("conv", "same_conv", "periodic_conv")


def step_with_constants(view: values.View, factor: float) -> values.LinearStep:
    return replace(linear.scaling_step(view, factor), apply=lambda stacks: stacks[0] + 1.0)


MUTANTS = [
    Mutant(
        0, "power iteration for matrices", lambda p: everywhere(p, "spectral_norm_bound", power_iteration), ("dense",)
    ),
    Mutant(
        25,
        "power iteration for patches",
        lambda p: everywhere(p, "spectral_norm_bound", power_iteration, convolution),
        ("periodic_conv",),
    ),
    Mutant(
        57,
        "power iteration for symbols",
        lambda p: everywhere(p, "torus_norm_bound", torus_by_power_iteration),
        SPATIAL,
    ),
    Mutant(
        0,
        "power iteration for circular convolutions",
        lambda p: everywhere(
            p, "circular_norm_bound", lambda kernel, *rest: power_iteration(kernel.reshape(len(kernel), -1))
        ),
        ("periodic_conv",),
    ),
    Mutant(
        0,
        "power iteration for distances of rows",
        lambda p: everywhere(
            p,
            "pairwise_distance_bounds",
            lambda rows: np.array([[abs(np.linalg.norm(a) - np.linalg.norm(b)) for b in rows] for a in rows]),
        ),
        ("dense",),
    ),
    Mutant(
        0,
        "the torus of the image's own size",
        lambda p: everywhere(p, "torus_norm_bound", circular_of_the_image),
        SPATIAL,
    ),
    Mutant(
        0,
        "a window's correction of any sign",
        lambda p: p.setattr(torus.math, "cos", lambda angle: 0.0),
        SPATIAL,
    ),
    Mutant(0, "dilations forgotten", lambda p: everywhere(p, "dilated", lambda kernel, dilations: kernel), ("conv",)),
    Mutant(
        78,
        "another period",
        lambda p: p.setattr(convolution, "_period", lambda i, a: max(1, period(i, a) - 1)),
        SPATIAL,
    ),
    Mutant(
        0, "no logit error", lambda p: p.setattr(analysis, "_certificate", without_error), ("dense",), of_errors=True
    ),
    Mutant(
        0,
        "rounding of sums dropped",
        lambda p: p.setattr(table.Context, "gamma", lambda self, n: 0.0),
        ("dense",),
        of_errors=True,
    ),
    Mutant(
        0,
        "rounding of single operations dropped",
        lambda p: p.setattr(table.Context, "one_rounding", lambda *arguments: facts.LocalError(0.0, 0.0)),
        ("with_constant",),
        of_errors=True,
    ),
    Mutant(
        0,
        "rounding of the image dropped",
        lambda p: p.setattr(analysis, "_image", exact_image),
        ("move",),
        of_errors=True,
    ),
    Mutant(
        0,
        "inaccuracy of functions dropped",
        lambda p: p.setattr(activations, "FUNCTION_ERROR", 0.0),
        ("activation",),
        of_errors=True,
    ),
    Mutant(
        0,
        "row norms dropped",
        lambda p: everywhere(p, "row_norms_up", lambda m: np.zeros(len(m))),
        ("dense",),
        of_errors=True,
    ),
    Mutant(
        0,
        "overflow forgotten",
        lambda p: p.setattr(table.Context, "no_overflow", lambda self, bound: None),
        ("overflowing",),
        of_errors=True,
    ),
    Mutant(0, "repeated elements counted once", lambda p: p.setattr(values, "sqrt_up", lambda value: 1.0), ("move",)),
    Mutant(
        0,
        "different tensors count as one",
        lambda p: p.setattr(facts, "norm_up", lambda v: float(np.max(v))),
        ("parts", "branches"),
        3,
    ),
    Mutant(
        0,
        "the larger of two branches",
        lambda p: p.setattr(facts, "add_up", lambda *terms: max(terms)),
        ("residual", "branches"),
        2,
    ),
    Mutant(
        0,
        "zero times unknown",
        lambda p: everywhere(p, "mul_up", zero_wins),
        ("residual", "branches", "number", "with_constant"),
        3,
    ),
    Mutant(
        0,
        "deviation of multiplied kernels dropped",
        kernels_without_deviation,
        ("cancelling",),
    ),
    Mutant(
        0,
        "deviation of multiplied matrices dropped",
        lambda p: p.setattr(matrices, "gamma_up", lambda n: 0.0),
        ("cancelling",),
    ),
    Mutant(
        0,
        "borders between convolutions forgotten",
        lambda p: p.setattr(kernels, "all", lambda _: True, raising=False),
        SPATIAL,
        2,
    ),
    Mutant(
        24,
        "identities that pad",
        lambda p: everywhere(p, "compose_kernels", borders_forgotten),
        ("two_convolutions",),
    ),
    Mutant(
        0,
        "gradient step of either sign",
        lambda p: p.setattr(
            joint.Joint, "gradient_step", lambda self, x, step, sign: gradient_step(self, x, step, -1.0)
        ),
        ("gradient_step", "gradient_step_of_convolutions"),
    ),
    Mutant(
        0,
        "gradient step of almost that form",
        lambda p: p.setattr(descent, "_distance_up", lambda left, right: 0.0),
        ("gradient_step",),
    ),
    Mutant(
        0,
        "gradient step of almost that form, of convolutions",
        lambda p: p.setattr(descent, "absolute_convolution_bound", lambda kernel, groups: 0.0),
        ("gradient_step_of_convolutions",),
    ),
    Mutant(0, "gradient step with negative weights", negative_weights, ("gradient_step",)),
    Mutant(
        115,
        "gradient step of falling activations",
        lambda p: everywhere(p, "Slopes", lambda of, low, high: values.Slopes(of, 0.0, high), *SLOPED),
        ("gradient_step",),
    ),
    Mutant(
        0,
        "gradient step of steep activations",
        lambda p: everywhere(p, "Slopes", lambda of, low, high: values.Slopes(of, low, 1.0), *SLOPED),
        ("gradient_step",),
    ),
    Mutant(
        0,
        "positive and negative parts without their sign",
        lambda p: p.setattr(piecewise, "Part", parts_in_turn()),
        ("parts",),
    ),
    Mutant(
        0,
        "a frame without its value",
        lambda p: p.setattr(selections, "np", Numpy(where=lambda mask, inside, outside: outside)),
        ("framed",),
        of_errors=True,
    ),
    Mutant(
        0,
        "constants beside a tensor taken for zeros",
        lambda p: p.setattr(selections, "_framed", lambda context, view, center: view),
        ("framed",),
        of_errors=True,
    ),
    Mutant(
        0,
        "constants beside a tensor that count as a part of it",
        lambda p: p.setattr(selections, "scaling_step", step_with_constants),
        ("framed", "dense", "cancelling", "residual"),
        4,
    ),
    Mutant(0, "any mean centres", lambda p: p.setattr(arithmetic, "_centres", any_mean_centres), ("centre",)),
    Mutant(
        0,
        "mean of the column sums of squares",
        lambda p: p.setattr(squares, "np", Numpy(max=lambda v, **_: np.mean(v))),
        ("roots",),
    ),
    Mutant(
        0,
        "signs of squares",
        lambda p: p.setattr(squares, "_sum_of_squares", lambda value: value),
        ("strange_squares",),
    ),
    Mutant(
        0,
        "overlapping windows counted once",
        lambda p: p.setattr(pooling, "sqrt_up", lambda value: min(value, 1.0)),
        ("pool",),
    ),
    Mutant(
        0,
        "another epsilon",
        lambda p: p.setattr(operators.Operator, "number", lambda operator, name: 1.0),
        ("batch_normalization",),
    ),
    Mutant(
        0,
        "the mean factor",
        lambda p: p.setattr(arithmetic, "np", Numpy(max=lambda v, **_: np.mean(v))),
        ("with_constant",),
    ),
    Mutant(0, "the largest divisor", lambda p: p.setattr(arithmetic, "np", Numpy(min=np.max)), ("with_constant",)),
    Mutant(
        0,
        "a slope too small",
        lambda p: p.setattr(
            activations, "_activated", lambda *a, **k: activated(*a, **{**k, "slope": 0.9 * k["slope"]})
        ),
        ("activation",),
    ),
    Mutant(
        0,
        "one factor of a product taken for a constant",
        lambda p: p.setattr(products, "add_up", max),
        ("gated",),
    ),
    Mutant(
        0,
        "slopes of a function at the centre of its range",
        lambda p: p.setattr(products, "_range", lambda context, base: (float(base.center.min()),) * 2),
        ("gated",),
    ),
    Mutant(
        0,
        "functions of different elements taken for functions of one",
        lambda p: p.setattr(products, "identity_of", lambda view: view.shape),
        ("gated",),
    ),
    Mutant(
        0,
        "error of a product without those of its factors",
        lambda p: p.setattr(
            products,
            "Facts",
            lambda **bounds: facts.Facts(**{**bounds, "error": 0.0, "error_max": 0.0}),
        ),
        ("gated", "dense"),
        3,
        of_errors=True,
    ),
    Mutant(
        0,
        "errors between a tensor and a function of it dropped",
        lambda p: p.setattr(products, "_rest", lambda *_: 0.0),
        ("gated",),
        of_errors=True,
    ),
    Mutant(
        0,
        "the norm of the first block",
        lambda p: p.setattr(blocks, "np", Numpy(concatenate=lambda arrays, **_: arrays[0])),
        ("block_products",),
    ),
    Mutant(
        0,
        "rounding of blocks dropped",
        lambda p: p.setattr(
            blocks,
            "LocalError",
            SimpleNamespace(relative=lambda *_, **__: facts.LocalError(0.0, 0.0), of_each=facts.LocalError.of_each),
        ),
        ("block_products",),
        1,
        of_errors=True,
    ),
    Mutant(
        0,
        "constants of blocks dropped",
        lambda p: p.setattr(blocks, "_sum_up", lambda one, other: np.zeros(())),
        ("block_products",),
        1,
        of_errors=True,
    ),
    Mutant(
        0,
        "LogSoftmax leaves the logits as they are",
        lambda p: p.setattr(activations, "_shifted_together", lambda view, lipschitz: view.source.affine),
        ("log_probabilities",),
    ),
]


TRIES = 200


def caught(mutant: Mutant, graph: Graph) -> list[str]:
    bounds = Bounds.of(graph.model)
    if bounds is None:
        return []
    return error_findings(graph, bounds) if mutant.of_errors else lipschitz_findings(graph, bounds)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_caught(mutant: Mutant, monkeypatch: Patch) -> None:
    for seed in range(mutant.first, mutant.first + TRIES):
        graph = seeded_graph(seed, mutant.steps, mutant.most)
        if mutant.of_errors:
            graph = runnable(graph)
        with monkeypatch.context() as patch:
            mutant.mutate(patch)
            found = caught(mutant, graph)
        if found:
            assert caught(mutant, graph) == []
            return
    pytest.fail(f"none of {TRIES} graphs tells it from the certifier")


def test_absolute_norms_that_are_too_small_are_caught_by_their_oracles() -> None:
    # No computed sum shows them: gamma_n allows for more than roundings do in practice.
    signs = np.array([[1.0, 1.0], [1.0, -1.0]])
    assert exceeds_norm(norms.absolute_norm_bound(signs), np.abs(signs))
    assert not exceeds_norm(power_iteration(signs), np.abs(signs))
    kernel = signs.reshape(2, 2, 1, 1)
    assert exceeds_norm(convolutions.absolute_convolution_bound(kernel, 1), np.abs(signs))
