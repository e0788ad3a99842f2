"""Test vectors: images with exact logits by the audit's ball arithmetic, and with those that the runtime computes.

Axes: N images, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flint import arb, ctx

from service.artefact.engines import model_logits
from service.audit.balls import NotAuditableError
from service.audit.derivation import derive
from service.audit.images import SentImage
from service.audit.preprocessing import preprocess
from service.certificate import Certificate
from service.certificate.radius import certified_radius, two_class_logits
from service.errors import ArtefactError, InputError, KeptError
from service.evidence.record import TestVector
from service.pixels.images import decode_image, image_digest, to_unit
from service.runtime.engine import Engine
from service.shapes import UInt8

_DIGITS = 192
_MOST_PIXELS = 2**26


class Picture(NamedTuple):
    """An 8-bit image of a test vector."""

    name: str
    pixels_CHW: UInt8[np.ndarray, "C H W"]


def built_in(shape: tuple[int, ...]) -> list[Picture]:
    """Return two images of random pixels, the same in every run, and two ramps of grey."""
    random = np.random.default_rng(0)
    steps = [np.round(np.linspace(0.0, 255.0, size)).astype(np.uint8) for size in shape[1:]]
    ramps = {"ramp-down": steps[0][:, None], "ramp-right": steps[1][None, :]}
    return [
        *(Picture(f"random-{n}", random.integers(0, 256, shape, dtype=np.uint8)) for n in range(2)),
        *(Picture(name, np.ascontiguousarray(np.broadcast_to(ramp, shape))) for name, ramp in ramps.items()),
    ]


def read_pictures(folder: Path, shape: tuple[int, ...]) -> list[Picture]:
    """Read the image files of a folder, by name.

    Raises:
        KeptError: the folder or a file of it cannot be read, or an image has not the shape of the model's.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        contents = [path.read_bytes() for path in files]
    except OSError as error:
        raise KeptError(f"{folder}: cannot be read ({error.strerror}); name a folder of image files") from error
    pictures: list[Picture] = []
    for path, content in zip(files, contents, strict=True):
        try:
            pixels_CHW = decode_image(content, max_pixels=_MOST_PIXELS)
        except InputError as error:
            raise KeptError(f"{path}: {error}") from error
        if pixels_CHW.dtype != np.uint8:
            raise KeptError(f"{path}: has 16 bits per channel; test vectors are images of 8 bits")
        if pixels_CHW.shape != shape:
            raise KeptError(
                f"{path}: an image of shape {pixels_CHW.shape} (channels, height, width); test vectors are images as "
                f"the model takes them, {shape}"
            )
        pictures.append(Picture(f"image-{len(pictures)} {path.name}", pixels_CHW))
    if not pictures:
        raise KeptError(f"{folder}: the folder holds no file; name a folder of image files")
    return pictures


def test_vectors(
    pictures: Sequence[Picture], model: Path, engine: Engine, certificate: Certificate, labels: Sequence[str]
) -> list[TestVector]:
    """Return the test vectors of some images.

    Args:
        pictures: images of the model's shape.
        model: the file `model.onnx`.
        engine: of its forward graph.
        certificate: of the model.
        labels: of its classes.

    Raises:
        ArtefactError: the audit reads no such model, or a computed logit is off by more than `logit_error`.
    """
    shape = (certificate.input_shape[0], certificate.input_shape[1], certificate.input_shape[2])
    units = [to_unit(picture.pixels_CHW) for picture in pictures]
    digests = [image_digest(unit_CHW) for unit_CHW in units]
    sent = [
        SentImage(shape, picture.pixels_CHW.ravel().tolist(), 255, digest)
        for picture, digest in zip(pictures, digests, strict=True)
    ]
    # Of the pixels, too, which are quotients by 255.
    ctx.prec = _DIGITS
    try:
        exact = derive(model.read_bytes(), [preprocess(image, shape) for image in sent], shape, _DIGITS).logits
    except NotAuditableError as error:
        reasons = "\n".join(f"  - {reason}" for reason in error.reasons)
        raise ArtefactError(model, f"exact logits cannot be derived, so there is no evidence:\n{reasons}") from error
    logits_NK = model_logits(engine, np.stack(units)).astype(np.float64)
    logits_NK = two_class_logits(logits_NK) if logits_NK.shape[1] == 1 else logits_NK
    radii = certified_radius(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
    vectors: list[TestVector] = []
    for n, picture in enumerate(pictures):
        ends = [(_fraction(ball.lower()), _fraction(ball.upper())) for ball in exact[n]]
        computed: list[float] = logits_NK[n].tolist()
        far = max(
            max(abs(Fraction(f) - low), abs(Fraction(f) - high)) for f, (low, high) in zip(computed, ends, strict=True)
        )
        if not far <= certificate.logit_error:
            raise ArtefactError(
                model,
                f"on {picture.name} the runtime is off by {float(far):.3g}, {certificate.logit_error:.3g} is proved; "
                "an assumption of docs/soundness.md does not hold on this machine",
            )
        vectors.append(
            TestVector(
                name=picture.name,
                file=f"vectors/{n:03}.npy",
                digest=digests[n],
                exact_logits=[(str(low), str(high)) for low, high in ends],
                width=_up(max(high - low for low, high in ends)),
                runtime_logits=computed,
                largest_difference=_up(far),
                class_id=int(radii.class_id_N[n]),
                label=labels[int(radii.class_id_N[n])],
                radius=float(radii.radius_N[n]),
                runner_up=int(radii.runner_up_N[n]),
            )
        )
    return vectors


def _fraction(end: arb) -> Fraction:
    mantissa, exponent = end.man_exp()
    return Fraction(int(mantissa)) * Fraction(2) ** int(exponent)


def _up(value: Fraction) -> float:
    return math.nextafter(float(value), math.inf)
