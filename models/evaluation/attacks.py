"""Attacks from public libraries (foolbox, ART) on an artefact as it is served.

Each attack returns one distance for each image, to the nearest image of another class that it found: an upper bound of
the distance that the certified radius bounds from below. An image strictly inside the radius to which the service
assigns another class would refute the certificate: the run stops there, with both images. The radius that is compared
is the largest that is proved, the one with reference images. The attacks see the served graphs: the forward pass is the
graph of the logits; the graph of the gradient computes vector-Jacobian products, so the backward pass is that graph
with the incoming gradient as `margin_weights`. Their results are judged by the served path alone, in exact arithmetic.

Axes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from tqdm import tqdm

from models.evaluation.libraries import (
    BATCH,
    Adversarials,
    Search,
    autoattack_search,
    foolbox_adversarials,
    gradient_search,
    on_one_thread,
    silenced_libraries,
)
from models.evaluation.partial import Arrays, PartialResults, digest_of
from models.evaluation.tasks import InProcess, Runner, Task, measured
from service.inference.classifier import Classifier
from service.pixels.distances import distance, is_inside

INSIDE = 1 - 1e-6
"""Share of the radius that attacks search where they must find nothing; the rest is above its rounding."""

MULTIPLES = (INSIDE, 1.1, 1.3, 1.7, 2.5)
"""Radii of the balls that attacks search until they succeed, as multiples of each image's largest proved radius."""

LEAST_SCALE = 0.01
"""Replaces the certified radius where that is smaller or 0 (not certified); L2, pixels in [0, 1]."""

BISECTIONS = 16
"""Halvings of the segment between an image and its adversarial image."""

FORMAT = 2
"""Part of the settings of partial results; to be raised where the meaning of their arrays changes."""


class AttacksMissingError(Exception):
    """The libraries are not installed; the message says how to install them."""


class CertificateRefutedError(Exception):
    """An image of another class strictly inside the certified radius was found."""

    def __init__(
        self, attack: str, image_CHW: np.ndarray, found_CHW: np.ndarray, class_id: int, found_class: int, radius: float
    ) -> None:
        super().__init__(
            f"{attack} found an image of class {found_class} at distance {distance(image_CHW, found_CHW)!r} of one of "
            f"class {class_id} whose certified radius is {radius!r}"
        )
        self.image_CHW = image_CHW
        self.found_CHW = found_CHW
        self._given = (attack, image_CHW, found_CHW, class_id, found_class, radius)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given


@dataclass(frozen=True)
class AttackResult:
    """The results of one attack on N images; images inside a radius raise an error earlier."""

    name: str
    library: str
    parameters: Mapping[str, Any]
    distance_N: Float64[np.ndarray, " N"]
    """L2 to the nearest image of another class that was found; infinite where the attack failed."""
    radius_N: Float64[np.ndarray, " N"]
    """Radii of the same images without reference images."""
    best_N: Float64[np.ndarray, " N"]
    """The largest proved radii of the same images, with reference images; no distance is below them."""

    @property
    def flipped(self) -> int:
        """Number of images with an adversarial image at any distance."""
        return int(np.isfinite(self.distance_N).sum())

    @property
    def median_distance(self) -> float | None:
        """Over the flipped images."""
        return float(np.median(self.distance_N[np.isfinite(self.distance_N)])) if self.flipped else None

    @property
    def median_radius_over_distance(self) -> float | None:
        """Over the flipped images: tightness of the certificate as seen by this attack."""
        return self._median_over_distance(self.radius_N)

    @property
    def median_best_over_distance(self) -> float | None:
        """The same for the radius with reference images."""
        return self._median_over_distance(self.best_N)

    def as_card_entry(self) -> dict[str, Any]:
        """Return the entry in `attacks` of the card. `successes` counts images inside the radius, which would raise."""
        return {
            "name": self.name,
            "library": self.library,
            "norm": "l2",
            "inside": INSIDE,
            "parameters": dict(self.parameters),
            "n": len(self.distance_N),
            "successes": 0,
            "flipped_at_any_distance": self.flipped,
            "median_distance": self.median_distance,
            "median_radius": float(np.median(self.radius_N)),
            "median_radius_over_distance": self.median_radius_over_distance,
            "with_references": {
                "median_radius": float(np.median(self.best_N)),
                "median_radius_over_distance": self.median_best_over_distance,
            },
        }

    def _median_over_distance(self, radius_N: np.ndarray) -> float | None:
        flipped_N = np.isfinite(self.distance_N)
        return float(np.median(radius_N[flipped_N] / self.distance_N[flipped_N])) if self.flipped else None


def union(results: Sequence[AttackResult]) -> AttackResult:
    """Return, for each image, the smallest distance of all attacks."""
    return AttackResult(
        name="union",
        library="all of the above",
        parameters={"attacks": [result.name for result in results]},
        distance_N=np.min([result.distance_N for result in results], axis=0),
        radius_N=results[0].radius_N,
        best_N=results[0].best_N,
    )


_FGSM = {"loss": "margin", "random_start": False}
_PGD = {"loss": "margin", "rel_stepsize": 0.1, "steps": 40, "random_start": True}
_DEEPFOOL = {"steps": 50, "candidates": 10, "overshoot": 0.02, "loss": "logits"}
_CARLINI_WAGNER = {"binary_search_steps": 6, "steps": 100, "stepsize": 0.05, "initial_const": 1.0}
_AUTOATTACK = {"apgd_steps": 100, "apgd_restarts": 1, "square_queries": 200}

ATTACKS: dict[str, Mapping[str, Any]] = {
    "FGSM": _FGSM,
    "DeepFool": _DEEPFOOL,
    "PGD": _PGD,
    "Carlini-Wagner": _CARLINI_WAGNER,
    "AutoAttack": _AUTOATTACK,
}
"""Name -> parameters, as foolbox calls them, except those of AutoAttack and the loss of FGSM and PGD.

Where logits differ by little, the cross-entropy of foolbox points to all classes at once; the margin points to the
nearest one.
"""

_PACKAGES = {"AutoAttack": ("art", "adversarial-robustness-toolbox")}
_FOOLBOX = ("foolbox", "foolbox")


def require_libraries() -> None:
    """Refuse to start without the libraries.

    Raises:
        AttacksMissingError: a library is missing.
    """
    wanted = {_FOOLBOX, *_PACKAGES.values(), ("multiprocess", "multiprocess")}
    missing = sorted(package for module, package in wanted if util.find_spec(module) is None)
    if missing:
        raise AttacksMissingError(
            f"the attacks need {' and '.join(missing)}: install them with `pip install '.[evaluate]'`, or leave the "
            "attacks out with --no-attacks"
        )


def run_attacks(
    classifier: Classifier,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    best_N: Float64[np.ndarray, " N"],
    *,
    cache: PartialResults | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    runner: Runner | None = None,
    groups: Sequence[np.ndarray] | None = None,
) -> list[AttackResult]:
    """Return the result of each of `ATTACKS` on every image.

    Another class is one other than the predicted class, right or wrong: the certificate refers to that.

    Args:
        classifier: as it is served.
        image_NCHW: pixels in [0, 1].
        best_N: the largest proved radii of the images, with reference images; the attacks search and check these.
        cache: of finished parts; default: no part is stored.
        settings: everything that the parts depend on besides model, images and attack.
        seed: of random starts and directions, the same for each part.
        progress: show a progress bar.
        runner: of the parts; default: this process.
        groups: numbers of images that are attacked apart from others; default: one group of all.

    Raises:
        AttacksMissingError: a library is missing.
        CertificateRefutedError: an image of another class lies strictly inside a certified radius.
    """
    require_libraries()
    _, radii = classifier.classify(image_NCHW)
    class_id_N, radius_N = radii.class_id_N, radii.radius_N
    parts: list[np.ndarray] = []
    for group_M in [np.arange(len(image_NCHW))] if groups is None else groups:
        # Images of similar radii attack together: ART takes one epsilon for a batch.
        order_M = group_M[np.argsort(best_N[group_M], kind="stable")]
        parts += [order_M[start : start + BATCH] for start in range(0, len(order_M), BATCH)]
    attacks = [
        AttackResult(name, _library(name), parameters, np.full(len(image_NCHW), np.inf), radius_N, best_N)
        for name, parameters in ATTACKS.items()
    ]
    # All attacks on one part before the next part, so that the bar can estimate the remaining time.
    places = [(part_M, attack) for part_M in parts for attack in attacks]
    tasks: list[Task] = []
    for part_M, attack in places:
        arguments = (attack.name, image_NCHW[part_M], class_id_N[part_M], best_N[part_M], attack.parameters, seed)
        key = {
            **(settings or {}),
            "format": FORMAT,
            "model": classifier.digest,
            "images": digest_of(image_NCHW[part_M]),
            "radii": digest_of(best_N[part_M]),
            "attack": attack.name,
            "library": attack.library,
            "parameters": dict(attack.parameters),
            "multiples": MULTIPLES,
            "seed": seed,
        }
        tasks.append(Task(key, _attack, arguments))
    found = measured(tasks, runner or InProcess(classifier), cache)
    with tqdm(total=len(tasks), desc="attacks", unit="part", disable=not progress) as bar:
        for part_M, attack in places:
            bar.set_description(attack.name)
            attack.distance_N[part_M] = next(found)["distance"]
            bar.update()
    return attacks


def _attack(
    classifier: Classifier,
    name: str,
    image_NCHW: np.ndarray,
    class_id_N: np.ndarray,
    radius_N: np.ndarray,
    parameters: Mapping[str, Any],
    seed: int,
) -> Arrays:
    return AttackedBatch(classifier, name, image_NCHW, class_id_N, radius_N).attack(parameters, seed)


def _library(name: str) -> str:
    module, package = _PACKAGES.get(name, _FOOLBOX)
    return f"{module} {metadata.version(package)}"


@dataclass(frozen=True)
class AttackedBatch:
    """Images of similar radii, attacked together."""

    classifier: Classifier
    attack_name: str
    image_NCHW: Float64[np.ndarray, "N C H W"]
    class_id_N: Int64[np.ndarray, " N"]
    radius_N: Float64[np.ndarray, " N"]
    """Proved radii, inside which no image of another class may be found."""

    def attack(self, parameters: Mapping[str, Any], seed: int) -> Arrays:
        """Return the distances of the nearest adversarial images, as the array `distance`."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - ART draws from numpy's global generator
        with silenced_libraries(), on_one_thread():
            return {"distance": self.judge(self._search(parameters))}

    def _search(self, parameters: Mapping[str, Any]) -> Adversarials:
        if self.attack_name == "DeepFool":
            return self._foolbox_minimum("deepfool", "L2DeepFoolAttack", parameters)
        if self.attack_name == "Carlini-Wagner":
            return self._foolbox_minimum("carlini_wagner", "L2CarliniWagnerAttack", parameters)
        if self.attack_name == "AutoAttack":
            return self._at_multiples(autoattack_search(self.classifier, parameters))
        return self._at_multiples(gradient_search(self.classifier, self.attack_name, parameters))

    def judge(self, found_NCHW: Adversarials) -> Float64[np.ndarray, " N"]:
        """Return the distance of each adversarial image, after bisection towards the boundary; infinite without one.

        Raises:
            CertificateRefutedError: an image of another class is strictly inside the radius.
        """
        found_NCHW = np.where(np.isfinite(found_NCHW), np.clip(found_NCHW, 0.0, 1.0), self.image_NCHW)
        distance_N = self._distances(found_NCHW)
        # Attacks that only look for the nearest image of another class are tried inside the radius too.
        share_N = np.minimum(1.0, INSIDE * self.radius_N / np.maximum(distance_N, 1e-300))
        self._check_inside(self._between(found_NCHW, share_N))
        found_N = self._others(found_NCHW)
        nearest_NCHW = found_NCHW
        low_N, high_N = np.zeros(len(found_N)), np.ones(len(found_N))
        for _ in range(BISECTIONS if found_N.any() else 0):
            middle_N = 0.5 * (low_N + high_N)
            middle_NCHW = self._between(found_NCHW, middle_N)
            other_N = self._others(middle_NCHW)
            nearest_NCHW = np.where((other_N & found_N)[:, None, None, None], middle_NCHW, nearest_NCHW)
            low_N, high_N = np.where(other_N, low_N, middle_N), np.where(other_N, middle_N, high_N)
        self._check_inside(nearest_NCHW)
        return np.where(found_N, self._distances(nearest_NCHW), np.inf)

    def _between(self, found_NCHW: np.ndarray, share_N: np.ndarray) -> np.ndarray:
        step_NCHW = share_N[:, None, None, None] * (found_NCHW - self.image_NCHW)
        return np.clip(self.image_NCHW + step_NCHW, 0.0, 1.0)

    def _others(self, image_NCHW: np.ndarray) -> np.ndarray:
        return self.classifier.classify(image_NCHW)[1].class_id_N != self.class_id_N

    def _distances(self, other_NCHW: np.ndarray) -> np.ndarray:
        return np.array([distance(a, b) for a, b in zip(self.image_NCHW, other_NCHW, strict=True)])

    def _check_inside(self, other_NCHW: np.ndarray) -> None:
        class_N = self.classifier.classify(other_NCHW)[1].class_id_N
        for n in np.flatnonzero(class_N != self.class_id_N):
            if is_inside(self.image_NCHW[n], other_NCHW[n], float(self.radius_N[n])):
                raise CertificateRefutedError(
                    self.attack_name,
                    self.image_NCHW[n],
                    other_NCHW[n],
                    int(self.class_id_N[n]),
                    int(class_N[n]),
                    float(self.radius_N[n]),
                )

    def _at_multiples(self, search: Search) -> Adversarials:
        """Search larger and larger balls around the images that have not been flipped yet."""
        scale_N = np.maximum(self.radius_N, LEAST_SCALE)
        found_NCHW = self.image_NCHW.copy()
        left_M = np.arange(len(self.image_NCHW))
        for multiple in MULTIPLES:
            candidate_MCHW = search(
                self.image_NCHW[left_M], self.class_id_N[left_M], multiple * scale_N[left_M], multiple < 1
            )
            candidate_MCHW = np.where(
                np.isfinite(candidate_MCHW), np.clip(candidate_MCHW, 0.0, 1.0), self.image_NCHW[left_M]
            )
            other_M = self.classifier.classify(candidate_MCHW)[1].class_id_N != self.class_id_N[left_M]
            found_NCHW[left_M[other_M]] = candidate_MCHW[other_M]
            left_M = left_M[~other_M]
            if len(left_M) == 0:
                break
        return found_NCHW

    def _foolbox_minimum(self, module: str, attack: str, parameters: Mapping[str, Any]) -> Adversarials:
        """Run an attack of foolbox that minimises the distance by itself."""
        from importlib import import_module

        search = getattr(import_module(f"foolbox.attacks.{module}"), attack)(**parameters)
        return foolbox_adversarials(search, self.classifier, self.image_NCHW, self.class_id_N)


def save_evidence(refuted: CertificateRefutedError, path: Path) -> None:
    """Write both images of a refutation, float64, as the arrays `image` and `found` of an npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, image=refuted.image_CHW, found=refuted.found_CHW)
