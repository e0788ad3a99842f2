"""Conversion of an ONNX file of other origin into an artefact: its network in canonical form, and a card of the facts.

Every reason against it is collected: of the reader, of the certifier, of the gradient, of names and labels.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from service.artefact.card import Card, InputShape, Origin, check_card, write_artefact
from service.artefact.files import MODEL_FILE, digest
from service.artefact.findings import Findings
from service.artefact.verification import verify_model
from service.certificate import certify
from service.certificate.proof_limits import ProofLimits
from service.errors import ArtefactError, ImportRefusedError
from service.network.adjoint import without_gradient
from service.network.operators import Constant, Operator, Tensor, UnsupportedModelError
from service.network.reader import Draft, read, read_draft
from service.network.writer import write

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Wish:
    """An artefact as the caller wants it."""

    name: str
    labels: tuple[str, ...] | None
    """In class order; null: `class 0`, `class 1` and so on."""
    shape: Shape | None
    """(C, H, W) of the images, for a file whose input has another shape."""
    work: float = 0.0
    """See `ProofLimits`."""


def convert(file: Path, wish: Wish, folder: Path | None) -> dict[str, Any]:
    """Return a report of an ONNX file as an artefact, and write the artefact.

    Args:
        file: to convert.
        wish: of the caller.
        folder: of the artefact; null: nothing is written.

    Raises:
        ImportRefusedError: the file cannot become the artefact; the error has every reason.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ImportRefusedError([f"it cannot be read: {error.strerror or error}"]) from error
    try:
        draft = _shaped(read_draft(content, wish.work), wish.shape)
    except UnsupportedModelError as error:
        raise ImportRefusedError(error.reasons) from error
    labels, wrong = _labels(draft, wish.labels)
    if draft.reasons or wrong:
        raise ImportRefusedError(_reasons(draft, wrong))
    # Read once more: its tensors are numbered as those of a file are.
    model_bytes = write(read(write(draft.network())))
    card = _card(file, content, wish.name, labels, draft)
    path = folder or file.parent
    # Constants that the file computes are numbers that its canonical form holds: they allow no further work.
    limits = ProofLimits(work=draft.work)
    try:
        if folder is not None:
            findings = write_artefact(folder, card, model_bytes, limits)
        else:
            findings = Findings(digest(model_bytes), verify_model(path, model_bytes, limits))
            check_card(path, card.model_copy(update={"graphs": {MODEL_FILE: digest(model_bytes)}}), findings)
    except ArtefactError as error:
        # The labels of the file's own nodes are in the draft.
        reasons = _reasons(draft, []) if isinstance(error.__cause__, UnsupportedModelError) else []
        raise ImportRefusedError(reasons or [error.reason]) from error
    return _report(card, findings)


def _report(card: Card, findings: Findings) -> dict[str, Any]:
    certificate = findings.facts().certificate
    return {
        "name": card.name,
        "digest": findings.digest,
        "origin": card.origin.model_dump() if card.origin is not None else None,
        "labels": card.labels,
        "input_shape": list(certificate.input_shape),
        "precision": certificate.precision,
        "lipschitz_bound": certificate.lipschitz_bound,
        "margin_bound": float(certificate.margin_bounds_KK.max()),
        "logit_error": certificate.logit_error,
    }


def _reasons(draft: Draft, others: Sequence[str]) -> list[str]:
    """Return all reasons against a draft, those of the reader first."""
    found = list(draft.reasons)
    if draft.image is not None:
        try:
            certify(draft)
        except UnsupportedModelError as error:
            found = list(error.reasons)
    found += [*without_gradient(draft.operators), *others]
    return list(dict.fromkeys(found))


def _card(file: Path, content: bytes, name: str, labels: Sequence[str], draft: Draft) -> Card:
    assert draft.image is not None
    channels, height, width = draft.image.shape
    try:
        return Card(
            name=name,
            labels=list(labels),
            input=InputShape(channels=channels, height=height, width=width),
            origin=Origin(file=file.name, digest=digest(content)),
        )
    except ValidationError as error:
        raise ImportRefusedError(
            f"{'.'.join(map(str, fault['loc'])) or 'the card'}: {fault['msg']}" for fault in error.errors()
        ) from error


def default_name(file: Path) -> str:
    """Return the name of a file as a name of a model; empty where no character is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-")[:100]


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(draft: Draft, given: Sequence[str] | None) -> tuple[Sequence[str], list[str]]:
    """Return the labels and the reasons against them."""
    if draft.output is None or len(draft.output.shape) != 1:
        return given or (), []
    (outputs,) = draft.output.shape
    classes = max(2, outputs)
    if given is None:
        return [f"class {number}" for number in range(classes)], []
    if len(given) != classes:
        what_counts = "a model with one output has two classes" if outputs == 1 else f"the model has {outputs} outputs"
        return given, [f"{len(given)} labels, and {classes} classes: {what_counts}; give one label for each, in order"]
    return given, []


# --- the shape of images ----------------------------------------------------------------------------------------------


def _shaped(draft: Draft, shape: Shape | None) -> Draft:
    """Return the draft of a network whose images are C x H x W, with the reasons against it."""
    image = draft.image
    if image is None:
        return draft
    if shape is None:
        if len(image.shape) == 3:
            return draft
        return _refused(
            draft,
            f"its input has the shape N x {_written(image.shape)}, and the service sends images N x C x H x W: name "
            f"their shape, whose pixels are read in the order C, H, W, with --shape C,H,W{_example(image.shape)}",
        )
    if image.shape == shape:
        return draft
    if math.prod(shape) != math.prod(image.shape):
        return _refused(
            draft,
            f"--shape {_written(shape)} has {math.prod(shape)} numbers, and its input {_written(image.shape)} has "
            f"{math.prod(image.shape)}",
        )
    channels, height, width = shape
    last = (height, width, channels)
    if len(image.shape) == 3 and image.shape != last and image.shape[0] != 1:
        return _refused(
            draft,
            f"--shape {_written(shape)} is another arrangement of its input {_written(image.shape)}: only the channels "
            "may move, from the end to the front",
        )
    number = 1 + max([image.number, *(result.number for one in draft.operators for result in one.results)])
    sent = Tensor(number, shape)
    if image.shape == last:
        first = Operator("Transpose", (sent,), (("perm", (0, 2, 3, 1)),), (image,), "--shape")
    else:
        target = Constant(np.array([0, *image.shape], np.int64))
        first = Operator("Reshape", (sent, target), (("allowzero", 0),), (image,), "--shape")
    return replace(draft, image=sent, operators=(first, *draft.operators))


def _refused(draft: Draft, reason: str) -> Draft:
    return replace(draft, reasons=(*draft.reasons, reason))


def _written(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def _example(shape: Sequence[int]) -> str:
    """Return shapes of square images with as many numbers; empty where there is no such shape."""
    size = math.prod(shape)
    squares = [
        f"{channels},{side},{side}"
        for channels, side in itertools.product((1, 3), (math.isqrt(size), math.isqrt(size // 3)))
        if channels * side * side == size
    ]
    if len(shape) == 2 and shape[0] > 1 and shape[1] > 1:
        squares = [_written((1, *shape))]
    return f", for example --shape {squares[0]}" if squares else ""
