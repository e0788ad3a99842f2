"""The wire: what requests and answers look like.

Distances and radii are L2 norms over all pixels and channels of the image that was sent, in [0, 1] pixel units.
Floats are written with the fewest digits that read back as the same float64 (Python's `repr`), so no radius grows on
its way. A value that is not finite, which only an abstention can hold, is written as null.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ImageOptions(_Wire):
    """What a request may ask of a model."""

    counterfactual: bool = False
    """Whether to look for the nearest image of another class that the transport direction leads to."""

    target: str | None = None
    """Label that the counterfactual shall have; needs `counterfactual`. The nearest other class if absent."""

    resize: bool = False
    """Whether an image of another size is resized; otherwise it is refused. The radius stays about the image that was
    sent."""

    @model_validator(mode="after")
    def _target_needs_counterfactual(self) -> Self:
        if self.target is not None and not self.counterfactual:
            raise ValueError("target is the label wanted by the counterfactual; set counterfactual=true with it")
        return self


class Options(ImageOptions):
    """What a request may ask for besides its image; the same names in JSON, form fields and query."""

    model: str | None = None
    """Name of the model, one of `GET /models`; the default model if absent."""

    epsilon: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """Radius that the caller needs (L2, pixels in [0, 1]); asks for `robust_at_epsilon`."""


NO_OPTIONS = Options()
"""What a request without options asks for."""


class PredictRequest(Options):
    """One image with its options."""

    image: str
    """A PNG, JPEG, WEBP, BMP or GIF file, grey or RGB, as standard base64, in one line, without a `data:` prefix."""


class BatchRequest(Options):
    """Images of one size, all grey or all RGB, with options for all of them."""

    images: Annotated[list[str], Field(min_length=1)]
    """Each a file as in `PredictRequest.image`."""


class ClassLabel(_Wire):
    """A class of the model."""

    class_id: int
    """Index into `labels` and `logits`; a model with one output f has class 0 where f > 0."""
    label: str


class ImageAnswer(_Wire):
    """The image that this answer is about, as it was sent: decoded, before any conversion and resize.

    An answer that is kept names its image by `digest`; the radius counts the pixels of `shape`.
    """

    digest: str
    """`sha256:` and the SHA-256, in hexadecimal, of the ASCII line `CxHxW` with the numbers of `shape`, one newline,
    and the pixels in [0, 1] as little-endian float64 in C order; an 8-bit value v is v / 255, correctly rounded."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    conversion: Literal["rgb_to_grey", "grey_to_rgb"] | None
    """What was done to its channels for the model, within the certified map; null where they are the model's."""
    resized: bool
    """Whether it had another size than the model's and was resized, within the certified map."""


class CertificateAnswer(_Wire):
    """What is proved about this answer.

    Every valid image x' with `||x' - x||_2 < radius` gets the same class from this service.
    """

    norm: Literal["l2"] = "l2"
    radius: float
    """Proved radius in [0, 1] pixel units, rounded down; 0 where nothing is proved."""
    radius_255: float
    """`radius` * 255, rounded down: the same radius in units of 8-bit grey levels."""
    certified: bool
    """Whether a radius above 0 is proved; false is an abstention (a tie, or a margin within the error)."""
    epsilon: float | None
    """The option of the request; null when it was not given."""
    robust_at_epsilon: bool | None
    """Whether `certified` and `epsilon <= radius`: every change strictly smaller than epsilon keeps the
    class. Null when no epsilon was given."""
    runner_up: ClassLabel
    """The class j that decides the radius: the smallest `(f_i - f_j - 4 logit_error) / K_ij`."""
    lipschitz_bound: float | None
    """Proved bound `K_ij` of the L2 Lipschitz constant of `f_i - f_j`, seen from the image that was sent."""
    logit_error: float | None
    """Proved bound of |computed logit - exact logit| over all valid images."""


class CounterfactualAnswer(_Wire):
    """An 8-bit image near the one that was sent, classified again by the same path."""

    image: str
    """PNG file as base64, with the size and the channels of the image that was sent; posting it back with the same
    options gives the stated class."""
    media_type: Literal["image/png"] = "image/png"
    class_id: int
    label: str
    distance: float
    """L2 distance of the returned image to the one that was sent, in [0, 1] pixel units; never below `radius`
    where the class is another one."""
    reached: bool
    """Whether the class is the target, or, without a target, another than the predicted one."""


class PredictAnswer(_Wire):
    """Class, certified radius and, where asked for, a counterfactual of one image."""

    model: str
    digest: str
    """sha256 of the ONNX bytes that gave this answer."""
    class_id: int
    label: str
    logits: list[float | None]
    """As computed, one per class; `(f, -f)` for a model with one output f."""
    image: ImageAnswer
    certificate: CertificateAnswer
    counterfactual: CounterfactualAnswer | None
    """Null when not asked for."""


class BatchAnswer(_Wire):
    """Answers in the order of the images."""

    predictions: list[PredictAnswer]


class InputAnswer(_Wire):
    """Shape of the images that the model takes; pixels in [0, 1].

    Image files of the other kind, grey (1 channel) or RGB (3), are converted, and of another size resized where the
    option `resize` says so.
    """

    channels: int
    height: int
    width: int


class ModelSummary(_Wire):
    """One model that is served."""

    name: str
    default: bool
    """Whether it answers requests that name no model."""
    digest: str
    """sha256 of its `model.onnx`."""
    labels: list[str]
    input: InputAnswer
    lipschitz_bound: float | None
    """Proved bound of the L2 Lipschitz constant of the whole logit map."""
    logit_error: float | None
    """Proved bound of |computed logit - exact logit|."""
    provider: str
    """ONNX Runtime execution provider that serves it."""


class ModelsAnswer(_Wire):
    """What is served."""

    models: list[ModelSummary]


class ModelAnswer(ModelSummary):
    """One model: what is proved of it, and its card, which says what made it."""

    precision: str
    """Floating-point type of its graph; `logit_error` is about this one."""
    margin_bounds: list[list[float | None]]
    """K x K: `K_ij` bounds the L2 Lipschitz constant of `f_i - f_j`."""
    card: dict[str, Any]
    """`card.json` of the artefact: data, loss, seed, accuracy, attacks, licence."""


class HealthAnswer(_Wire):
    """State of the server."""

    status: Literal["live", "ready", "not ready"]


class Problem(BaseModel):
    """RFC 9457 problem details; `detail` says what was expected and what to do."""

    type: str
    """Kind of problem, stable: `urn:problem-type:lipcert:...`, or `about:blank` where the status says it
    all."""
    title: str
    status: int
    detail: str
    instance: str | None = None
    """Path of the request."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def radius_in_grey_levels(radius: float) -> float:
    """`radius * 255` rounded down: the product is exact in rationals, so a product rounded up is seen.

    Args:
        radius: L2, pixels in [0, 1]; finite, at least 0.
    """
    product = radius * 255.0
    if math.isinf(product):
        return math.nextafter(product, 0.0)
    # Compared as the integers that the two floats are, over a common denominator.
    above, below = product.as_integer_ratio()
    top, bottom = radius.as_integer_ratio()
    return math.nextafter(product, 0.0) if above * bottom > 255 * top * below else product


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
