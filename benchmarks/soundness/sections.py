"""The sections of `benchmarks/SOUNDNESS.md`: measurements and tables."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from builders import Graphs, load

from benchmarks.soundness.boundary import (
    QUICK,
    RETRACE,
    Search,
    View,
    search,
)
from benchmarks.soundness.data import test_images
from benchmarks.soundness.document import floor, table
from benchmarks.soundness.graphs import in_float32, residual, shipped, with_planted_biases
from benchmarks.soundness.invariance import BATCHES, THREADS, lost_radius, vary
from benchmarks.soundness.known import Exhausted, examine, exhaust, nudge_midpoints, random_network
from benchmarks.soundness.sampling import Sampled, near_boundary
from service.certificate import certify
from service.inference.classifier import Classifier

MODELS = ("mnist", "mnist-0-8")
"""Of the sections that say nothing about all shipped models."""
PLANTED = tuple((constant, half) for constant in (1e6, 1e8, 1e10, 1e12) for half in (False, True))
NEAR_IMAGES = 100
NUDGED_MARGINS = (1e-5, 1e-4, 3e-4, 1e-2, 1.0, 3.99, 4.01, 6.0)
INVARIANCE_IMAGES = 64
SHIPPED_DEADLINE_S, RESIDUAL_DEADLINE_S = 3.0, 120.0
RELATIVE_LOSS = 1e-6


@dataclass(frozen=True)
class Section:
    """Markdown with its heading, and the number of broken promises."""

    text: str
    violations: int


def load_shipped(arguments: argparse.Namespace, name: str) -> Classifier:
    """Return a shipped model on one thread."""
    return Classifier.load(arguments.zoo / name, "cpu", threads=1)


def planted_biases(arguments: argparse.Namespace) -> Section:
    """Huge biases in hidden layers, compensated in the next: shipped models in both precisions, and isometric ones."""
    rows, broken = [], 0
    for name in MODELS:
        own = shipped(arguments.zoo / name)
        classifier = load_shipped(arguments, name)
        image_NCHW, _ = test_images(classifier, arguments.data, arguments.images)
        reference = search(View(classifier), image_NCHW, np.random.default_rng(arguments.seed), QUICK)
        for graphs, precision in ((own, "float64"), (in_float32(own), "float32")):
            for constant, half in PLANTED:
                title = [f"`{name}`", precision, f"{constant:.0e}", "half" if half else "all"]
                # Where rounding has left nothing of the classes, another image may have another one.
                starts = [reference.point_NCHW, np.roll(image_NCHW, 1, axis=0), np.roll(image_NCHW, 7, axis=0)]
                row, wrong = _planted_row(title, with_planted_biases(graphs, constant, half), image_NCHW, starts)
                rows.append(row)
                broken += wrong
    rng = np.random.default_rng(arguments.seed)
    image_NCHW = rng.uniform(0.2, 0.8, (min(100, arguments.images), 1, 4, 4))
    for dtype in (np.float64, np.float32):
        graphs = random_network(rng, 2, 16, 3, dtype).graphs()
        for constant, half in PLANTED:
            title = ["isometric", np.dtype(dtype).name, f"{constant:.0e}", "half" if half else "all"]
            row, wrong = _planted_row(title, with_planted_biases(graphs, constant, half), image_NCHW, None)
            rows.append(row)
            broken += wrong
    text = "\n\n".join(
        [
            "## Planted biases",
            "A constant is added to the biases of every hidden layer (of all units, or of every second sorted pair) "
            "and taken off again, multiplied by the weights, in the next bias: exactly, rounded once. In real "
            "arithmetic the network is the same up to that rounding (which from 1e8 on leaves little of it in "
            "float32); computed, it loses its digits. The changed bytes are certified and served as any artefact, "
            "the shipped models in float64 and float32 (weights are float32 in both), and networks of orthogonal "
            "layers on 16 pixels with random biases (isometric), whose radii are otherwise exact to 1e-11. The "
            "search starts from the points found on the unchanged model, and from other images.",
            f"**Points strictly inside of the radius: {broken}.** Radius lost is the median of `min (f_i - f_j) / "
            "K_ij` less the radius. The last columns show that the attack is real: how many images have a point of "
            "another class strictly inside of that radius without rounding errors, among the test images, and among "
            "images placed in front of the boundary (the first 100, margins of 0.0001 to 0.1 times `logit_error`).",
            table(_PLANTED_HEADER, rows),
        ]
    )
    return Section(text, broken)


def _planted_row(
    title: Sequence[str], graphs: Graphs, image_NCHW: np.ndarray, starts: Sequence[np.ndarray] | None
) -> tuple[list[object], int]:
    view, rng = View(load(graphs)), np.random.default_rng(0)
    started = time.monotonic()
    found = search(view, image_NCHW, rng, QUICK if starts is None else RETRACE, starts)
    near = near_boundary(view, found.first(NEAR_IMAGES), rng, samples=24)
    lost, ratios = found.naive_N - found.radius_N, found.ratios
    row = [
        *title,
        f"{view.classifier.certificate.logit_error:.1e}",
        len(image_NCHW),
        int((found.radius_N > 0).sum()),
        f"{np.median(lost):.1e}",
        floor(float(ratios.min()), 6) if len(ratios) else "-",
        len(found.violations),
        found.pulled_flips,
        f"{near.flips} / {near.points}",
        f"{found.naive_broken} / {int((found.naive_N > 0).sum())}",
        f"{near.naive_broken} / {near.naive_images}",
    ]
    say(f"planted {row} {time.monotonic() - started:.0f} s")
    return row, broken_promises(found, near)


_PLANTED_HEADER = (
    *("model", "precision", "constant", "units", "E", "n", "certified", "radius lost", "smallest distance / radius"),
    *("inside", "pulled, other class", "other class / points in front of the boundary"),
    *("broken without E", "broken without E, in front of the boundary"),
)


def known_distances(arguments: argparse.Namespace) -> Section:
    """Isometric networks against exact distances, and float32 images in exhaustively searched balls."""
    rng = np.random.default_rng(arguments.seed)
    rows, ball_rows, nudge_rows, broken = [], [], [], 0
    networks, images = 10, max(1, arguments.images // 10)
    for dtype in (np.float64, np.float32):
        for depth in (0, 1, 2):
            known = examine([random_network(rng, depth, 16, 3, dtype) for _ in range(networks)], rng, images, QUICK)
            inside = sum(len(found.violations) + found.pulled_flips for found in known.searches)
            ratios = np.concatenate([found.ratios for found in known.searches])
            rows.append(
                [
                    *(np.dtype(dtype).name, depth, networks * images, known.attained, known.beyond),
                    *(f"1 + {known.smallest - 1:.1e}", f"1 + {ratios.min() - 1:.1e}"),
                    *(f"1 + {np.median(ratios) - 1:.1e}", inside, f"{known.worst_error:.4f}"),
                ]
            )
            broken += known.beyond + inside + (known.worst_error > 1)
            say(f"known {rows[-1]}")
    for depth in (0, 1, 2):
        for naive in (False, True):
            total = Exhausted()
            for _ in range(networks):
                total.add(exhaust(random_network(rng, depth, 4, 2, np.float32), rng, images // 5 or 1, naive))
            ball_rows.append(
                [depth, "without E" if naive else "certified", total.images, total.points, total.flips, total.broken]
            )
            broken += 0 if naive else total.flips
            say(f"exhaust {ball_rows[-1]}")
    for share in NUDGED_MARGINS:
        nudged = [nudge_midpoints(rng, share) for _ in range(networks)]
        nudge_rows.append(
            [
                *(
                    f"{share:g}",
                    len(nudged),
                    sum(each.certified for each in nudged),
                    sum(each.flipped for each in nudged),
                ),
                *(f"{max(each.nudge for each in nudged):.1e}", f"{np.median([n.naive_radius for n in nudged]):.1e}"),
                sum(each.inside_radius for each in nudged),
            ]
        )
        broken += sum(each.inside_radius for each in nudged)
    text = "\n\n".join(
        [
            "## Known distances",
            "Affine layers that are orthogonal without rounding, with sorting between them and a random head, on 4 x "
            "4 pixels, three classes: the margin of two classes has a gradient of norm `||w_i - w_j||` everywhere, "
            "so that the distance to the boundary is a quotient of rationals wherever the piece around the image "
            "reaches it. Depth 0 is a linear classifier.",
            f"**Radii above an exact distance, points inside of a radius, and errors above `logit_error`: {broken}.**",
            table(_KNOWN_HEADER, rows),
            "Float32 graphs on 4 pixels with centres whose margins are just above 4 E: *every* image inside of the "
            "radius (of a few float32 steps) that the graph can tell apart, each represented by the float64 image "
            "nearest to the centre that rounds to it. The rows without E do the same with centres whose margins are "
            "just above 0 and the radius that a certificate without rounding errors would give: the promise would be "
            "broken in most balls.",
            table(["depth", "radius", "balls", "images in them", "other class", "balls with one"], ball_rows),
            "The rounding of the input: linear float32 models on 784 pixels, each pixel a midpoint between two "
            "float32 numbers but for one unit of float64, so that a nudge by two units moves every computed pixel by "
            "a whole float32 step against the margin.",
            table(_NUDGE_HEADER, nudge_rows),
        ]
    )
    return Section(text, broken)


_KNOWN_HEADER = (
    *("precision", "depth", "n", "exact distances", "radii beyond", "smallest exact distance / radius"),
    *("smallest found distance / radius", "median found", "inside", "worst error / E"),
)
_NUDGE_HEADER = (
    *("margin / E", "n", "certified", "other class", "length of the nudge", "median radius without E"),
    "other class inside of the radius",
)


def invariance(arguments: argparse.Namespace) -> Section:
    """Batches, threads and graph optimisation."""
    rows, broken = [], 0
    cases: list[tuple[str, bytes, np.ndarray]] = []
    for name in MODELS:
        own = shipped(arguments.zoo / name)
        images, _ = test_images(load_shipped(arguments, name), arguments.data, INVARIANCE_IMAGES)
        cases.append((f"`{name}`", own.model, images))
        cases.append((f"`{name}` in float32", in_float32(own).model, images))
    rng = np.random.default_rng(arguments.seed)
    colour = rng.integers(0, 256, (INVARIANCE_IMAGES, 3, 12, 12)) / 255
    for normalised in (False, True):
        title = f"residual convolutions in float32{', BatchNormalization' if normalised else ''}"
        cases.append((title, residual(16, 2, 12, normalised, seed=arguments.seed), colour))
    for title, model_bytes, images in cases:
        for optimised in (False, True):
            seen = vary(model_bytes, images, optimised)
            rows.append(
                [
                    *(title, "all levels" if optimised else "off, as served", seen.n, seen.settings, seen.different),
                    *(f"{seen.logit_error:.1e}", f"{seen.logits:.1e}", f"{seen.logits_over_2e:.1e}"),
                    *(f"{seen.radii:.1e}", f"{seen.radii_over_2e:.1e}", seen.classes_changed),
                ]
            )
            broken += (seen.logits_over_2e > 1) + (seen.radii_over_2e > 1) + seen.classes_changed
            say(f"invariance {rows[-1]}")
    text = "\n\n".join(
        [
            "## Invariance",
            f"The same images in batches of {', '.join(map(str, BATCHES))}, on {', '.join(map(str, THREADS))} "
            "threads, with graph optimisation off, as served, and at all levels (off, basic, extended, all): every "
            "combination. Optimisation folds a scale into the weights of the layer before it; folded weights are "
            "rounded again, which the proof does not cover, so those rows are measured only. The residual networks "
            "(16 channels, 2 blocks, 12 x 12, random weights and images) add convolutions, BatchNormalization and "
            "fusions, which the dense ones lack.",
            f"**Radii or logits that differ by more than 2 E, or certified classes that change: {broken}.**",
            table(_INVARIANCE_HEADER, rows),
        ]
    )
    return Section(text, broken)


_INVARIANCE_HEADER = (
    *("model", "graph optimisation", "n", "settings", "settings with other bits", "E"),
    *("largest difference of a logit", "over 2 E", "of a radius", "over 2 E", "certified classes changed"),
)


def analysis_times(arguments: argparse.Namespace) -> Section:
    """How long the proof of an artefact takes, and that of a large residual network."""
    small = [(f"`{name}`", shipped(arguments.zoo / name).model, 3, SHIPPED_DEADLINE_S) for name in MODELS]
    large = [
        (
            f"residual, 20 convolutions 3 x 3 of 256 channels, 32 x 32{', BatchNormalization' if normalised else ''}",
            residual(256, 10, 32, normalised, seed=arguments.seed),
            1,
            RESIDUAL_DEADLINE_S,
        )
        for normalised in (False, True)
    ]
    rows, late = [], 0
    for title, model_bytes, repeats, deadline_s in [*small, *large]:
        times, used = [], []
        load = os.getloadavg()[0]
        for _ in range(repeats):
            started, used_before = time.perf_counter(), time.process_time()
            certificate = certify(model_bytes)
            times.append(time.perf_counter() - started)
            used.append(time.process_time() - used_before)
        taken = float(np.median(times))
        late += taken > deadline_s
        rows.append(
            [
                *(title, certificate.precision, repeats, f"{taken:.2f}", f"{deadline_s:g}"),
                *(f"{np.median(used):.2f}", f"{load:.1f}"),
                *(f"{certificate.lipschitz_bound:.4g}", f"{certificate.logit_error:.1e}"),
            ]
        )
        say(f"times {rows[-1]}")
    text = "\n\n".join(
        [
            "## Time of the analysis",
            "`service.certificate.certify`, bytes to certificate; medians. CPU seconds are of all threads. A load "
            "average above 0 means that other programs had part of the two cores. The residual networks have random "
            "weights (He), one convolution 1 x 1 in front and ten blocks `x + conv(relu(conv(x)))`.",
            table(
                [
                    *("graph", "precision", "n", "seconds", "at most", "CPU seconds", "load average before"),
                    *("Lipschitz bound", "E"),
                ],
                rows,
            ),
        ]
    )
    return Section(text, late)


def radius_lost(arguments: argparse.Namespace) -> Section:
    """The radius that the shipped models lose to the rounding error, over the whole test set."""
    rows, broken = [], 0
    for name in MODELS:
        classifier = load_shipped(arguments, name)
        image_NCHW, _ = test_images(classifier, arguments.data, None)
        logits_NK = np.concatenate(
            [classifier.classify(image_NCHW[k : k + 500])[0] for k in range(0, len(image_NCHW), 500)]
        )
        lost, radius = lost_radius(classifier.certificate, logits_NK)
        rows.append(
            [
                *(f"`{name}`", len(image_NCHW), f"{classifier.certificate.logit_error:.2e}", f"{radius:.4f}"),
                *(f"{lost:.2e}", f"{lost / radius:.2e}"),
            ]
        )
        broken += lost / radius >= RELATIVE_LOSS
    text = "\n\n".join(
        [
            "## Radius lost to rounding",
            "The radius that a certificate without rounding errors would give, `min (f_i - f_j) / K_ij`, less the "
            f"radius: medians over the test set. To be below {RELATIVE_LOSS:g} of the median radius.",
            table(["model", "n", "E", "median radius", "median lost", "relative to the median radius"], rows),
        ]
    )
    return Section(text, broken)


def broken_promises(found: Search, near: Sampled) -> int:
    """Return how many points are inside of a radius."""
    return len(found.violations) + found.pulled_flips + near.flips


def say(line: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{line}\n")
