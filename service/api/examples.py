"""Computed examples for the documentation: a sample image of the default model's shape, and its answers."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from service.api.answers import describe, describe_in_full, in_words
from service.api.outputs import infer_reply
from service.api.schema import ModelsAnswer, Options
from service.api.tensors import InferOptions
from service.inference.classifier import Classifier
from service.inference.outcome import Outcome, compute
from service.pixels.images import decode_image, encode_png, to_unit

STATIC = Path(__file__).resolve().parent.parent / "static"
PAGES = STATIC.with_name("pages")
"""Not below `/static`, where they would have no security headers."""
SAMPLE_DIGIT = STATIC / "samples" / "mnist-7.png"
_MNIST_SHAPE = (1, 28, 28)
_MOST_NUMBERS = 16_384

Json = dict[str, Any]

EXPLAINED: Json = {"counterfactual": True, "strength": 2.0, "path": 3, "saliency": True}
"""Options of `explained_answer`."""


@dataclass(frozen=True)
class Examples:
    """A sample image and its answers."""

    png: bytes
    npy: bytes
    npy_batch: bytes
    answer: Json
    epsilon_answer: Json
    counterfactual_answer: Json
    explained_answer: Json
    models: Json
    model: Json
    infer: Json | None
    """Request of the Open Inference Protocol, without parameters; null for images of too many numbers."""
    infer_answer: Json
    explain_answer: Json
    """The same with the options of `counterfactual_answer`."""

    @property
    def base64(self) -> str:
        """Return the sample as the JSON field `image`."""
        return base64.b64encode(self.png).decode("ascii")


def make_examples(classifier: Classifier) -> Examples:
    """Classify a sample of the model's shape: an MNIST digit, or a ramp for other shapes than MNIST's."""
    pixels_CHW = _sample(classifier.input_shape)
    image_NCHW = to_unit(pixels_CHW)[np.newaxis]

    plain, epsilon, counterfactual, explained = (
        compute(classifier, image_NCHW, options)
        for options in (
            Options(),
            Options(epsilon=0.5),
            Options(epsilon=0.5, counterfactual=True),
            Options(**EXPLAINED),
        )
    )

    def words(outcome: Outcome[Options]) -> Json:
        (answer,) = in_words(outcome)
        return json.loads(to_json(answer, inf_nan_mode="null"))

    def tensors(outcome: Outcome[Options]) -> Json:
        return json.loads(infer_reply(outcome, InferOptions()).content)

    return Examples(
        # Image files have 1 or 3 channels; a model with another number takes arrays only.
        png=encode_png(pixels_CHW if len(pixels_CHW) in (1, 3) else pixels_CHW[:1]),
        npy=_npy(pixels_CHW),
        npy_batch=_npy(np.stack([pixels_CHW, pixels_CHW])),
        answer=words(plain),
        epsilon_answer=words(epsilon),
        counterfactual_answer=words(counterfactual),
        explained_answer=words(explained),
        models=json.loads(ModelsAnswer(models=[describe(classifier, True, [])], broken=[]).model_dump_json()),
        model=json.loads(describe_in_full(classifier, True, []).model_dump_json()),
        infer=None
        if pixels_CHW.size > _MOST_NUMBERS
        else {
            "inputs": [
                {
                    "name": "image",
                    "shape": [1, *pixels_CHW.shape],
                    "datatype": "UINT8",
                    "data": pixels_CHW.ravel().tolist(),
                }
            ]
        },
        infer_answer=tensors(plain),
        explain_answer=tensors(counterfactual),
    )


def _sample(input_shape_CHW: tuple[int, int, int]) -> np.ndarray:
    if input_shape_CHW == _MNIST_SHAPE:
        return decode_image(SAMPLE_DIGIT.read_bytes(), max_pixels=28 * 28)
    row = np.linspace(0, 255, input_shape_CHW[2]).round().astype(np.uint8)
    return np.broadcast_to(row, input_shape_CHW).copy()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
