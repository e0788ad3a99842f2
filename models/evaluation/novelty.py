"""Figures of a novelty model: how well f tells known images from novel ones, and how well it does under attack.

Certified AUROC at epsilon: the share of pairs of a known and a novel image in which the known one has the larger f
however both are changed by less than epsilon, `f(known) - f(novel) > (L_known + L_novel) epsilon + 2 E_known + 2
E_novel`, with the Lipschitz constants L of f and the errors E for images of their shapes. An attacker lowers f of known
images and raises it of novel ones; so it is below the AUROC under every attack. Source: Béthune et al., Robust
one-class classification with signed distance function using 1-Lipschitz neural networks, ICML 2023, section 4.

Axes: N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from models.data.datasets import PUBLISHED, load_dataset
from models.data.labelled import LabelledImages
from models.data.resizing import decode_file
from models.evaluation.images import EvaluationError
from models.recipes import DataOptions
from service.artefact.card import NOVELTY_LABELS
from service.errors import InputError
from service.inference.classifier import Classifier

BATCH = 250
HELD_OUT = "other classes"
"""Name of the novel images of the test set."""
_LARGEST_FOLDER = 10_000
"""Files of a folder that are read, in the order of their names."""


@dataclass(frozen=True)
class Scores:
    """f of some images, with the proved numbers of its computation."""

    f_N: Float64[np.ndarray, " N"]
    radius_N: Float64[np.ndarray, " N"]
    """Certified radii of the sign of f, about the images as they are."""
    lipschitz_N: Float64[np.ndarray, " N"]
    """Of f, about the images as they are."""
    error_N: Float64[np.ndarray, " N"]
    """Bound of |computed f - exact f|."""


def scores_of(classifier: Classifier, images: Sequence[UInt8[np.ndarray, "C H W"]]) -> Scores:
    """Return f of 8-bit images of any sizes, as the server computes it with `resize`.

    Args:
        classifier: a novelty model.
        images: at least one.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    start = 0
    while start < len(images):
        stop = start + 1
        while stop < min(len(images), start + BATCH) and images[stop].shape == images[start].shape:
            stop += 1
        pixels_NCHW = np.stack(images[start:stop]) / 255.0
        view = classifier.view(pixels_NCHW.shape[1:], resize=True)
        logits_NK, radii = view.classify(pixels_NCHW)
        # K_01 bounds f - (-f).
        lipschitz_N = np.nextafter(radii.lipschitz_bound_N / 2.0, np.inf)
        error_N = np.full(len(pixels_NCHW), view.certificate.logit_error)
        parts.append((logits_NK[:, 0], radii.radius_N, lipschitz_N, error_N))
        start = stop
    return Scores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def auroc(known: Scores, novel: Scores) -> float:
    """Return the share of pairs in which f of the known image is larger; equal ones count half."""
    below_N, up_to_N = (np.searchsorted(np.sort(novel.f_N), known.f_N, side) for side in ("left", "right"))
    return float((below_N + up_to_N).mean()) / (2 * len(novel.f_N))


def certified_auroc(known: Scores, novel: Scores, epsilon: float) -> float:
    """Return the share of pairs that no change below epsilon of either image turns round; see the module.

    Args:
        known: f of known images.
        novel: f of novel images.
        epsilon: L2, pixels in [0, 1] of the images as they are.
    """
    # Each of the few operations rounds by a part of 2^-53; the slack is larger than all of them together.
    low_N, high_N = (
        one.f_N + sign * (1 + 2**-40) * (one.lipschitz_N * epsilon + 2 * one.error_N + 2**-48 * np.abs(one.f_N))
        for one, sign in ((known, -1.0), (novel, 1.0))
    )
    return float(np.searchsorted(np.sort(high_N), low_N, "left").mean()) / len(high_N)


def novelty_figures(
    classifier: Classifier, test: LabelledImages, others: Mapping[str, Sequence[np.ndarray]], epsilons: Sequence[float]
) -> dict[str, Any]:
    """Return the figures of a novelty model against each set of novel images, and against noise.

    Args:
        classifier: a novelty model.
        test: known images (class 0), and novel ones (class 1) where the data set has them.
        others: further sets of novel images by name, 8 bits, C x H x W.
        epsilons: L2 radii, pixels in [0, 1].

    Raises:
        EvaluationError: no test image is known.
    """
    images_N, novel_N = test.images_NCHW.numpy(), test.labels_N.numpy() == 1
    if novel_N.all():
        raise EvaluationError("there is no known image: the novelty cannot be measured")
    known = scores_of(classifier, list(images_N[~novel_N]))
    shape = images_N.shape[1:]
    noise = np.random.default_rng(0).integers(0, 256, (min(1000, len(known.f_N)), *shape), dtype=np.uint8)
    sets: dict[str, Sequence[np.ndarray]] = {HELD_OUT: list(images_N[novel_N])} if novel_N.any() else {}
    return {
        "known": {"n": len(known.f_N), "called_known": float((known.f_N >= 0).mean())},
        "against": [
            {"name": name, **_against(known, scores_of(classifier, images), epsilons)}
            for name, images in {**sets, **others, "uniform noise": list(noise)}.items()
        ],
    }


def _against(known: Scores, novel: Scores, epsilons: Sequence[float]) -> dict[str, Any]:
    called_N = novel.f_N < 0
    return {
        "n": len(novel.f_N),
        "auroc": auroc(known, novel),
        "certified_auroc": [{"epsilon": e, "value": certified_auroc(known, novel, e)} for e in epsilons],
        "called_novel": float(called_N.mean()),
        "certified_novel": [{"epsilon": e, "value": float((called_N & (novel.radius_N > e)).mean())} for e in epsilons],
    }


def novel_images(places: Sequence[str], data: Path) -> dict[str, list[np.ndarray]]:
    """Return sets of novel images by name.

    Args:
        places: folders, with all image files below them, or published sets, whose test images are taken: NAME for the
            set in `data`, DIR/NAME for the set in another folder.
        data: folder of the data set.

    Raises:
        EvaluationError: there is no such folder, or no image in it.
        DataError: a published set is not usable.
    """
    found: dict[str, list[np.ndarray]] = {}
    for place in places:
        name = Path(place).name
        if name in PUBLISHED:
            options = DataOptions.model_validate({"dataset": name})
            directory = data if place == name else Path(place).parent
            found[name] = list(load_dataset(options, directory, test_only=True).test.images_NCHW.numpy())
        else:
            found[Path(place).resolve().name] = _folder(Path(place))
    return found


def _folder(folder: Path) -> list[np.ndarray]:
    if not folder.is_dir():
        raise EvaluationError(
            f"--novel {folder}: no such folder; name a folder of images, or one of {', '.join(sorted(PUBLISHED))}"
        )
    images: list[np.ndarray] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file())[:_LARGEST_FOLDER]:
        try:
            images.append(decode_file(path.read_bytes()))
        except (InputError, OSError, ValueError):
            continue
    if not images:
        raise EvaluationError(f"--novel {folder}: no image file that the service reads is in it")
    return images


def is_novelty_model(classifier: Classifier) -> bool:
    """Return whether a model has the labels known and novel."""
    return classifier.labels == NOVELTY_LABELS


def novelty_text(figures: Mapping[str, Any]) -> str:
    """Return the sentences above the table of `novelty_cells`."""
    return (
        f"Of {figures['known']['n']} known test images {figures['known']['called_known']:.2%} are called known. "
        "Certified AUROC: the share of pairs of a known and a novel image in which the known one has the larger score, "
        "however both are changed by less than epsilon (L2, pixels in [0, 1] of the images as they are)."
    )


def novelty_cells(figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of the figures."""
    epsilons = [entry["epsilon"] for entry in figures["against"][0]["certified_auroc"]]
    head = ["novel images", "n", "called novel", "AUROC", *(f"certified AUROC at {e:.4g}" for e in epsilons)]
    return head, [
        [
            one["name"],
            str(one["n"]),
            f"{one['called_novel']:.2%}",
            f"{one['auroc']:.2%}",
            *(f"{entry['value']:.2%}" for entry in one["certified_auroc"]),
        ]
        for one in figures["against"]
    ]
