"""One loaded artefact: classes, certified radii and counterfactuals for images of every shape that it accepts.

Axes: N batch; C, H and W channels, height and width of the image as sent; D, A and B of the input of the model; K
classes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from service.artefact.card import Card, check_card, parse_card, served_name
from service.artefact.engines import lazy_engines
from service.artefact.files import CARD_FILE, MODEL_FILE, digest, read_file
from service.artefact.findings import Findings
from service.artefact.samples import Sample, read_samples
from service.artefact.verified_files import VerifiedFiles
from service.certificate import Certificate, Radii, certified_radius, two_class_logits
from service.errors import (
    ChannelsError,
    ImageSizeError,
    PixelRangeError,
    SideTooLongError,
    TargetIsPredictedClassError,
    UnknownLabelError,
)
from service.inference.counterfactual import Counterfactual, Differentiable, find_counterfactuals
from service.inference.path import Waypoint
from service.inference.references import Provable, Reference, find_references
from service.inference.saliency import Saliency
from service.pixels.preprocessing import LONGEST_SIDE, Preprocessing, conversion_between, preprocessing_between
from service.runtime.engine import Runs
from service.runtime.provider import Provider, Resolved, load_on
from service.runtime.session import GpuLimits
from service.shapes import Float64

if TYPE_CHECKING:
    from service.artefact.signature import Signers

_log = logging.getLogger(__name__)

# Limit of cached views: clients choose the shapes.
_CACHED_SHAPES = 64


class Prediction(NamedTuple):
    """Results for one image; the radius is about the image as sent, before any conversion and resize."""

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
    counterfactual: Counterfactual | None = None
    """An image of another class, the nearest one found or one beyond; absent unless a request asks for it."""
    proof: Literal["fast", "best"] = "fast"
    """Whether reference images were searched for a larger radius: `best`."""
    references: tuple[Reference, ...] = ()
    """Images at which the radius is proved, one for each class whose radius at the image as sent is smaller."""
    path: tuple[Waypoint, ...] = ()
    """Images from the one that was sent to the counterfactual; empty unless a request asks for it."""
    saliency: Saliency | None = None
    """The gradient of the margin; absent unless a request asks for it."""
    novelty: tuple[Classifier, Prediction] | None = None
    """The guard and its prediction, class 0 known and class 1 novel; absent unless a request asks for it."""


class Classifier:
    """A model with its proof. All methods may be called from several threads at once."""

    name: str
    digest: str
    """`sha256:<hex>` of the bytes of `model.onnx` that are run and certified."""
    card_digest: str
    """`sha256:<hex>` of the bytes of `card.json` that were read."""
    files: VerifiedFiles
    labels: tuple[str, ...]
    card: Card
    certificate: Certificate
    """About images of the model's own size."""
    provider: str
    """The execution provider that runs it, for example `CPUExecutionProvider`."""
    input_shape: tuple[int, int, int]
    """(D, A, B)."""
    samples: tuple[Sample, ...]
    """Images of the artefact, if it has some."""
    is_warm: bool = False
    """Whether `warm_up` has loaded both graphs."""
    guard: Classifier | None = None
    """The novelty model that the option `novelty` asks, see `service.inference.novelty`."""

    def __init__(
        self, card: Card, files: VerifiedFiles, certificate: Certificate, model: Runs, transport: Runs
    ) -> None:
        """Use `load` or `from_findings`, which check the arguments against each other."""
        self.card, self.name, self.files = card, files.name, files
        self.digest, self.card_digest = files.digests[MODEL_FILE], files.digests[CARD_FILE]
        self.labels, self.certificate, self.provider = tuple(card.labels), certificate, model.provider
        self.input_shape, self.samples = card.input.shape, read_samples(files.folder, len(self.labels))
        self._model, self._transport = model, transport
        self._views: dict[tuple[int, int, int], View] = {}
        served = self.name, self.digest, self.provider, len(self.labels), self.input_shape, certificate.logit_error
        _log.info("proved model %s (%s) for %s: %d classes, images %s, logit error %.3g", *served)

    @classmethod
    def load(cls, folder: Path, provider: Provider, threads: int) -> Classifier:
        """Verify and load the artefact in `folder`, exactly as the server does, and run it once.

        Args:
            folder: holds `model.onnx` and `card.json`.
            provider: `auto` takes CUDA where it is available.
            threads: threads inside one operator, at least 1.

        Raises:
            ArtefactError: a file is missing, damaged, without proof, or cannot be run.
            ProviderError: the provider is not available, or the GPU does not run the graphs.
        """
        # Imported here: a server verifies in other processes and loads nothing for it.
        from service.artefact.verification import verify

        findings = verify(folder)

        def load(resolved: Resolved) -> Classifier:
            classifier = cls.from_findings(folder, findings, resolved, threads)
            classifier.warm_up()
            return classifier

        return load_on(provider, load)

    @classmethod
    def from_findings(
        cls,
        folder: Path,
        findings: Findings,
        provider: Resolved,
        threads: int,
        limits: GpuLimits | None = None,
        signers: Signers | None = None,
        content: bytes | None = None,
        version: str | None = None,
    ) -> Classifier:
        """Return the classifier of a verified artefact.

        Each graph is loaded when it is first run, from the bytes that the findings are about: a file that has changed
        by then is an `ArtefactChangedError`, and a GPU that does not run it a `ProviderError`.

        Args:
            folder: as in `load`.
            findings: of this run of the program, see `service.artefact.verification`.
            provider: of `resolve_provider`.
            threads: as in `load`.
            limits: of each graph on a GPU.
            signers: keys of which one must have signed the card; default: no signature is read.
            content: of `card.json`; default: it is read.
            version: of the model, where it has several.

        Raises:
            ArtefactError: the findings report a fault, or the card is not signed or not about these graphs.
        """
        card = parse_card(folder / CARD_FILE, content := _signed(folder / CARD_FILE, content, signers))
        check_card(folder, card, findings)
        name = served_name(folder, card, version)
        files = VerifiedFiles(folder, name, {MODEL_FILE: findings.digest, CARD_FILE: digest(content)})
        return cls(card, files, findings.facts().certificate, *lazy_engines(files, findings, provider, threads, limits))

    @property
    def is_lost(self) -> bool:
        """Whether the device that runs a graph has failed for good."""
        return self._model.is_lost or self._transport.is_lost

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered: the device works, and the files are those that were verified."""
        return not (self.is_lost or self.files.have_changed)

    def warm_up(self) -> None:
        """Load both graphs and run them once, so that a request finds memory and caches in place."""
        view = self.view(self.input_shape)
        view.margin_gradient(np.zeros((1, *self.input_shape)), np.zeros((1, len(self.labels))))
        view.classify(np.zeros((1, *self.input_shape)))
        self.is_warm = True

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        """Return the model for images of one shape, (C, H, W); the same object for the same shape, while it is cached.

        Raises:
            ImageSizeError: another height or width than the model's, and `resize` is false.
            SideTooLongError: a side is too long to be resized.
            ChannelsError: there is no conversion of this number of channels.
        """
        sent_channels, sent_height, sent_width = sent_shape
        channels, height, width = self.input_shape
        # The shape of a cached view has been checked, apart from its size.
        view = self._views.get(sent_shape)
        if view is not None and (resize or (sent_height, sent_width) == (height, width)):
            return view
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
        if view is None:
            view = self._view_of(sent_shape)
            if len(self._views) >= _CACHED_SHAPES:
                self._views.clear()
            self._views[sent_shape] = view
        return view

    def predict(self, image_NCHW: Float64[np.ndarray, "N C H W"], resize: bool = False) -> list[Prediction]:
        """Return `View.predict` through the view of these images; raise the errors of `view`, too."""
        return self.view(image_NCHW.shape[1:], resize).predict(image_NCHW)

    def classify(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], resize: bool = False
    ) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """Return `View.classify` through the view of these images."""
        return self.view(image_NCHW.shape[1:], resize).classify(image_NCHW)

    def margin_gradient(
        self,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        weights_NK: Float64[np.ndarray, "N K"],
        resize: bool = False,
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """Return `View.margin_gradient` through the view of these images.

        Args:
            image_NCHW: pixels in [0, 1].
            weights_NK: of the logits.
            resize: as in `predict`.
        """
        return self.view(image_NCHW.shape[1:], resize).margin_gradient(image_NCHW, weights_NK)

    def counterfactual(
        self,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        predictions: Sequence[Prediction],
        targets: Sequence[int | None],
        resize: bool = False,
    ) -> list[Counterfactual]:
        """Return the nearest image found with another class, for each image; see `find_counterfactuals`.

        Args:
            image_NCHW: the images of `predictions`.
            predictions: results of `predict` for them with the same `resize`.
            targets: target class of each image; null for the nearest other class.
            resize: as in `predict`. The search moves the pixels of the image as sent.

        Raises:
            TargetIsPredictedClassError: an image already has its target class; in a batch the error names the image.
            ImageSizeError: as in `view`.
        """
        view = self.view(image_NCHW.shape[1:], resize)
        self.check_targets(predictions, targets)
        return counterfactuals(view, image_NCHW, predictions, targets)

    def class_of(self, label: str) -> int:
        """Return the class with this label.

        Raises:
            UnknownLabelError: the model has no such label; the error lists its labels.
        """
        if label not in self.labels:
            raise UnknownLabelError(label, self.labels)
        return self.labels.index(label)

    def check_targets(self, predictions: Sequence[Prediction], targets: Sequence[int | None]) -> None:
        """Raise `TargetIsPredictedClassError` if an image already has its target class; in a batch name the image."""
        for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            if target is not None and prediction.class_id == target:
                error = TargetIsPredictedClassError(self.labels[target])
                raise error.at_index(index) if len(predictions) > 1 else error

    def _view_of(self, sent_shape: tuple[int, int, int]) -> View:
        single_output = self.certificate.n_outputs == 1
        if sent_shape == self.input_shape:
            return View(self._model, self._transport, self.certificate, single_output, None)
        mapping = preprocessing_between(sent_shape, self.input_shape)
        certificate = self.certificate.after_preprocessing(mapping.norm, mapping.error_l2)
        return View(self._model, self._transport, certificate, single_output, mapping)


@dataclass(frozen=True, eq=False)
class View:
    """The model for images of one shape: the only path from pixels as sent to a class and a radius."""

    model: Runs
    transport: Runs
    certificate: Certificate
    single_output: bool
    preprocessing: Preprocessing | None

    def predict(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> list[Prediction]:
        """Return class and certified radius of each image.

        Args:
            image_NCHW: pixels in [0, 1]. If they are converted or resized for the model, the radius is still about the
                image as sent.

        Raises:
            PixelRangeError: a pixel is NaN, infinite or outside [0, 1], where the proof says nothing.
        """
        # Minimum and maximum are NaN if a pixel is, and no comparison with NaN is true.
        if image_NCHW.size and not (image_NCHW.min() >= 0.0 and image_NCHW.max() <= 1.0):
            raise PixelRangeError("a pixel is NaN, infinite or outside [0, 1]; divide 8-bit pixels by 255")
        logits_NK, radii = self.classify(image_NCHW)
        return list(
            map(
                Prediction,
                radii.class_id_N.tolist(),
                logits_NK,
                radii.radius_N.tolist(),
                radii.certified_N.tolist(),
                radii.runner_up_N.tolist(),
                radii.lipschitz_bound_N.tolist(),
                itertools.repeat(self.certificate.logit_error),
            )
        )

    def classify(self, image_NCHW: Float64[np.ndarray, "N C H W"]) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """Return logits and radii, the arrays behind `predict`, without the check of the pixels."""
        seen_NDAB = image_NCHW if self.preprocessing is None else self.preprocessing(image_NCHW)
        (raw_NK,) = self.model.run(("logits",), {"image": seen_NDAB})
        logits_NK = raw_NK.astype(np.float64, copy=False)
        if self.single_output:
            logits_NK = two_class_logits(logits_NK)
        return logits_NK, certified_radius(logits_NK, self.certificate.margin_bounds_KK, self.certificate.logit_error)

    def margin_gradient(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], weights_NK: Float64[np.ndarray, "N K"]
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """Return logits, and the gradient of `sum_k weights[k] logits[k]` with respect to the image as sent."""
        seen_NDAB = image_NCHW if self.preprocessing is None else self.preprocessing(image_NCHW)
        if self.single_output:
            # One output f stands for the logits (f, -f): their weighted sum is (w_0 - w_1) f.
            weights_NK = weights_NK[:, :1] - weights_NK[:, 1:]
        raw_NK, gradient_NDAB = self.transport.run(
            ("logits", "gradient"), {"image": seen_NDAB, "margin_weights": weights_NK}
        )
        logits_NK = raw_NK.astype(np.float64, copy=False)
        if self.single_output:
            logits_NK = two_class_logits(logits_NK)
        gradient = gradient_NDAB.astype(np.float64)
        return logits_NK, gradient if self.preprocessing is None else self.preprocessing.adjoint(gradient)


def _signed(path: Path, content: bytes | None, signers: Signers | None) -> bytes:
    content = read_file(path) if content is None else content
    if signers is not None:
        signers.check(path, content)
    return content


def with_references(
    model: Provable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    predictions: Sequence[Prediction],
    epsilons: Sequence[float | None],
    largest: Sequence[bool],
) -> list[Prediction]:
    """Return the answers of `View.predict` with the largest radii found, see `find_references`.

    Args:
        model: the view that gave the answers.
        image_NCHW: the images, pixels in [0, 1].
        predictions: one for each image.
        epsilons: radius that is wanted for each image, or null.
        largest: whether the search for an image goes on for the largest radius when that is reached.
    """
    if not predictions:
        return []
    proofs = find_references(
        model,
        image_NCHW,
        class_id_N=np.array([prediction.class_id for prediction in predictions], np.int64),
        logits_NK=np.array([prediction.logits_K for prediction in predictions], np.float64),
        epsilon_N=np.array([0.0 if epsilon is None else epsilon for epsilon in epsilons], np.float64),
        largest_N=np.array(largest, np.bool_),
    )
    return [
        prediction._replace(
            radius=proof.radius,
            certified=proof.radius > 0.0,
            runner_up=proof.runner_up,
            lipschitz_bound=proof.lipschitz_bound,
            proof="best",
            references=proof.references,
        )
        for prediction, proof in zip(predictions, proofs, strict=True)
    ]


def counterfactuals(
    model: Differentiable,
    image_NCHW: Float64[np.ndarray, "N C H W"],
    predictions: Sequence[Prediction],
    targets: Sequence[int | None],
) -> list[Counterfactual]:
    """Return `find_counterfactuals` for the answers of `View.predict`.

    Args:
        model: the view that gave the answers.
        image_NCHW: the images, pixels in [0, 1].
        predictions: one for each image.
        targets: target class of each image; null for the nearest other class.
    """
    return find_counterfactuals(
        model,
        image_NCHW,
        class_id_N=np.array([prediction.class_id for prediction in predictions], np.int64),
        runner_up_N=np.array([prediction.runner_up for prediction in predictions], np.int64),
        radius_N=np.array([prediction.radius for prediction in predictions], np.float64),
        n_classes=len(predictions[0].logits_K) if predictions else 0,
        target_N=np.array([-1 if target is None else target for target in targets], np.int64),
        logit_error=max((prediction.logit_error for prediction in predictions), default=0.0),
    )
