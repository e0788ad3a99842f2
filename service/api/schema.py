"""The wire format: fields of requests and answers.

Distances and radii are L2 norms over all pixels and channels of the image that was sent, in [0, 1] pixel units.
Floats are written with the fewest digits that read back as the same float64 (Python's `repr`), so that no radius grows
in transit. A value that is not finite, which only an abstention can have, is written as null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _without_index(schema: dict[str, Any]) -> None:
    schema.pop("additionalProperties", None)


class _Answer(BaseModel):
    # A client that reads answers by this schema keeps the fields that a newer server adds. The document is silent about
    # them, which allows them: `additionalProperties: true` would hide misspelt fields in generated types.
    model_config = ConfigDict(
        extra="allow", frozen=True, use_attribute_docstrings=True, json_schema_extra=_without_index
    )


# Of fields that an answer has only where they are asked for.
_ABSENT = Field(exclude_if=lambda value: value is None)


@dataclass(frozen=True)
class Expected:
    """Annotation of a field: its valid values, for the message that refuses another one."""

    values: str


# An option is declared in `ImageOptions` or in `Options`, once: JSON objects, form fields, queries and the
# documentation follow.
class ImageOptions(_Request):
    """Options that concern the images of a request."""

    counterfactual: bool = False
    """Whether to search, along the transport direction, for the nearest image of another class."""

    proof: Annotated[Literal["fast", "best"], Expected("fast or best")] = "fast"
    """`best` searches, along the transport direction, for reference images at which a larger radius is proved."""

    epsilon: Annotated[
        Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None,
        Expected("a finite number of at least 0, the required L2 radius"),
    ] = None
    """Required radius (L2, pixels in [0, 1]), to be answered by `robust_at_epsilon`. Where the fast proof does not
    reach it, reference images are searched until one does. With `coverage` it is also the radius below which the image
    may be changed without the set losing the true class."""

    coverage: Annotated[
        Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] | None,
        Expected("a number above 0 and below 1, the probability with which the set holds the true class"),
    ] = None
    """Probability with which `set` holds the true class, however the image is changed below `epsilon` (default: not at
    all); requires a calibrated model."""

    max_error: Annotated[
        Annotated[float, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] | None,
        Expected("a number above 0 and below 1, the largest share of wrong predictions among the accepted ones"),
    ] = None
    """Largest share of wrong predictions among those with `decision` accept; requires a calibrated model."""

    novelty: bool = False
    """Whether the novelty model of the model says if the image is known to it; the card or the operator names one."""

    target: Annotated[str | None, Expected("a label of the model as a string")] = None
    """Target label of the counterfactual, requires `counterfactual`; default: the nearest other class."""

    strength: Annotated[
        float,
        Field(ge=1.0, le=3.0, allow_inf_nan=False),
        Expected("a number from 1 to 3, the distance of the counterfactual in units of the nearest one"),
    ] = 1.0
    """Distance of the counterfactual in units of the nearest one found, requires `counterfactual`: above 1 it is the
    image within that distance that is of the class reached with the largest margin found."""

    path: Annotated[
        Annotated[int, Field(ge=2, le=16)] | None,
        Expected("a whole number from 2 to 16, the images from the one that was sent to the counterfactual"),
    ] = None
    """Number of images in `counterfactual.path`, from the image that was sent to the counterfactual; requires
    `counterfactual` (default: no path)."""

    saliency: bool = False
    """Whether to return, as `saliency`, the gradient of the margin that decides the radius."""

    resize: bool = False
    """Whether to resize an image of another size than the model's; otherwise it is refused. The radius refers to the
    image that was sent."""

    background: Annotated[
        Annotated[str, Field(pattern=r"^#?[0-9a-fA-F]{6}$")] | None,
        Expected("a colour #rrggbb in hexadecimal, behind a transparent image; in a query %23rrggbb or rrggbb"),
    ] = None
    """Colour `#rrggbb` behind a transparent image file, which is composited onto it before anything else: 8-bit values
    v with alpha a become `(a v + (255 - a) b) / 255`, rounded to the nearest integer. Default: such a file is refused,
    unless it is opaque everywhere."""

    @model_validator(mode="after")
    def _options_of_the_counterfactual_need_it(self) -> Self:
        if self.counterfactual:
            return self
        if self.target is not None:
            raise ValueError("target is the target label of the counterfactual; set counterfactual=true with it")
        if self.strength != 1.0:
            raise ValueError("strength is that of the counterfactual; set counterfactual=true with it")
        if self.path is not None:
            raise ValueError("path leads to the counterfactual; set counterfactual=true with it")
        return self


class Options(ImageOptions):
    """All options of a request; the names are the same in JSON, form fields and query."""

    model: Annotated[str | None, Expected("the name of a model as a string, see /models")] = None
    """Name of the model, one of `GET /models`; default: the default model."""


NO_OPTIONS = Options()
"""The options of a request that gives no options."""


class PredictRequest(Options):
    """One image with its options."""

    image: Annotated[str, Expected("an image file as a base64 string")]
    """A PNG, JPEG, WEBP, BMP, GIF or TIFF file, grey or RGB, as standard base64 on one line, without a `data:`
    prefix."""


class BatchRequest(Options):
    """Images of one size, all grey or all RGB, with options that apply to all of them."""

    images: Annotated[
        list[str], Field(fail_fast=True, min_length=1), Expected("a list of at least one image file as base64 strings")
    ]
    """Image files, each encoded as `PredictRequest.image`."""


class ClassLabel(_Answer):
    """A class of the model."""

    class_id: int
    """Index into `labels` and `logits`; a model with one output f has class 0 where f > 0."""
    label: str


class ImageAnswer(_Answer):
    """The image to which this answer refers: as it was sent, decoded, before any conversion and resizing.

    An archived answer identifies its image by `digest`; the radius is measured over the pixels of `shape`.
    """

    digest: str
    """`sha256:` and the SHA-256, in hexadecimal, of the ASCII line `CxHxW` with the numbers of `shape`, one newline,
    and the pixels in [0, 1] as little-endian float64 in C order; an 8-bit value v is v / 255, and a 16-bit value
    v / 65535, correctly rounded."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    conversion: Literal["rgb_to_grey", "grey_to_rgb"] | None
    """Conversion of the channels for the model, part of the certified map; null where the channels are the model's."""
    resized: bool
    """Whether the image was resized to the model's size, as part of the certified map."""
    background: Annotated[str | None, _ABSENT] = None
    """The option of the request, from which the pixels of a transparent file follow. Absent without it."""


class ReferenceAnswer(_Answer):
    """An image at which the radius is proved against one class; see "Reference images" in docs/soundness.md."""

    class_id: int
    """The class against which it is proved."""
    image: str
    """The image as base64, with the size and the channels of the image that was sent."""
    media_type: Literal["image/png", "application/x-npy"]
    """A PNG file, or an npy array C x H x W of pixels in [0, 1] where the image that was sent is not 8-bit grey or
    RGB."""
    digest: str
    """As `ImageAnswer.digest`."""


class CertificateAnswer(_Answer):
    """The certificate of this answer.

    Every valid image x' with `||x' - x||_2 < radius` gets the same class from this service.
    """

    norm: Literal["l2"]
    radius: float
    """Certified radius in [0, 1] pixel units, rounded down; 0 where nothing is certified."""
    radius_255: float
    """`radius` * 255, rounded down: the same radius in units of 8-bit grey levels."""
    certified: bool
    """Whether a radius above 0 is certified; false is an abstention (a tie, or a margin within the error)."""
    epsilon: float | None
    """The option of the request; null if absent."""
    robust_at_epsilon: bool | None
    """Whether `certified` and `epsilon <= radius`: every change with a norm strictly below epsilon leaves the class
    unchanged. Null without epsilon."""
    runner_up: ClassLabel
    """The class j that determines the radius: the smallest `(f_i - f_j - 4 logit_error) / K_ij`, or with a reference
    image `sqrt(((f_i - f_j - 4 logit_error) / K_ij)^2 - c)`, with the logits at that image and the cost c of the way
    to it."""
    lipschitz_bound: float | None
    """Proved bound `K_ij` of the L2 Lipschitz constant of `f_i - f_j`, with respect to the image that was sent."""
    logit_error: float | None
    """Proved bound of |computed logit - exact logit| over all valid images."""
    proof: Literal["fast", "best"]
    """`best` if reference images were searched."""
    references: list[ReferenceAnswer]
    """One for each class against which the image that was sent proves less than `radius`."""


class WaypointAnswer(_Answer):
    """One image of the path to the counterfactual, classified by the same path as every image."""

    image: str
    """The image as base64, as in `CounterfactualAnswer`; sending it gives the stated class and radius."""
    media_type: Literal["image/png", "application/x-npy"]
    class_id: int
    label: str
    margin: float | None
    """`f_i - f_j` of this class i and the class j that determines the radius, as computed."""
    radius: float
    """Certified radius of this image, proved without reference images; 0 where nothing is certified."""
    distance: float
    """L2 distance between this image and the image that was sent, in [0, 1] pixel units."""


class CounterfactualAnswer(_Answer):
    """An 8-bit image near the image that was sent, classified again by the same path."""

    image: str
    """The image as base64, with the size and the channels of the image that was sent; sending it with the same options
    gives the stated class."""
    media_type: Literal["image/png", "application/x-npy"]
    """A PNG file, or an npy array C x H x W (uint8) where the image is neither grey nor RGB."""
    class_id: int
    label: str
    distance: float
    """L2 distance between this image and the image that was sent, in [0, 1] pixel units; never below `radius` where
    the classes differ."""
    reached: bool
    """Whether the class is the target, or, without a target, another class than the predicted one."""
    nearest_distance: Annotated[float | None, _ABSENT] = None
    """Distance of the nearest counterfactual found; `distance` is at most `strength` times that. Absent unless
    `strength` is above 1 and `reached`."""
    path: Annotated[list[WaypointAnswer] | None, _ABSENT] = None
    """Images at equal steps from the image that was sent (if it is not 8-bit, the nearest 8-bit image) to the
    counterfactual, which is the last. Absent unless requested."""


class SaliencyAnswer(ClassLabel):
    """The transport direction at the image: the gradient of the margin `f_i - f_j` of the predicted class i and the
    class j that is named here, `certificate.runner_up`."""

    array: str
    """npy array as base64, float32, C x H x W like the image that was sent: the rise of the margin per unit of a pixel
    in [0, 1]. Its L2 norm is at most `lipschitz_bound`, up to rounding; it is computed, not proved."""
    media_type: Literal["application/x-npy"]
    overlay: str
    """PNG file as base64, for people: the image in grey, under red where a larger pixel raises the margin and blue
    where it lowers it, in proportion to the largest entry; channels are added."""


class NoveltyAnswer(_Answer):
    """Whether an image is novel, by the model that guards the one that answers, with the certificate of that decision.

    Every valid image x' with `||x' - x||_2 < radius` gets the same `novel` from this service.
    """

    model: str
    """Name of the novelty model."""
    digest: str
    """sha256 of its ONNX bytes."""
    novel: bool
    """Whether `score` is negative: the image is unlike those that the novelty model knows."""
    score: float | None
    """Its output f as computed, positive for a known image."""
    radius: float
    """Certified radius of `novel`, L2 over the image that was sent, in [0, 1] pixel units, rounded down; converted and
    resized as its own input requires, which is part of the proof."""
    certified: bool
    """Whether the radius is above 0."""


class PredictAnswer(_Answer):
    """Class, certified radius and, on request, a counterfactual of one image."""

    model: str
    digest: str
    """sha256 of the ONNX bytes that computed this answer."""
    card_digest: str
    """sha256 of `card.json`, from which the labels of this answer are, and the calibration of `set` and `decision`."""
    class_id: int
    label: str
    logits: list[float | None]
    """As computed, one per class; `(f, -f)` for a model with one output f."""
    image: ImageAnswer
    certificate: CertificateAnswer
    counterfactual: CounterfactualAnswer | None
    """Null unless requested."""
    saliency: Annotated[SaliencyAnswer | None, _ABSENT] = None
    """Absent unless requested."""
    coverage: float | None
    """The option of the request; null if absent."""
    set: list[ClassLabel] | None
    """Certified set, in class order: it holds the true class with probability `coverage` at least, whichever image
    within `epsilon` of the original was sent; the predicted class is always in it. The probability is over images like
    those of the calibration, not for this one. Null without coverage."""
    max_error: float | None
    """The option of the request; null if absent."""
    decision: Literal["accept", "abstain"] | None
    """`accept` if the certified radius is so large that, on calibration images, at most `max_error` of such predictions
    are wrong, with confidence 95 %. It is about unchanged images. Null without max_error."""
    novelty: Annotated[NoveltyAnswer | None, _ABSENT] = None
    """Absent unless requested."""


class BatchAnswer(_Answer):
    """Answers in the order of the images."""

    predictions: list[PredictAnswer]


class InputAnswer(_Answer):
    """Shape of the images that the model accepts; pixels in [0, 1].

    Grey image files (1 channel) and RGB image files (3) are converted to the model's channels; another size is resized
    with the option `resize`.
    """

    channels: int
    height: int
    width: int


class ModelSummary(_Answer):
    """One served model."""

    name: str
    """Of a version, `NAME:VERSION`."""
    version: str | None
    """Null for a model without versions."""
    aliases: list[str]
    """Further names that requests may use: of the highest version, the name without a number; and those of
    `LIPCERT_ALIASES`."""
    default: bool
    """Whether it answers requests that name no model."""
    digest: str
    """sha256 of its `model.onnx`."""
    card_digest: str
    """sha256 of its `card.json`, which holds labels and calibration."""
    labels: list[str]
    input: InputAnswer
    lipschitz_bound: float | None
    """Proved bound of the L2 Lipschitz constant of the whole logit map."""
    logit_error: float | None
    """Proved bound of |computed logit - exact logit|."""
    provider: str
    """ONNX Runtime execution provider that runs it, for example `CPUExecutionProvider`."""


class BrokenModel(_Answer):
    """A model that is not served."""

    name: str
    reason: str
    """Why its artefact could not be verified."""


class ModelsAnswer(_Answer):
    """The served models."""

    models: list[ModelSummary]
    broken: list[BrokenModel]
    """Models in the same folder that are not served: a request for one gets status 503."""


class ModelAnswer(ModelSummary):
    """One model, with its proved bounds and its card."""

    precision: str
    """Floating-point type of its graph, to which `logit_error` refers."""
    margin_bounds: list[list[float | None]] | None
    """K x K: `K_ij` bounds the L2 Lipschitz constant of `f_i - f_j`; null above 256 classes."""
    card: dict[str, Any]
    """`card.json` of the artefact: data, loss, seed, accuracy, attacks, licence."""
    samples: list[ClassLabel]
    """True class of each image `GET /models/{name}/samples/{n}`, n from 0; empty where the artefact has no samples."""
    rejected: str | None
    """Why the newer version in the folder of models is not served; null without one."""


class LiveAnswer(_Answer):
    """Liveness of the server."""

    status: Literal["live", "not live"]
    reasons: list[str] = []
    """Why a restart is needed, one sentence each; absent while the server is live."""


class ReadyAnswer(_Answer):
    """Readiness of the server."""

    status: Literal["ready", "not ready"]
    provider: str | None
    """ONNX Runtime execution provider of the default model; null where it is not loaded."""
    reasons: list[str] = []
    """Why the server is not ready, one sentence each; absent while it is."""


class Problem(BaseModel):
    """RFC 9457 problem details; `detail` states the cause, the expected value and the remedy."""

    type: str
    """Stable identifier of the kind of problem: `urn:problem-type:lipcert:...`, or `about:blank` where the status says
    everything."""
    title: str
    status: int
    detail: str
    instance: str | None = None
    """Path of the request."""
    request_id: str | None = None
    """`X-Request-ID` of the request, or the identifier that the server gave it."""

    model_config = ConfigDict(use_attribute_docstrings=True)
