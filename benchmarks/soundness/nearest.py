"""The section of the nearest points of another class that can be found."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.soundness import wire
from benchmarks.soundness.attacks import foolbox_starts
from benchmarks.soundness.boundary import BATCH_SIZES, QUICK, THOROUGH, Effort, Search, View, own_starts, search
from benchmarks.soundness.data import classifiers, in_another_shape, test_images
from benchmarks.soundness.document import floor, table
from benchmarks.soundness.sampling import Sampled, near_boundary
from benchmarks.soundness.sections import MODELS, NEAR_IMAGES, Section, broken_promises, load_shipped, say
from models.evaluation.attacks import ATTACKS

OTHER_SIZES = ((5, 5), (10, 8))
"""Height and width in sevenths of those of the model."""
OTHER_SHAPE_IMAGES = 40
_SHORT_CARLINI = {"binary_search_steps": 3, "steps": 60}
Rows = list[list[object]]


def boundary_search(arguments: argparse.Namespace) -> Section:
    """From images of each model, and from images in other shapes, the nearest point of another class.

    The models share the processors, a process for each.
    """
    names = arguments.models or classifiers(arguments.zoo)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        models = list(pool.map(_search_model, [arguments] * len(names), names))
    rows, near_rows, wire_rows = ([row for model in models for row in model[kind]] for kind in range(3))
    broken = sum(model[3] for model in models)
    sizes = ", ".join(map(str, BATCH_SIZES))
    text = "\n\n".join(
        [
            "## The nearest points of another class",
            "From test images of each shipped classifier, evenly spaced, the nearest image of another class that "
            "could be found through `service.inference.classifier.Classifier`: the service's counterfactual, a "
            "descent to the nearest classes, foolbox's DeepFool and Carlini-Wagner; each then walked "
            "along the boundary towards the image, bisected down to adjacent floats, and improved by neighbouring "
            "floats. Other shapes are the same images resampled (grey ones also tinted), sent with `resize=true`, and "
            "searched in the pixels that are sent. Distances and radii are compared as exact rationals, radii "
            "with reference images (`proof=best`); a point counts if it gets another class in a batch of any of "
            f'{sizes} images. "Pulled" are the points moved along the segment to the last floats inside of the '
            "radius.",
            f"**Points strictly inside of the radius: {broken}.**",
            f"Effort for `{'` and `'.join(MODELS)}`: {_effort(THOROUGH, {})}; for the others, whose passes cost many "
            f"times as much: {_effort(QUICK, _SHORT_CARLINI)}.",
            table(_SEARCH_HEADER, rows),
            "Rounding decides in front of the boundary. So images were placed there, with computed margins of "
            "4.0000001, 4.001, 4.1, 6 and 100 times `logit_error`, and 49 points inside of each radius classified: "
            "along the gradient, its signs, and random directions. The last two columns show that this attack is "
            "real: images with margins of 0.0001 to 0.1 times `logit_error`, and how many have another class inside "
            "of the radius that a certificate without rounding errors, `min (f_i - f_j) / K_ij`, would give them. "
            "The service certifies none of those.",
            table(_NEAR_HEADER, near_rows),
            "The same points through the whole application (HTTP in this process, `application/x-npy`, float64, one "
            "image a request; RGB arrays are not converted there, only files are): answers that differ from the "
            "search's in class or by more than 1e-9 in radius, points inside of the answered radius, and pulled "
            "points that get another class:",
            table(["model", "image", "n", "other answers", "inside", "pulled, other class"], wire_rows),
        ]
    )
    return Section(text, broken)


def _search_model(arguments: argparse.Namespace, name: str) -> tuple[Rows, Rows, Rows, int]:
    """Return rows of the three tables, and the number of broken promises."""
    torch.set_num_threads(1)
    rows, near_rows, wire_rows, broken = [], [], [], 0
    classifier = load_shipped(arguments, name)
    effort, carlini = (THOROUGH, {}) if name in MODELS else (QUICK, _SHORT_CARLINI)
    image_NCHW, _ = test_images(classifier, arguments.data, arguments.images)
    cases = [(View(classifier), image_NCHW)]
    for other in _other_shapes(*classifier.input_shape):
        shaped = in_another_shape(image_NCHW[:OTHER_SHAPE_IMAGES], *other, arguments.seed)
        cases.append((View(classifier, resize=True), shaped))
    for view, image_NCHW in cases:
        title = [f"`{name}`", _shape(image_NCHW)]
        rng = np.random.default_rng(arguments.seed)
        started = time.monotonic()
        starts = [*own_starts(view, image_NCHW, effort), *foolbox_starts(view, image_NCHW, carlini)]
        found = search(view, image_NCHW, rng, effort, starts)
        near = near_boundary(view, found if name in MODELS else found.first(NEAR_IMAGES), rng)
        rows.append(_search_row(title, found))
        near_rows.append(_near_row(title, near))
        broken += broken_promises(found, near)
        if view.classifier.input_shape[0] == image_NCHW.shape[1]:
            answers = wire.ask(classifier, found, view.resize)
            counts = [answers.other_answer, answers.inside, answers.pulled_flips]
            wire_rows.append([*title, answers.n, *counts])
            broken += sum(counts)
        say(f"boundary {rows[-1]} {near_rows[-1]} {time.monotonic() - started:.0f} s")
    return rows, near_rows, wire_rows, broken


def _effort(effort: Effort, carlini: Mapping[str, int]) -> str:
    steps = {**ATTACKS["Carlini-Wagner"], **carlini}
    return (
        f"{effort.rivals} descents, {effort.walk} steps of walking, {effort.polish} x {effort.trials} neighbours, "
        f"{steps['binary_search_steps']} x {steps['steps']} steps of Carlini-Wagner"
    )


def _other_shapes(channels: int, height: int, width: int) -> list[tuple[int, int, int]]:
    sizes = [(height * tall // 7, width * wide // 7) for tall, wide in OTHER_SIZES]
    colour = [] if channels == 3 else [(3, height, width), (3, *sizes[-1])]
    return [*((channels, *size) for size in sizes), *colour]


def _shape(image_NCHW: np.ndarray) -> str:
    return " x ".join(map(str, image_NCHW.shape[1:]))


_SEARCH_HEADER = (
    *("model", "image", "n", "certified", "found", "median radius", "with reference images"),
    *("smallest distance / radius", "median distance / radius", "inside", "pulled, other class"),
)
_NEAR_HEADER = ("model", "image", "images", "points inside", "other class", "images without E", "broken without E")


def _search_row(title: Sequence[str], found: Search) -> list[object]:
    certified_N = found.radius_N > 0
    ratios = found.ratios
    return [
        *title,
        len(certified_N),
        int(certified_N.sum()),
        int(found.found_N.sum()),
        f"{np.median(found.radius_N):.4f}",
        f"{np.median(found.largest_N):.4f}",
        floor(float(ratios.min()), 6) if len(ratios) else "-",
        floor(float(np.median(ratios)), 4) if len(ratios) else "-",
        len(found.violations),
        found.pulled_flips,
    ]


def _near_row(title: Sequence[str], near: Sampled) -> list[object]:
    return [*title, near.images, near.points, near.flips, near.naive_images, near.naive_broken]
