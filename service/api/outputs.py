"""Answers of the Open Inference Protocol: the tensors of an outcome, as numbers in JSON or as bytes after it."""

from __future__ import annotations

import struct
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel
from pydantic_core import to_json

from service.api.answers import Reply, in_columns, references_in_words
from service.api.body import JSON, JSON_LENGTH, OCTETS
from service.api.compression import compressed
from service.api.schema import ImageOptions
from service.api.tensors import InferOptions, OutputRequest
from service.artefact.folders import version_in
from service.errors import OptionError
from service.errors.quotations import listed, quoted
from service.inference.classifier import Classifier
from service.inference.outcome import Outcome
from service.pixels.images import image_digest

OutputDatatype = Literal["FP64", "FP32", "INT64", "BOOL", "UINT8", "BYTES"]
_OUTPUTS: dict[str, OutputDatatype] = {
    "logits": "FP64",
    "class_id": "INT64",
    "radius": "FP64",
    "certified": "BOOL",
    "proof": "BYTES",
    "references": "BYTES",
    "image_digest": "BYTES",
    "counterfactual": "UINT8",
    "counterfactual_class_id": "INT64",
    "counterfactual_distance": "FP64",
    "counterfactual_reached": "BOOL",
    "counterfactual_nearest_distance": "FP64",
    "path": "UINT8",
    "path_class_id": "INT64",
    "path_margin": "FP64",
    "path_radius": "FP64",
    "path_distance": "FP64",
    "saliency": "FP32",
    "saliency_class_id": "INT64",
    "set": "BOOL",
    "decision": "BYTES",
    "novel": "BOOL",
    "novelty_score": "FP64",
    "novelty_radius": "FP64",
    "novelty_certified": "BOOL",
}
"""Outputs of every model, in order; those from `counterfactual` on only where they are requested."""
_CALIBRATED = ("set", "decision")
"""Outputs of calibrated models alone."""
_GUARDED = ("novel", "novelty_score", "novelty_radius", "novelty_certified")
"""Outputs of models with a novelty model alone."""
_DTYPES: dict[OutputDatatype, str] = {"FP64": "<f8", "FP32": "<f4", "INT64": "<i8", "BOOL": "?", "UINT8": "u1"}
# One packet of the network: shorter answers gain nothing.
_LEAST_COMPRESSED = 1400


class OutputTensor(BaseModel):
    """One output, flat in row-major order; a value that is not finite is null.

    A binary output has `parameters.binary_data_size` in the place of `data`.
    """

    name: str
    datatype: OutputDatatype
    shape: list[int]
    data: list[Any]


class InferAnswer(BaseModel):
    """A response of the protocol; the version of a model is the digest of its bytes."""

    model_name: str
    model_version: str
    id: str | None
    outputs: list[OutputTensor]


def outputs_of(classifier: Classifier) -> dict[str, tuple[OutputDatatype, list[int]]]:
    """Return datatype and shape of each output of a model by name; -1 is the number of images."""
    image, by_class = [-1, *classifier.input_shape], [-1, len(classifier.labels)]
    shapes = {"logits": by_class, "set": by_class, "counterfactual": image, "saliency": image, "path": [-1, *image]}
    shapes |= {name: [-1, -1] for name in _OUTPUTS if name.startswith("path_")}
    return {
        name: (datatype, shapes.get(name, [-1]))
        for name, datatype in _OUTPUTS.items()
        if (name not in _CALIBRATED or classifier.card.calibration is not None)
        and (name not in _GUARDED or classifier.guard is not None)
    }


def protocol_version(classifier: Classifier) -> str:
    """Return the version of a model in the protocol; of a model without versions its digest."""
    return version_in(classifier.name) or classifier.digest


def infer_reply(outcome: Outcome[ImageOptions], asked: InferOptions, coding: str = "") -> Reply:
    """Return the answer to a request: JSON, and after it the bytes of the outputs that are requested as binary data.

    Args:
        outcome: of the request.
        asked: the request.
        coding: content coding that the client asks for, or empty.

    Raises:
        OptionError: a requested output is not one of this answer.
    """
    columns = _columns(outcome)
    outputs: list[dict[str, Any]] = []
    tensors: list[bytes] = []
    for name, binary in _wanted(columns, asked):
        column = columns[name]
        output: dict[str, Any] = {"name": name, "datatype": _OUTPUTS[name], "shape": column.shape}
        if binary:
            tensors.append(_bytes(column, _OUTPUTS[name]))
            output["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            output["data"] = column.ravel().tolist()
        outputs.append(output)
    answer = {
        "model_name": outcome.classifier.card.name,
        "model_version": protocol_version(outcome.classifier),
        "id": asked.id,
        "outputs": outputs,
    }
    content = to_json(answer, inf_nan_mode="null")
    headers: dict[str, str] = {}
    if tensors:
        headers[JSON_LENGTH] = str(len(content))
        content = b"".join([content, *tensors])
    if coding and len(content) >= _LEAST_COMPRESSED:
        headers["Content-Encoding"] = coding
        content = compressed(content, coding)
    return Reply(content, OCTETS if tensors else JSON, headers)


def _columns(outcome: Outcome[ImageOptions]) -> dict[str, np.ndarray]:
    """Return the outputs of an answer by name, in order."""
    columns = in_columns(outcome)
    columns["references"] = np.array(
        [to_json(references_in_words(prediction)).decode() for prediction in outcome.predictions]
    )
    columns["image_digest"] = np.array([image_digest(image_CHW) for image_CHW in outcome.image_NCHW])
    return {name: columns[name] for name in _OUTPUTS if name in columns}


def _wanted(columns: dict[str, np.ndarray], asked: InferOptions) -> list[tuple[str, bool]]:
    """Return the names of the outputs to answer, and whether each is binary data."""
    by_default = asked.parameters.binary_data_output
    requested = asked.outputs or [OutputRequest(name=name) for name in columns]
    unknown = [output.name for output in requested if output.name not in columns]
    if unknown:
        raise OptionError(
            f"this answer has no output {quoted(unknown[0])}; available outputs: {listed(columns)} (those of the "
            "counterfactual require parameters.counterfactual=true, its nearest distance strength, those of the path "
            "path, those of the saliency saliency, those of the novelty model novelty, set requires coverage, decision "
            "max_error)"
        )
    return [
        (output.name, by_default if output.parameters.binary_data is None else output.parameters.binary_data)
        for output in requested
    ]


def _bytes(column: np.ndarray, datatype: OutputDatatype) -> bytes:
    if datatype == "BYTES":
        texts = [text.encode() for text in column.ravel().tolist()]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return column.astype(_DTYPES[datatype], copy=False).tobytes()
