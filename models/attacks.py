"""Attacks from a public library (foolbox) on an artefact as it is served, kept inside the certified radius.

A success would refute the certificate: an image at an exactly computed distance below 0.999 of the radius that the
service gives another class. The attacks see the served graphs themselves: the forward pass is `model.onnx`, and since
`transport.onnx` computes vector-Jacobian products, the backward pass is that graph with the incoming gradient as
`margin_weights`.

Axes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch
from eagerpy.astensor import astensor
from foolbox.attacks.carlini_wagner import L2CarliniWagnerAttack
from foolbox.attacks.deepfool import L2DeepFoolAttack
from foolbox.attacks.gradient_descent_base import GDOptimizer, clip_lp_norms
from foolbox.attacks.projected_gradient_descent import L2ProjectedGradientDescentAttack
from foolbox.criteria import Misclassification
from foolbox.models.pytorch import PyTorchModel
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm import tqdm

from service.classifier import Classifier

INSIDE = 0.999
"""Share of the radius that an attack may use. The rest keeps the question away from rounding."""

BATCH = 250


@dataclass(frozen=True)
class AttackResult:
    """What one attack found on n certified images."""

    name: str
    parameters: Mapping[str, Any]
    n: int
    successes: int
    """Images inside `INSIDE` times the radius with another class; the promise is that there are none."""
    flipped: int
    """Images that got another class at any distance (attacks that are not confined to the ball)."""
    median_distance: float | None
    """L2, over the flipped ones."""
    median_radius: float
    library: str = field(default_factory=lambda: f"foolbox {metadata.version('foolbox')}")

    def as_card_entry(self) -> dict[str, Any]:
        """The entry in `attacks` of the card."""
        return {
            "name": self.name,
            "library": self.library,
            "norm": "l2",
            "inside": INSIDE,
            "parameters": dict(self.parameters),
            "n": self.n,
            "successes": self.successes,
            "flipped_at_any_distance": self.flipped,
            "median_distance": self.median_distance,
            "median_radius": self.median_radius,
        }


class ServedModel(torch.nn.Module):
    """The served classifier as a torch module: image N x C x H x W -> logits N x K, both float64."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, image_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Logits by `model.onnx`; their adjoint by `transport.onnx`."""
        return _Served.apply(image_NCHW, self._classifier)  # type: ignore[return-value]


class _Served(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image_NCHW: Tensor, classifier: Classifier) -> Tensor:  # type: ignore[override]
        ctx.classifier = classifier
        ctx.save_for_backward(image_NCHW)
        logits_NK, _ = classifier.classify(image_NCHW.detach().numpy().astype(np.float64, copy=False))
        return torch.from_numpy(logits_NK).to(image_NCHW.dtype)

    @staticmethod
    def backward(ctx: Any, weights_NK: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (image_NCHW,) = ctx.saved_tensors
        _, gradient_NCHW = ctx.classifier.margin_gradient(
            image_NCHW.numpy().astype(np.float64, copy=False), weights_NK.numpy().astype(np.float64, copy=False)
        )
        return torch.from_numpy(gradient_NCHW).to(image_NCHW.dtype), None


class _BallDescent(L2ProjectedGradientDescentAttack):
    """foolbox's projected gradient descent with a radius of its own for each image of the batch."""

    def __init__(self, radius_N: Tensor, **parameters: Any) -> None:
        super().__init__(**parameters)
        self._radius_N = astensor(radius_N)
        self._radius_N111 = astensor(radius_N[:, None, None, None])

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        """Uniform in each ball; foolbox's one radius for all is not read, here and below."""
        del epsilon
        return super().get_random_start(x0, self._radius_N111)  # type: ignore[arg-type]

    def get_optimizer(self, x: Any, stepsize: float) -> Any:
        """Steps of `rel_stepsize` times the radius."""
        del stepsize
        return GDOptimizer(x, self.rel_stepsize * self._radius_N111)  # type: ignore[arg-type]

    def project(self, x: Any, x0: Any, epsilon: float) -> Any:
        """Onto each ball."""
        del epsilon
        return x0 + clip_lp_norms(x - x0, norm=self._radius_N, p=2)  # type: ignore[arg-type]


_PGD = {"rel_stepsize": 0.1, "steps": 40, "random_start": True}
_DEEPFOOL = {"steps": 50, "candidates": 10, "overshoot": 0.02, "loss": "logits"}
_CARLINI_WAGNER = {"binary_search_steps": 6, "steps": 100, "stepsize": 0.05, "initial_const": 1.0}

ATTACKS: dict[str, Mapping[str, Any]] = {"DeepFool": _DEEPFOOL, "PGD": _PGD, "Carlini-Wagner": _CARLINI_WAGNER}
"""Name -> parameters, as foolbox calls them."""


def run_attacks(
    classifier: Classifier, image_NCHW: Float64[np.ndarray, "N C H W"], seed: int = 0, progress: bool = True
) -> list[AttackResult]:
    """Attack the first images inside their certified radii with each of `ATTACKS`.

    Images without a certificate promise nothing and are left out; what counts as another class is one other than the
    predicted one, right or wrong.
    """
    torch.manual_seed(seed)
    _, radii = classifier.classify(image_NCHW)
    kept_N = radii.certified_N
    image_NCHW, class_id_N, radius_N = image_NCHW[kept_N], radii.class_id_N[kept_N], radii.radius_N[kept_N]
    model = PyTorchModel(ServedModel(classifier).eval(), bounds=(0, 1), device="cpu")
    results: list[AttackResult] = []
    for name, parameters in ATTACKS.items():
        successes, distances = 0, list[float]()
        starts = range(0, len(image_NCHW), BATCH)
        for start in tqdm(starts, desc=name, unit="batch", disable=not progress):
            part = slice(start, start + BATCH)
            found_NCHW = _attack(name, parameters, model, image_NCHW[part], class_id_N[part], radius_N[part])
            inside, flipped = judge(classifier.classify, image_NCHW[part], found_NCHW, class_id_N[part], radius_N[part])
            successes += inside
            distances.extend(flipped)
        results.append(
            AttackResult(
                name=name,
                parameters=parameters,
                n=len(image_NCHW),
                successes=successes,
                flipped=len(distances),
                median_distance=float(np.median(distances)) if distances else None,
                median_radius=float(np.median(radius_N)) if len(radius_N) else 0.0,
            )
        )
    return results


def _attack(
    name: str,
    parameters: Mapping[str, Any],
    model: PyTorchModel,
    image_NCHW: np.ndarray,
    class_id_N: np.ndarray,
    radius_N: np.ndarray,
) -> np.ndarray:
    image = torch.from_numpy(np.ascontiguousarray(image_NCHW))
    criterion = Misclassification(torch.from_numpy(class_id_N))
    if name == "PGD":
        attack = _BallDescent(torch.from_numpy(INSIDE * radius_N), **parameters)
        found = attack.run(model, image, criterion, epsilon=1.0)
    elif name == "DeepFool":
        found = L2DeepFoolAttack(**parameters).run(model, image, criterion)
    else:
        found = L2CarliniWagnerAttack(**parameters).run(model, image, criterion)
    return found.numpy()


def judge(
    classify: Callable[[np.ndarray], tuple[np.ndarray, Any]],
    image_NCHW: Float64[np.ndarray, "N C H W"],
    found_NCHW: Float64[np.ndarray, "N C H W"],
    class_id_N: np.ndarray,
    radius_N: Float64[np.ndarray, " N"],
) -> tuple[int, list[float]]:
    """Count the images that refute their radius, and give the distances of all that got another class.

    An image found outside the ball is also pulled back to its surface, so that attacks which only look for the nearest
    adversarial image are tried inside the radius too.
    """
    delta_NCHW = found_NCHW - image_NCHW
    distance_N = np.array([exact_distance(a, b) for a, b in zip(image_NCHW, found_NCHW, strict=True)])
    share_N = np.minimum(1.0, INSIDE * (1 - 1e-9) * radius_N / np.maximum(distance_N, 1e-300))
    pulled_NCHW = np.clip(image_NCHW + share_N[:, None, None, None] * delta_NCHW, 0.0, 1.0)
    pulled_distance_N = np.array([exact_distance(a, b) for a, b in zip(image_NCHW, pulled_NCHW, strict=True)])
    found_other_N = classify(found_NCHW)[1].class_id_N != class_id_N
    pulled_other_N = classify(pulled_NCHW)[1].class_id_N != class_id_N
    limit_N = INSIDE * radius_N
    refuted_N = (found_other_N & (distance_N < limit_N)) | (pulled_other_N & (pulled_distance_N < limit_N))
    return int(refuted_N.sum()), distance_N[found_other_N].tolist()


def exact_distance(image: np.ndarray, other: np.ndarray) -> float:
    """L2 distance off by a few units in the last place: one rounding for each difference, squares summed exactly."""
    difference = (image - other).ravel()
    return math.sqrt(math.fsum((difference * difference).tolist()))
