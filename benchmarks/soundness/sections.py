"""The sections of `benchmarks/SOUNDNESS.md`: what is measured, and the tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.soundness import wire
from benchmarks.soundness.boundary import BATCH_SIZES, QUICK, THOROUGH, Sampled, Search, View, near_boundary, search
from benchmarks.soundness.data import in_another_shape, test_images
from benchmarks.soundness.document import floor, table
from service.classifier import Classifier

MODELS = ("mnist", "mnist-0-8")
OTHER_SHAPES = ((1, 20, 20), (1, 40, 33), (3, 28, 28), (3, 36, 24))
OTHER_SHAPE_IMAGES = 40


@dataclass(frozen=True)
class Section:
    """Markdown with its heading, and how many promises the measurement found broken."""

    text: str
    violations: int


def boundary_search(arguments: argparse.Namespace) -> Section:
    """From images of each model, and from images in other shapes, the nearest point of another class."""
    rows, near_rows, wire_rows, broken = [], [], [], 0
    for name in MODELS:
        classifier = Classifier.load(arguments.zoo / name, "cpu", threads=1)
        image_N1HW = test_images(classifier, arguments.data, arguments.images)
        cases = [("1 x 28 x 28", View(classifier), image_N1HW)]
        for channels, height, width in OTHER_SHAPES:
            shaped = in_another_shape(image_N1HW[:OTHER_SHAPE_IMAGES], channels, height, width, arguments.seed)
            cases.append((f"{channels} x {height} x {width}", View(classifier, resize=True), shaped))
        for shape, view, image_NCHW in cases:
            rng = np.random.default_rng(arguments.seed)
            started = time.monotonic()
            found = search(view, image_NCHW, rng, THOROUGH)
            near = near_boundary(view, found, rng)
            rows.append(_search_row([f"`{name}`", shape], found))
            near_rows.append(_near_row([f"`{name}`", shape], near))
            broken += _broken(found, near)
            if view.classifier.input_shape[0] == image_NCHW.shape[1]:
                answers = wire.ask(arguments.zoo, name, found, view.resize)
                counts = [answers.other_answer, answers.inside, answers.pulled_flips]
                wire_rows.append([f"`{name}`", shape, answers.n, *counts])
                broken += sum(counts)
            _say(f"boundary {name} {shape}: {rows[-1]} {near_rows[-1]} {time.monotonic() - started:.0f} s")
    sizes = ", ".join(map(str, BATCH_SIZES))
    text = "\n".join(
        [
            "## The nearest points of another class",
            "",
            "From each test image (the first ones), the nearest image of another class that could be found through "
            "`service.classifier.Classifier`: the service's counterfactual, a descent to each of the two nearest "
            "classes, foolbox's DeepFool and Carlini-Wagner; each then walked along the boundary towards the image, "
            "bisected down to adjacent floats, and improved by neighbouring floats. Other shapes are the same digits "
            "resampled (and tinted), sent with `resize=true`, and searched in the pixels that are sent. Distances and "
            f"radii are compared as exact rationals; a point counts if it gets another class in a batch of any of {sizes} "
            'images. "Pulled" are the points moved along the segment to the last floats inside of the radius.',
            "",
            f"**Points strictly inside of the radius: {broken}.**",
            "",
            table(_SEARCH_HEADER, rows),
            "",
            "Rounding decides in front of the boundary. So images were placed there, with computed margins of 4.000001, "
            "4.001, 4.1 and 6 times `logit_error`, and 49 points inside of each (tiny) radius classified: along the "
            "gradient, its signs, and random directions. The last two columns show that this attack is real: images with "
            "margins of 0.0001 to 0.1 times `logit_error`, and how many have another class inside of the radius that a "
            "certificate without rounding errors, `min (f_i - f_j) / K_ij`, would give them. The service certifies none "
            "of those.",
            "",
            table(_NEAR_HEADER, near_rows),
            "",
            "The same points through the whole application (HTTP in this process, `application/x-npy`, float64, one image a "
            "request; RGB arrays are not converted there, only files are): answers that "
            "differ from the search's in class or by more than 1e-9 in radius, points inside of the answered radius, and "
            "pulled points that get another class:",
            "",
            table(["model", "image", "n", "other answers", "inside", "pulled, other class"], wire_rows),
        ]
    )
    return Section(text, broken)


_SEARCH_HEADER = (
    *("model", "image", "n", "certified", "found", "median radius", "smallest distance / radius"),
    *("median distance / radius", "inside", "pulled, other class"),
)
_NEAR_HEADER = ("model", "image", "images", "points inside", "other class", "images without E", "broken without E")


def _search_row(what: Sequence[str], found: Search) -> list[object]:
    certified_N = found.radius_N > 0
    ratios = found.ratios
    return [
        *what,
        len(certified_N),
        int(certified_N.sum()),
        int(found.found_N.sum()),
        f"{np.median(found.radius_N):.4f}",
        floor(float(ratios.min()), 6) if len(ratios) else "-",
        floor(float(np.median(ratios)), 4) if len(ratios) else "-",
        len(found.violations),
        found.pulled_flips,
    ]


def _near_row(what: Sequence[str], near: Sampled) -> list[object]:
    return [*what, near.images, near.points, near.flips, near.naive_images, near.naive_broken]


def _broken(found: Search, near: Sampled) -> int:
    return len(found.violations) + found.pulled_flips + near.flips


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
