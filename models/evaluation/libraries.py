"""The served model as foolbox and ART see it, and the searches of these libraries.

Axes: N images, C channels, H height, W width, K classes, M images of one group.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from service.inference.classifier import Classifier

SIMILAR = 1.25
"""Largest quotient of radii in one batch of ART."""

BATCH = 100
"""Images in one part, the unit of progress: an interrupted run loses at most one part."""


class ServedModel(torch.nn.Module):
    """The served classifier as a torch module: images -> logits, in the precision of the images."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, image_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Return the logits by the forward graph; the gradient graph is their adjoint."""
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


Adversarials = Float64[np.ndarray, "N C H W"]
"""One image for each attacked image; its class may be the same."""
Search = Callable[[np.ndarray, np.ndarray, np.ndarray, bool], Adversarials]
"""(images, classes, radii of balls, whether these are certified) -> an image in or near each ball."""


def foolbox_adversarials(
    attack: Any, classifier: Classifier, image_NCHW: np.ndarray, class_id_N: np.ndarray, **options: Any
) -> Adversarials:
    """Return the images that an attack of foolbox finds for the served model.

    Args:
        attack: a foolbox attack.
        classifier: as it is served.
        image_NCHW: pixels in [0, 1].
        class_id_N: the predicted classes, which the attack has to leave.
        options: of `attack.run`.
    """
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel

    return attack.run(
        PyTorchModel(ServedModel(classifier).eval(), bounds=(0, 1), device="cpu"),
        torch.from_numpy(np.ascontiguousarray(image_NCHW)),
        Misclassification(torch.from_numpy(np.ascontiguousarray(class_id_N))),
        **options,
    ).numpy()


def gradient_search(classifier: Classifier, name: str, parameters: Mapping[str, Any]) -> Search:
    """Return the search of a ball by FGSM (one step to the sphere) or projected gradient descent of foolbox.

    Args:
        classifier: as it is served.
        name: `FGSM` or `PGD`.
        parameters: of the attack, as foolbox calls them.
    """
    from eagerpy.astensor import astensor
    from eagerpy.framework import onehot_like
    from foolbox.attacks.fast_gradient_method import L2FastGradientAttack
    from foolbox.attacks.gradient_descent_base import GDOptimizer, L2BaseGradientDescent, clip_lp_norms
    from foolbox.attacks.projected_gradient_descent import L2ProjectedGradientDescentAttack

    class OwnBalls(L2BaseGradientDescent):
        """One radius for each image of the batch, in place of foolbox's single radius."""

        radius_N: Tensor

        def get_loss_fn(self, model: Any, labels: Any) -> Any:
            """Return the negative margin: the largest other logit minus that of the predicted class."""

            def loss_fn(inputs: Any) -> Any:
                logits = model(inputs)
                own = onehot_like(logits, labels, value=1)
                beyond = 2 * (logits.max() - logits.min()) + 1
                return ((logits - beyond * own).max(axis=-1) - (logits * own).sum(axis=-1)).sum()

            return loss_fn

        def get_random_start(self, x0: Any, epsilon: float) -> Any:
            """Return images uniform in each ball."""
            del epsilon
            return super().get_random_start(x0, self._radius_N111())

        def get_optimizer(self, x: Any, stepsize: float) -> Any:
            """Return an optimiser with steps of `rel_stepsize` times the radius."""
            del stepsize
            return GDOptimizer(x, self.rel_stepsize * self._radius_N111())

        def project(self, x: Any, x0: Any, epsilon: float) -> Any:
            """Return the projection of the images onto their balls."""
            del epsilon
            return x0 + clip_lp_norms(x - x0, norm=astensor(self.radius_N), p=2)  # type: ignore[arg-type]

        def _radius_N111(self) -> Any:
            return astensor(self.radius_N[:, None, None, None])

    class Descent(OwnBalls, L2ProjectedGradientDescentAttack):
        pass

    class Step(OwnBalls, L2FastGradientAttack):
        pass

    attack = (Descent if name == "PGD" else Step)(**{key: parameters[key] for key in parameters if key != "loss"})

    def search(image_NCHW: np.ndarray, class_id_N: np.ndarray, ball_N: np.ndarray, certified: bool) -> Adversarials:
        del certified
        attack.radius_N = torch.from_numpy(ball_N)
        return foolbox_adversarials(attack, classifier, image_NCHW, class_id_N, epsilon=1.0)

    return search


def autoattack_search(classifier: Classifier, parameters: Mapping[str, Any]) -> Search:
    """Return the search of a ball by AutoAttack (Croce and Hein 2020) of ART: APGD and Square.

    APGD runs on the cross-entropy and, for three classes or more, on the logit ratio. ART's list also has DeepFool in
    place of FAB; here foolbox's DeepFool runs by itself. ART computes in float32 and takes one epsilon for a batch:
    balls whose radii differ by at most the factor `SIMILAR` are searched together, with the largest of their radii, or
    with the smallest where they are certified.
    """
    with suppress(NameError):
        # The first import on a machine writes a file, and fails where two processes begin that together.
        importlib.import_module("art.config")
    from art.attacks.attack import EvasionAttack
    from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    n_classes = len(classifier.labels)
    estimator = PyTorchClassifier(
        model=ServedModel(classifier).eval(),
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=classifier.input_shape,
        nb_classes=n_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    # ART's square is at least 3 pixels wide, grows by one to an odd side, and must leave a row and a column free.
    _, height, width = classifier.input_shape
    side = min(height, width)
    square_share = min(0.8, (side - 2) ** 2 / (height * width)) if side > 3 else 0.0
    losses = ["cross_entropy", *(["difference_logits_ratio"] if n_classes > 2 else [])]

    def at(epsilon: float) -> AutoAttack:
        attacks: list[EvasionAttack] = [
            *(
                AutoProjectedGradientDescent(
                    estimator,
                    norm=2,
                    eps=epsilon,
                    eps_step=2 * epsilon,
                    max_iter=parameters["apgd_steps"],
                    nb_random_init=parameters["apgd_restarts"],
                    batch_size=BATCH,
                    loss_type=loss,
                    verbose=False,
                )
                for loss in losses
            ),
        ]
        if square_share > 0:
            square = SquareAttack(
                estimator,
                norm=2,
                eps=epsilon,
                max_iter=parameters["square_queries"],
                p_init=square_share,
                nb_restarts=1,
                batch_size=BATCH,
                verbose=False,
            )
            attacks.append(square)
        return AutoAttack(estimator, norm=2, eps=epsilon, eps_step=2 * epsilon, attacks=attacks, batch_size=BATCH)

    def search(image_NCHW: np.ndarray, class_id_N: np.ndarray, ball_N: np.ndarray, certified: bool) -> Adversarials:
        found_NCHW = image_NCHW.copy()
        for group_M in groups_of_similar_size(ball_N):
            epsilon = float(ball_N[group_M].min() if certified else ball_N[group_M].max())
            # Its Square attack divides by the norm of a perturbation that may be 0.
            with np.errstate(divide="ignore", invalid="ignore"):
                found_NCHW[group_M] = at(epsilon).generate(image_NCHW[group_M], class_id_N[group_M])
        return found_NCHW

    return search


def groups_of_similar_size(size_N: np.ndarray) -> Iterator[np.ndarray]:
    """Yield groups of indices whose sizes differ by at most the factor `SIMILAR`."""
    order_N = np.argsort(size_N, kind="stable")
    start = 0
    for end in range(1, len(order_N) + 1):
        if end == len(order_N) or size_N[order_N[end]] > SIMILAR * size_N[order_N[start]]:
            yield order_N[start:end]
            start = end


@contextmanager
def silenced_libraries() -> Generator[None]:
    """Suppress log messages up to INFO: both libraries log every step."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def on_one_thread() -> Generator[None]:
    """Let torch compute on one thread: its sums depend on their number, which differs between processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
