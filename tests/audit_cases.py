"""Archived answers and derivations for the tests of the audit."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from client import Client
from flint import arb, ctx, fmpq
from onnx import helper

from service.api.app import create_app
from service.artefact.card import digest
from service.audit import Verdict, audit
from service.audit.balls import power
from service.audit.derivation import Derivation, derive
from service.audit.preprocessing import ModelInput
from service.certificate import certified_radius, certify, two_class_logits
from service.inference.classifier import Classifier
from service.settings import Settings

DIGITS = 192
Json = dict[str, Any]


@dataclass(frozen=True)
class Archived:
    """An answer with the image that was sent and the artefact that answered."""

    answer: Json
    image: bytes
    artefact: Path

    def check(
        self, folder: Path, answer: object = None, image: bytes | None = None, artefact: Path | None = None
    ) -> Verdict:
        """Audit these files, or others in place of some."""
        answer_file, image_file = folder / "answer.json", folder / "image"
        answer_file.write_text(json.dumps(self.answer if answer is None else answer))
        image_file.write_bytes(self.image if image is None else image)
        return audit(answer_file, image_file, self.artefact if artefact is None else artefact)

    def changed(self, **members: Any) -> Json:
        """Return a copy of the answer with other values of members; `a__b` is the member b of a."""
        answer = deepcopy(self.answer)
        for path, value in members.items():
            *outer, name = path.split("__")
            holder: Any = answer
            for key in outer:
                holder = holder[key]
            holder[name] = value
        return answer


def ask(client: Client, image: bytes, **options: Any) -> Json:
    """Return the answer of POST /predict to an image file or npy array."""
    kind = "application/x-npy" if image.startswith(b"\x93NUMPY") else "image/png"
    params = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
    response = client.post("/predict", content=image, headers={"Content-Type": kind}, params=params)
    assert response.status_code == 200, response.text
    return response.json()


def archive(client: Client, image: bytes, artefact: Path, **options: Any) -> Archived:
    """Ask for an answer of an artefact whose folder has its name."""
    return Archived(ask(client, image, model=artefact.name, **options), image, artefact)


def served(folder: Path, runner: Any) -> Client:
    """Return a client of one model, whose folder has its name."""
    loaded = {folder.name: Classifier.load(folder, "cpu", 1)}
    return Client(create_app(Settings(default_model=folder.name), loaded), runner)


def rational(value: arb) -> Fraction:
    """Return a number that a ball of radius 0 holds."""
    exact = value.fmpq()
    return Fraction(int(exact.p), int(exact.q))


def rational_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return 8-bit pixels as exact numbers in [0, 1]."""
    return np.vectorize(lambda v: Fraction(int(v), 255), otypes=[object])(pixels)


def derived(model: bytes, *images: np.ndarray) -> Derivation:
    """Return the derivation of images of 8-bit pixels in the model's shape."""
    ctx.prec = DIGITS
    inputs = [ModelInput([arb(fmpq(int(v), 255)) for v in pixels.ravel()], arb(1), power(-53)) for pixels in images]
    return derive(model, inputs, images[0].shape, DIGITS)


def computed(model: bytes, pixels: np.ndarray, dtype: type) -> np.ndarray:
    """Return the logits that ONNX Runtime computes for 8-bit pixels, 1 x K."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits = np.asarray(session.run(None, {"image": (pixels / 255).astype(dtype)[None]})[0], np.float64)
    return two_class_logits(logits) if logits.shape[1] == 1 else logits


def server_agrees(model: bytes, shape: tuple[int, ...], seed: int, dtype: type = np.float64) -> bool:
    """Return whether the audit proves the radius that the server would answer; its logits have to hold."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape)
    certificate, derivation = certify(model), derived(model, pixels)
    logits_NK, exact = computed(model, pixels, dtype), derivation.logits[0]
    radii = certified_radius(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
    for logit, ball in zip(logits_NK[0].tolist(), exact, strict=True):
        assert abs(arb(logit) - ball) <= derivation.logit_error
    if not radii.certified_N[0]:
        return True
    i, radius = int(radii.class_id_N[0]), arb(min(float(radii.radius_N[0]), float(np.sqrt(pixels.size))))
    surplus = [exact[i] - other - 2 * derivation.logit_error for other in exact]
    return all(radius * derivation.margin_bounds[i][j] <= surplus[j] for j in range(len(surplus)) if j != i)


def append_operators(artefact: Path, *operators: str) -> dict[str, str]:
    """Append operators, each named after itself, to the model of an artefact; return the digests of its answers."""
    model = onnx.load(artefact / "model.onnx")
    names = [f"before {operator}" for operator in operators]
    model.graph.node[-1].output[0] = names[0]
    for operator, before, after in zip(operators, names, [*names[1:], "logits"], strict=True):
        model.graph.node.append(helper.make_node(operator, [before], [after], name=operator.lower()))
    content = model.SerializeToString()
    (artefact / "model.onnx").write_bytes(content)
    card = json.loads((artefact / "card.json").read_text())
    card["graphs"]["model.onnx"] = digest(content)
    (artefact / "card.json").write_text(json.dumps(card))
    return {"digest": digest(content), "card_digest": digest((artefact / "card.json").read_bytes())}
