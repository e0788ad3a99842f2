"""One loaded artefact: classes, certified radii and counterfactuals for images of any shape it can be asked
for.

Axes: N batch; C, H and W channels, height and width of the image that was sent; D, A and B of the one that the model
takes; K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.artefact import MODEL_FILE, TRANSPORT_FILE, Artefact, Card, read_artefact
from service.certificate import Certificate, Radii, certified_radius, two_class_logits
from service.counterfactual import Counterfactual, Differentiable, find_counterfactuals
from service.engine import Engine, GraphError, Provider, resolve_provider
from service.errors import (
    ArtefactError,
    ChannelsError,
    ImageSizeError,
    PixelRangeError,
    SideTooLongError,
    TargetIsPredictedClassError,
)
from service.preprocessing import LONGEST_SIDE, Preprocessing, conversion_between, preprocessing_between
from service.shapes import Float64

_log = logging.getLogger(__name__)

# Shapes whose certificate is kept: they are the client's choice, so there is a bound.
_CACHED_SHAPES = 64


@dataclass(frozen=True)
class Prediction:
    """The answer about one image; the radius is about the image that was sent, before any conversion and resize."""

    class_id: int
    logits_K: Float64[np.ndarray, " K"]
    """As computed; `(f, -f)` for a model with one output."""
    radius: float
    """L2, in [0, 1] pixel units, proved, rounded down; 0 where nothing is certified."""
    certified: bool
    runner_up: int
    """The class that decides the radius."""
    lipschitz_bound: float
    """`K_ij` of the margin between `class_id` and `runner_up`."""
    logit_error: float
    """Bound of |computed logit - exact logit|."""


class Classifier:
    """A model with its proof. All methods may be called from several threads at once."""

    name: str
    digest: str
    """`sha256:<hex>` of the bytes of `model.onnx` that are loaded, which are those that the certificate is
    about."""
    labels: tuple[str, ...]
    card: Card
    certificate: Certificate
    """About images of the model's own size."""
    provider: str
    """The execution provider that runs it, for example `CPUExecutionProvider`."""
    input_shape: tuple[int, int, int]
    """(D, A, B)."""

    def __init__(self, artefact: Artefact, model: Engine, transport: Engine) -> None:
        """Use `load`, unless the graphs are already loaded.

        Raises:
            ArtefactError: the two graphs do not agree on the logits.
        """
        self.card = artefact.card
        self.name = artefact.card.name
        self.digest = artefact.digest
        self.labels = tuple(artefact.card.labels)
        self.certificate = artefact.certificate
        self.provider = model.provider
        self.input_shape = artefact.card.input.shape
        self._model = model
        self._transport = transport
        self._views: dict[tuple[int, int, int], View] = {}
        self._check_transport(artefact.folder / TRANSPORT_FILE)

    @classmethod
    def load(cls, folder: Path, provider: Provider, threads: int) -> Classifier:
        """Read, prove and load the artefact in `folder`.

        Args:
            folder: holds `model.onnx`, `transport.onnx` and `card.json`.
            provider: `auto` takes CUDA where there is one.
            threads: threads inside one operator, at least 1.

        Raises:
            ArtefactError: a file is missing, damaged, without proof, or cannot be run.
            ProviderError: the provider cannot be had.
        """
        artefact = read_artefact(folder)
        resolved = resolve_provider(provider)
        engines: list[Engine] = []
        for file, graph in ((MODEL_FILE, artefact.model_bytes), (TRANSPORT_FILE, artefact.transport_bytes)):
            try:
                engines.append(Engine(graph, resolved, threads))
            except GraphError as error:
                raise ArtefactError(
                    folder / file,
                    f"ONNX Runtime cannot run the graph ({error}). Export it with operators it has.",
                ) from error
        classifier = cls(artefact, *engines)
        _log.info(
            "loaded model %s (%s) on %s: %d classes, images %s, logit error %.3g",
            classifier.name,
            classifier.digest,
            classifier.provider,
            len(classifier.labels),
            classifier.input_shape,
            classifier.certificate.logit_error,
        )
        return classifier

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        """The model as images of this shape, (C, H, W), see it; the same object for the same shape, while it is kept.

        Raises:
            ImageSizeError: another height or width than the model's, and `resize` is false.
            SideTooLongError: a side is too long to be resized.
            ChannelsError: a number of channels that there is no conversion of.
        """
        sent_channels, sent_height, sent_width = sent_shape
        channels, height, width = self.input_shape
        try:
            conversion_between(sent_channels, channels)
        except ValueError:
            takes = {1: "1 (grey) or 3 (RGB)", 3: "3 (RGB) or 1 (grey)"}.get(channels, str(channels))
            raise ChannelsError(
                f"the image has {sent_channels} channels and the model takes {takes}; send an image of that kind"
            ) from None
        if not resize and (sent_height, sent_width) != (height, width):
            raise ImageSizeError(sent_height, sent_width, height, width)
        for sent_side, side in ((sent_height, height), (sent_width, width)):
            if sent_side != side and max(sent_side, side) > LONGEST_SIDE:
                raise SideTooLongError(sent_side, side, LONGEST_SIDE)
        view = self._views.get(sent_shape)
        if view is None:
            view = self._view_of(sent_shape)
            if len(self._views) >= _CACHED_SHAPES:
                self._views.clear()
            self._views[sent_shape] = view
        return view

    def predict(self, image_NCHW: Float64[np.ndarray, "N C H W"], resize: bool = False) -> list[Prediction]:
        """`View.predict`, through the view of these images; raises what `view` does, too."""
        return self.view(image_NCHW.shape[1:], resize).predict(image_NCHW)

    def classify(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], resize: bool = False
    ) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """`View.classify`, through the view of these images."""
        return self.view(image_NCHW.shape[1:], resize).classify(image_NCHW)

    def margin_gradient(
        self,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        weights_NK: Float64[np.ndarray, "N K"],
        resize: bool = False,
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """`View.margin_gradient`, through the view of these images."""
        return self.view(image_NCHW.shape[1:], resize).margin_gradient(image_NCHW, weights_NK)

    def counterfactual(
        self,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        predictions: Sequence[Prediction],
        targets: Sequence[int | None],
        resize: bool = False,
    ) -> list[Counterfactual]:
        """The nearest image found with another class, for each image; see `find_counterfactuals`.

        Args:
            image_NCHW: the images of `predictions`.
            predictions: what `predict` answered about them with the same `resize`.
            targets: the class to reach for each image; None for the nearest other one.
            resize: as in `predict`. The search moves the pixels of the image that was sent.

        Raises:
            TargetIsPredictedClassError: an image already has its target's class; in a batch it is named.
            ImageSizeError: as in `view`.
        """
        view = self.view(image_NCHW.shape[1:], resize)
        self.check_targets(predictions, targets)
        return counterfactuals(view, image_NCHW, predictions, targets)

    def check_targets(self, predictions: Sequence[Prediction], targets: Sequence[int | None]) -> None:
        """Raise `TargetIsPredictedClassError` where an image has its target's class already; in a batch it is named."""
        for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            if target is not None and prediction.class_id == target:
                error = TargetIsPredictedClassError(self.labels[target])
                raise error.at_index(index) if len(predictions) > 1 else error

    def _view_of(self, sent_shape: tuple[int, int, int]) -> View:
        single_output = self._model.output_size == 1
        if sent_shape == self.input_shape:
            return View(self._model, self._transport, self.certificate, single_output, None)
        mapping = preprocessing_between(sent_shape, self.input_shape)
        certificate = self.certificate.after_preprocessing(mapping.norm, mapping.error_l2)
        return View(self._model, self._transport, certificate, single_output, mapping)

    def _check_transport(self, file: Path) -> None:
        """Both graphs must be of one network; otherwise no counterfactual would ever be reached."""
        view = self.view(self.input_shape)
        image_NCHW = np.linspace(0.0, 1.0, int(np.prod(self.input_shape))).reshape(1, *self.input_shape)
        weights_NK = np.zeros((1, len(self.labels)))
        weights_NK[0, :2] = (1.0, -1.0)
        try:
            logits_NK, _ = view.classify(image_NCHW)
            transport_NK, gradient_NCHW = view.margin_gradient(image_NCHW, weights_NK)
        except Exception as error:  # Whatever the runtime raises, the artefact cannot be served.
            raise ArtefactError(
                file, f"model.onnx or transport.onnx cannot be run ({error}). Export the artefact again."
            ) from error
        tolerance = 4.0 * self.certificate.logit_error + 1e-5 * (1.0 + np.abs(logits_NK).max())
        if (
            transport_NK.shape != logits_NK.shape
            or gradient_NCHW.shape != image_NCHW.shape
            or not np.allclose(transport_NK, logits_NK, rtol=0.0, atol=tolerance)
        ):
            raise ArtefactError(
                file,
                "its logits are not those of model.onnx, so it belongs to another network. Export both together.",
            )


@dataclass(frozen=True, eq=False)
class View:
    """The model as images of one shape see it: the one path from pixels that were sent to a class and a radius."""

    model: Engine
    transport: Engine
    certificate: Certificate
    single_output: bool
    preprocessing: Preprocessing | None

    def predict(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> list[Prediction]:
        """Class and certified radius of each image.

        Args:
            image_NCHW: pixels in [0, 1]. Where they are converted or resized for the model, the radius stays about the
                image that was sent.

        Raises:
            PixelRangeError: a pixel is NaN, infinite or outside [0, 1], where the proof says nothing.
        """
        if not ((image_NCHW >= 0.0) & (image_NCHW <= 1.0)).all():
            raise PixelRangeError("a pixel is NaN, infinite or outside [0, 1]; divide 8-bit pixels by 255")
        logits_NK, radii = self.classify(image_NCHW)
        logit_error = self.certificate.logit_error
        return [
            Prediction(class_id, logits_K, radius, certified, runner_up, lipschitz_bound, logit_error)
            for class_id, logits_K, radius, certified, runner_up, lipschitz_bound in zip(
                radii.class_id_N.tolist(),
                logits_NK,
                radii.radius_N.tolist(),
                radii.certified_N.tolist(),
                radii.runner_up_N.tolist(),
                radii.lipschitz_bound_N.tolist(),
                strict=True,
            )
        ]

    def classify(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """Logits and radii as arrays: what `predict` answers, without the check of the pixels."""
        seen_NDAB = image_NCHW if self.preprocessing is None else self.preprocessing(image_NCHW)
        (raw_NK,) = self.model.run(self.model.output_names[:1], {self.model.input_names[0]: seen_NDAB})
        logits_NK = _two_or_more(raw_NK)
        return logits_NK, certified_radius(logits_NK, self.certificate.margin_bounds_KK, self.certificate.logit_error)

    def margin_gradient(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], weights_NK: Float64[np.ndarray, "N K"]
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """Logits, and the gradient of `sum_k weights[k] logits[k]` with respect to the image that was sent."""
        seen_NDAB = image_NCHW if self.preprocessing is None else self.preprocessing(image_NCHW)
        if self.single_output:
            # One output f stands for the logits (f, -f): their weighted sum is (w_0 - w_1) f.
            weights_NK = weights_NK[:, :1] - weights_NK[:, 1:]
        raw_NK, gradient_NDAB = self.transport.run(
            ("logits", "gradient"), {"image": seen_NDAB, "margin_weights": weights_NK}
        )
        gradient = gradient_NDAB.astype(np.float64)
        return _two_or_more(raw_NK), (gradient if self.preprocessing is None else self.preprocessing.adjoint(gradient))


def counterfactuals(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    predictions: Sequence[Prediction],
    targets: Sequence[int | None],
) -> list[Counterfactual]:
    """`find_counterfactuals` from the answers of `View.predict`; `model` is the view that gave them."""
    return find_counterfactuals(
        model,
        image_NCHW,
        class_id_N=np.array([prediction.class_id for prediction in predictions], np.int64),
        runner_up_N=np.array([prediction.runner_up for prediction in predictions], np.int64),
        radius_N=np.array([prediction.radius for prediction in predictions], np.float64),
        n_classes=len(predictions[0].logits_K) if predictions else 0,
        target_N=np.array([-1 if target is None else target for target in targets], np.int64),
    )


def _two_or_more(raw_NK: np.ndarray) -> np.ndarray:
    logits_NK = raw_NK.astype(np.float64, copy=False)
    return two_class_logits(logits_NK) if logits_NK.shape[1] == 1 else logits_NK
