"""The audit of a kept answer: what is true holds, what was tampered with is refused with its reason."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from math import inf, nextafter
from pathlib import Path
from typing import Any

import builders
import grimp
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Client
from encoding import encode, npy
from exact_graphs import BALLS, Program
from flint import arb, ctx, fmpq
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented
from random_graphs import Graph, GraphBuilder, seeded_graph

from service.__main__ import main
from service.api.app import create_app
from service.artefact.card import digest
from service.audit import Conclusion, Verdict, audit
from service.audit.derivation import Derivation, Sight, derive
from service.audit.exact import Matrix, NotAuditableError, float_numbers, gathered, power
from service.audit.operators import RULES
from service.audit.preprocessing import see
from service.audit.records import SentImage, read_image
from service.certificate import UnsupportedGraphError, certified_radius, certify, two_class_logits
from service.errors import KeptError
from service.inference.classifier import Classifier
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
ZOO = ROOT / "models" / "zoo"
SAMPLES = ROOT / "service" / "static" / "samples"
DIGITS = 192
Json = dict[str, Any]


def check(folder: Path, answer: object, image: bytes, artefact: Path) -> Verdict:
    answer_file, image_file = folder / "answer.json", folder / "image"
    answer_file.write_text(json.dumps(answer))
    image_file.write_bytes(image)
    return audit(answer_file, image_file, artefact)


def ask(client: Client, image: bytes, **options: Any) -> Json:
    kind = "application/x-npy" if image.startswith(b"\x93NUMPY") else "image/png"
    params = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
    response = client.post("/predict", content=image, headers={"Content-Type": kind}, params=params)
    assert response.status_code == 200, response.text
    return response.json()


def proved_radius(verdict: Verdict) -> float:
    found = re.search(r"audit: ([\d.e+-]+);", verdict.lines[0])
    assert found is not None, verdict.lines
    return float(found.group(1))


@pytest.fixture
def kept(client: Client, zoo: Path, grey_HW: np.ndarray) -> tuple[Json, bytes, Path]:
    """An answer of the grey model, the image and the artefact."""
    image = encode(grey_HW)
    answer = ask(client, image, model="grey", epsilon=0.01)
    assert answer["certificate"]["robust_at_epsilon"] is True
    return answer, image, zoo / "grey"


# --- true answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "uint8 npy", "float32 npy"])
@pytest.mark.parametrize("name", ["grey", "binary", "colour"])
def test_a_true_answer_holds(
    client: Client, zoo: Path, grey_HW: np.ndarray, colour_HWC: np.ndarray, tmp_path: Path, name: str, form: str
) -> None:
    pixels = colour_HWC if name == "colour" else grey_HW
    image = {"png": encode(pixels), "uint8 npy": npy(pixels), "float32 npy": npy((pixels / 255).astype(np.float32))}[
        form
    ]
    answer = ask(client, image, model=name)
    assert answer["certificate"]["certified"]
    verdict = check(tmp_path, answer, image, zoo / name)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    assert verdict.lines[0].startswith(f'holds: class {answer["class_id"]} ("{answer["label"]}"), radius ')
    assert len(verdict.lines) == 1


@pytest.mark.parametrize("size", [(4, 9), (13, 5), (2, 3), (40, 31)])
def test_a_resized_image_holds(client: Client, zoo: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    image = encode(np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8))
    answer = ask(client, image, model="grey", resize=True)
    assert answer["image"]["resized"]
    verdict = check(tmp_path, answer, image, zoo / "grey")
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines


@pytest.mark.parametrize(
    ("name", "shape"), [("grey", (4, 5, 3)), ("grey", (7, 9, 3)), ("colour", (4, 5)), ("colour", (9, 4))]
)
def test_a_converted_image_holds(client: Client, zoo: Path, tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    image = encode(np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8))
    answer = ask(client, image, model=name, resize=True)
    assert answer["image"]["conversion"] == ("rgb_to_grey" if name == "grey" else "grey_to_rgb")
    verdict = check(tmp_path, answer, image, zoo / name)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines


def test_the_only_answer_of_a_batch_holds_and_of_two_one_is_asked_for(
    client: Client, zoo: Path, grey_HW: np.ndarray, tmp_path: Path
) -> None:
    image = encode(grey_HW)
    text = base64.b64encode(image).decode()
    answers = [client.post("/predict/batch", json={"images": [text] * n, "model": "grey"}).json() for n in (1, 2)]
    assert check(tmp_path, answers[0], image, zoo / "grey").conclusion is Conclusion.HOLDS
    with pytest.raises(KeptError, match="2 predictions, and one is audited at a time"):
        check(tmp_path, answers[1], image, zoo / "grey")
    assert check(tmp_path, answers[1]["predictions"][1], image, zoo / "grey").conclusion is Conclusion.HOLDS


def test_an_answer_that_does_not_name_its_image_yet_holds(kept: tuple[Json, bytes, Path], tmp_path: Path) -> None:
    answer, image, artefact = kept
    del answer["image"]
    assert check(tmp_path, answer, image, artefact).conclusion is Conclusion.HOLDS
    # Then a picture with R = G = B was grey to a grey model.
    grey = read_image(tmp_path / "image", None, (1, 4, 5))
    pixels = np.array(grey.numerators, dtype=np.uint8).reshape(4, 5, 1)
    assert check(tmp_path, answer, encode(np.repeat(pixels, 3, axis=2)), artefact).conclusion is Conclusion.HOLDS
    coloured = np.concatenate([pixels, pixels, pixels // 2], axis=2)
    (line,) = check(tmp_path, answer, encode(coloured), artefact).lines
    assert line == (
        "undecided: class, logits and radius: the image has 3 channels, the model takes 1, and the answer records no "
        "conversion"
    )


@pytest.mark.parametrize(("name", "digit"), [("mnist-0-8", 8), ("mnist", 7)])
def test_an_answer_of_a_shipped_model_holds(runner: Any, tmp_path: Path, name: str, digit: int) -> None:
    loaded = {name: Classifier.load(ZOO / name, "cpu", 1)}
    image = (SAMPLES / f"mnist-{digit}.png").read_bytes()
    answer = ask(
        Client(create_app(Settings(default_model=name), loaded), runner), image, epsilon=0.3, counterfactual=True
    )
    verdict = check(tmp_path, answer, image, ZOO / name)
    assert verdict.conclusion is Conclusion.HOLDS, verdict.lines
    assert verdict.lines[0].endswith("; its counterfactual is not part of the audit")
    # What the server leaves on the table is its own slack, and little.
    radius = answer["certificate"]["radius"]
    assert radius <= proved_radius(verdict) <= radius * (1 + 1e-8)


def test_networks_of_the_trainer_with_convolutions_and_normalisation_hold(tmp_path: Path) -> None:
    import torch

    from models.export import emit_graphs
    from models.nets.layers.base import Chain
    from models.nets.layers.pooling import L2Pool2d, ScaledAvgPool2d
    from models.nets.layers.reshaping import Normalize
    from models.nets.layers.sorting import FullSort
    from models.nets.networks import LipschitzNetwork, convolutional_network, dense_network
    from models.recipes import Stage

    torch.manual_seed(0)
    conv = convolutional_network((2, 8, 8), [Stage(channels=8, blocks=2)], "none", (12,), 3)
    detector = convolutional_network((1, 6, 8), [Stage(channels=8)], "max", (8,), 1)
    norms = convolutional_network((1, 6, 8), [Stage(channels=8)], "l2", (8,), 3)
    pooled = dense_network((2, 2, 2), (8,), 3)
    body = Chain([Normalize([0.4, 0.5], [0.2, 0.3]), L2Pool2d(2), ScaledAvgPool2d(2), pooled.body])
    sort = dense_network((1, 4, 4), (12,), 1, activation="fullsort")
    assert any(isinstance(layer, FullSort) for layer in sort.body.modules())
    for network in (conv, detector, norms, LipschitzNetwork((2, 8, 8), body, pooled.head), sort):
        assert server_agrees(emit_graphs(network).model, network.input_shape, 5)


# --- tampered answers -------------------------------------------------------------------------------------------------


def swap(answer: Json) -> None:
    other = answer["certificate"]["runner_up"]["class_id"]
    answer["certificate"]["runner_up"] = {"class_id": answer["class_id"], "label": answer["label"]}
    answer["class_id"], answer["label"] = other, f"class {other}"


TAMPERED: dict[str, tuple[Callable[[Json], object], list[str]]] = {
    "class": (swap, ["class: the answer has", "radius: the answer states"]),
    "class out of range": (
        lambda a: a.update(class_id=9),
        ["class: 9 is none of the classes 0 to 2", "class:", "radius:"],
    ),
    "negative class": (lambda a: a.update(class_id=-1), ["class: -1 is none", "class:", "radius:"]),
    "label": (lambda a: a.update(label="seven"), ["label: the answer has 'seven'"]),
    "logit": (lambda a: a["logits"].__setitem__(1, a["logits"][1] + 1e-9), ["logits: logit 1 is"]),
    "logit that is not finite": (lambda a: a["logits"].__setitem__(0, None), ["logits: logit 0 is null"]),
    "too few logits": (lambda a: a["logits"].pop(), ["logits: the answer has 2, the card has 3 labels"]),
    "model": (lambda a: a.update(model="other"), ["model: the answer is of 'other', the artefact is 'grey'"]),
    "digest": (
        lambda a: a.update(digest=digest(b"")),
        ["digest: the answer names sha256:e3b0c442"],
    ),
    "norm": (lambda a: a["certificate"].update(norm="linf"), ["norm: 'linf'; l2 is audited"]),
    "radius": (
        lambda a: a["certificate"].update(radius=a["certificate"]["radius"] * 1.001),
        ["radius: the answer states"],
    ),
    "radius in grey levels": (
        lambda a: a["certificate"].update(radius_255=nextafter(a["certificate"]["radius"] * 255, inf)),
        ["radius_255: "],
    ),
    "certified": (
        lambda a: a["certificate"].update(certified=False),
        ["certified: false with a radius of", "robust_at_epsilon: true, expected false"],
    ),
    "radius 0": (
        lambda a: a["certificate"].update(radius=0.0, radius_255=0.0),
        ["certified: true with a radius of 0.0", "robust_at_epsilon: true, expected false"],
    ),
    "epsilon": (
        lambda a: a["certificate"].update(epsilon=5.0),
        ["robust_at_epsilon: true, expected false with epsilon 5.0"],
    ),
    "epsilon flag": (
        lambda a: a["certificate"].update(robust_at_epsilon=False),
        ["robust_at_epsilon: false, expected true"],
    ),
    "flag without epsilon": (
        lambda a: a["certificate"].update(epsilon=None),
        ["robust_at_epsilon: true, expected null"],
    ),
    "runner-up": (
        lambda a: a["certificate"]["runner_up"].update(class_id=a["class_id"]),
        ["runner-up: "],
    ),
    "label of the runner-up": (
        lambda a: a["certificate"]["runner_up"].update(label="x"),
        ["runner-up: the answer has 'x'"],
    ),
    "digest of the image": (
        lambda a: a["image"].update(digest=digest(b"")),
        ["image: the answer names sha256:e3b0c442"],
    ),
    "shape of the image": (
        lambda a: a["image"].update(shape=[3, 4, 5]),
        ["image: the answer states the shape (3, 4, 5)"],
    ),
    "conversion": (
        lambda a: a["image"].update(conversion="rgb_to_grey"),
        ["image: conversion is 'rgb_to_grey', expected null"],
    ),
    "resize": (lambda a: a["image"].update(resized=True), ["image: resized is true, expected false"]),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_answer_is_refused_with_its_reason(
    kept: tuple[Json, bytes, Path], tmp_path: Path, name: str
) -> None:
    answer, image, artefact = kept
    assert check(tmp_path, answer, image, artefact).conclusion is Conclusion.HOLDS
    tampered = copy.deepcopy(answer)
    change, reasons = TAMPERED[name]
    change(tampered)
    verdict = check(tmp_path, tampered, image, artefact)
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    assert len(verdict.failed) == len(reasons), verdict.lines
    for line, reason in zip(verdict.failed, reasons, strict=True):
        assert line.startswith(reason), verdict.lines


@pytest.mark.parametrize("name", ["grey", "binary", "colour"])
def test_the_largest_radius_that_holds_is_the_proved_one(
    client: Client, zoo: Path, grey_HW: np.ndarray, colour_HWC: np.ndarray, tmp_path: Path, name: str
) -> None:
    image = encode(colour_HWC if name == "colour" else grey_HW)
    answer = ask(client, image, model=name)
    proved = proved_radius(check(tmp_path, answer, image, zoo / name))
    assert proved >= answer["certificate"]["radius"]
    answer["certificate"]["radius"] = proved
    assert check(tmp_path, answer, image, zoo / name).conclusion is Conclusion.HOLDS
    answer["certificate"]["radius"] = nextafter(proved, inf)
    (line,) = check(tmp_path, answer, image, zoo / name).lines
    assert line == f"does not hold: radius: the answer states {nextafter(proved, inf)!r}, the audit proves {proved!r}"


def test_another_image_is_refused(kept: tuple[Json, bytes, Path], grey_HW: np.ndarray, tmp_path: Path) -> None:
    answer, _, artefact = kept
    changed = grey_HW.copy()
    changed[2, 3] ^= 1
    lines = check(tmp_path, answer, encode(changed), artefact).lines
    assert lines[0].startswith("does not hold: image: the answer names sha256:")
    assert any(line.startswith("does not hold: logits: logit 0") for line in lines)


@pytest.mark.parametrize("file", ["model.onnx", "transport.onnx"])
def test_other_bytes_of_a_graph_are_refused(kept: tuple[Json, bytes, Path], tmp_path: Path, file: str) -> None:
    answer, image, artefact = kept
    folder = Path(shutil.copytree(artefact, tmp_path / "artefact"))
    model = onnx.load(folder / file)
    model.doc_string = "changed"
    onnx.save(model, folder / file)
    lines = check(tmp_path, answer, image, folder).lines
    assert any(line.startswith(f"does not hold: {file}: the card states the digest sha256:") for line in lines)
    assert any(line.startswith("does not hold: digest: the answer names") for line in lines) == (file == "model.onnx")


def test_an_answer_of_another_artefact_is_not_read_against_this_one(
    kept: tuple[Json, bytes, Path], zoo: Path, tmp_path: Path
) -> None:
    answer, image, _ = kept
    lines = check(tmp_path, answer, image, zoo / "colour").lines
    assert lines[0].startswith("does not hold: digest: ")
    assert lines[-1].startswith("undecided: class, logits and radius: not checked")


# --- abstentions ------------------------------------------------------------------------------------------------------


def test_a_tie_holds_for_its_radius_of_0_and_leaves_the_class_open(runner: Any, tmp_path: Path) -> None:
    weight_KD = np.array([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0], [-1.0, -1.0, 0.0, 0.0]])
    builders.write(tmp_path / "tie", builders.linear(weight_KD, np.zeros(3), (1, 2, 2)), "tie")
    client = Client(
        create_app(Settings(default_model="tie"), {"tie": Classifier.load(tmp_path / "tie", "cpu", 1)}), runner
    )
    image = encode(np.full((2, 2), 51, dtype=np.uint8))
    answer = ask(client, image)
    assert answer["certificate"]["radius"] == 0.0
    verdict = check(tmp_path, answer, image, tmp_path / "tie")
    assert verdict.conclusion is Conclusion.HOLDS
    assert verdict.lines[0].startswith("holds: radius 0, which promises nothing; the class is not decided")
    answer["certificate"].update(radius=1e-300, certified=True)
    assert [line.partition(":")[2] for line in check(tmp_path, answer, image, tmp_path / "tie").lines] == [
        " radius: the answer states 1e-300, the audit proves 0.0"
    ]
    answer["certificate"].update(radius=0.0, certified=False, runner_up={"class_id": 0, "label": "class 0"})
    answer.update(class_id=2, label="class 2")
    assert "gives another class a larger logit" in check(tmp_path, answer, image, tmp_path / "tie").lines[0]


def test_a_class_that_no_image_changes_has_every_radius(runner: Any, tmp_path: Path) -> None:
    weight_KD = np.ones((2, 4))
    builders.write(tmp_path / "fixed", builders.linear(weight_KD, np.array([0.5, 0.0]), (1, 2, 2)), "fixed")
    classifier = Classifier.load(tmp_path / "fixed", "cpu", 1)
    client = Client(create_app(Settings(default_model="fixed"), {"fixed": classifier}), runner)
    image = encode(np.full((2, 2), 51, dtype=np.uint8))
    answer = ask(client, image)
    assert answer["certificate"]["radius"] > 1e300
    assert check(tmp_path, answer, image, tmp_path / "fixed").conclusion is Conclusion.HOLDS


# --- bounds against exact oracles -------------------------------------------------------------------------------------


def rational(value: arb) -> Fraction:
    exact = value.fmpq()
    return Fraction(int(exact.p), int(exact.q))


def derived(model: bytes, pixels: np.ndarray) -> Derivation:
    """The derivation of 8-bit pixels."""
    ctx.prec = DIGITS
    sight = Sight([arb(fmpq(int(v), 255)) for v in pixels.ravel()], arb(1), power(-53))
    return derive(model, sight, pixels.shape, DIGITS)


def rational_pixels(pixels: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda v: Fraction(int(v), 255), otypes=[object])(pixels)


def exact_logits(model: bytes, image: np.ndarray) -> list[arb]:
    """By code of the tests alone; one output f as (f, -f)."""
    logits = list(Program.parse(model).evaluate(image[None], BALLS)["logits"][0])
    return [logits[0], -logits[0]] if len(logits) == 1 else logits


def computed(model: bytes, pixels: np.ndarray, dtype: type) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits = session.run(None, {"image": (pixels / 255).astype(dtype)[None]})[0].astype(np.float64)
    return two_class_logits(logits) if logits.shape[1] == 1 else logits


def server_agrees(model: bytes, shape: tuple[int, ...], seed: int, dtype: type = np.float64) -> bool:
    """Whether the radius that the server would answer is proved by the audit, too; its logits have to hold."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape)
    certificate, derivation = certify(model), derived(model, pixels)
    logits_NK = computed(model, pixels, dtype)
    radii = certified_radius(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
    for logit, exact in zip(logits_NK[0].tolist(), derivation.logits, strict=True):
        assert abs(arb(logit) - exact) <= derivation.logit_error
    if not radii.certified_N[0]:
        return True
    i, radius = int(radii.class_id_N[0]), arb(min(float(radii.radius_N[0]), float(np.sqrt(pixels.size))))
    surplus = [derivation.logits[i] - other - 2 * derivation.logit_error for other in derivation.logits]
    return all(radius * derivation.margin_bounds[i][j] <= surplus[j] for j in range(len(surplus)) if j != i)


READ = (
    *("dense", "dense", "with_constant", "conv", "same_conv", "periodic_conv", "conv_transpose", "pool", "pointwise"),
    *("batch_normalization", "im2col", "sort", "reduce", "move", "move", "residual", "square_dense", "branches"),
)
"""Steps of random graphs; some have an operator that the audit does not read, and are refused."""


def graphs_that_are_read(seeds: range) -> Iterator[tuple[int, Graph]]:
    for seed in seeds:
        graph = seeded_graph(seed, READ)
        try:
            derived(graph.model, np.zeros(graph.shape, dtype=np.int64))
            computed(graph.model, np.zeros(graph.shape), graph.dtype)
        except (NotAuditableError, NotImplemented):
            # ONNX Runtime has no convolutions in float64.
            continue
        yield seed, graph


def test_the_radius_of_the_certifier_holds_on_random_graphs() -> None:
    # Here and there the certifier knows a construction that the audit does not: its bound is smaller then.
    agree: list[bool] = []
    for seed, graph in graphs_that_are_read(range(200)):
        with suppress(UnsupportedGraphError):
            agree.append(server_agrees(graph.model, graph.shape, seed, graph.dtype))
    assert len(agree) > 60
    assert sum(agree) >= 0.95 * len(agree)


def test_bounds_are_never_below_what_exact_logits_do() -> None:
    random = np.random.default_rng(0)
    looked_at = 0
    for seed, graph in graphs_that_are_read(range(1000, 1160)):
        looked_at += 1
        pixels = random.integers(1, 255, graph.shape)
        derivation, at = derived(graph.model, pixels), rational_pixels(pixels)
        exact = exact_logits(graph.model, at)
        stated = computed(graph.model, pixels, graph.dtype)[0].tolist()
        for ball, value, logit in zip(derivation.logits, exact, stated, strict=True):
            assert ball.overlaps(value), seed
            assert ball.rad() < 1e-30 * (1 + abs(value).upper()), seed
            assert not abs(arb(logit) - value) > derivation.logit_error, seed
        if len(exact) == 1:
            continue
        # The steepest step of one margin: along its gradient, by differences; the pieces are linear.
        i, j = (int(k) for k in random.permutation(len(exact))[:2])

        def margin(image: np.ndarray, model: bytes = graph.model, i: int = i, j: int = j) -> arb:
            logits = exact_logits(model, image)
            return logits[i] - logits[j]

        here, step = margin(at), np.zeros(at.size, dtype=object)
        for d in range(at.size):
            moved = at.copy()
            moved.reshape(-1)[d] += Fraction(1, 10**9)
            step[d] = rational(((margin(moved) - here) * 10**3).mid())
        change = margin(at + step.reshape(at.shape)) - here
        length = sum(step**2)
        bound = derivation.margin_bounds[i][j]
        assert not change * change > bound * bound * arb(fmpq(length.numerator, length.denominator)), seed
    assert looked_at > 60


def test_a_huge_bias_that_a_later_layer_cancels_is_paid_for(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(8, 4)), random.normal(size=(3, 8))
    shift = random.normal(size=8) * 1e9
    graphs = builders.dense(
        [(hidden, shift)],
        (head, -head @ np.concatenate([np.maximum(*np.split(shift, 2)), np.minimum(*np.split(shift, 2))])),
        (1, 2, 2),
    )
    assert derived(graphs.model, np.full((1, 2, 2), 100)).logit_error > 1e-6
    assert server_agrees(graphs.model, (1, 2, 2), 1)


def test_a_linear_classifier_has_its_closed_form_radius(
    zoo: Path, linear_weights: Mapping[str, Any], grey_HW: np.ndarray
) -> None:
    weight_KD, bias_K, shape = linear_weights["grey"]
    derivation = derived((zoo / "grey" / "model.onnx").read_bytes(), grey_HW.reshape(shape))
    exact = np.vectorize(Fraction, otypes=[object])
    weight_KD, x_D = exact(weight_KD), rational_pixels(grey_HW).ravel()
    logits_K = weight_KD @ x_D + exact(bias_K)
    for i in range(3):
        assert abs(rational(derivation.logits[i].mid()) - logits_K[i]) < Fraction(1, 2**150)
        for j in range(3):
            squared = ((weight_KD[i] - weight_KD[j]) ** 2).sum()
            bound = rational(derivation.margin_bounds[i][j]) ** 2
            assert squared <= bound <= squared * (1 + Fraction(1, 2**49))


def test_consecutive_linear_operators_are_one_matrix() -> None:
    # W and its inverse: as two maps 1e6, as one map 1.
    def build(b: GraphBuilder, x: str) -> str:
        for weight in (np.diag([1024.0, 1.0, 2.0**-10]), np.diag([2.0**-10, 1.0, 1024.0])):
            x = b.one("Gemm", x, b.constant(weight))
        left = b.one("Gemm", x, b.constant(-np.eye(3) / 2))
        return b.one("Add", x, left)

    b = GraphBuilder(np.random.default_rng(0))
    derivation = derived(b.model((3,), build(b, "image"), 3), np.array([10, 20, 30]))
    expected = np.sqrt(2) / 2
    assert expected * (1 - 1e-15) < float(derivation.margin_bounds[0][1]) < expected * (1 + 1e-15)


@pytest.mark.parametrize("operator", ["Concat", "Sub", "Max"])
def test_tensors_behind_different_nonlinearities_are_not_taken_for_one(operator: str) -> None:
    # relu(y) - y falls with slope 1 where y < 0; taken for a function of one tensor, its terms would cancel.
    b = GraphBuilder(np.random.default_rng(0))
    y = b.one("Sub", "image", b.constant(np.array(0.5)))
    parts = b.one("Relu", y), y
    if operator == "Concat":
        f = b.one("Gemm", b.one("Concat", *parts, axis=1), b.constant(np.array([[1.0], [-1.0]])))
    elif operator == "Sub":
        f = b.one("Sub", *parts)
    else:
        f = b.one("Neg", b.one("Min", b.one("Sub", y, parts[0]), b.one("Sub", parts[0], y)))
    derivation = derived(b.model((1,), f, 1), np.array([51]))
    assert rational(derivation.logits[0].mid()) == pytest.approx(0.3, abs=1e-50)
    assert 2 <= float(derivation.margin_bounds[0][1]) <= 6


def test_a_default_attribute_is_the_float32_that_kernels_compute_with() -> None:
    b = GraphBuilder(np.random.default_rng(0))
    model = b.model((1,), b.one("LeakyRelu", b.one("Neg", "image")), 1)
    pixels = np.array([255])
    (exact, _), (stated, _) = derived(model, pixels).logits, computed(model, pixels, np.float64)[0]
    assert rational(exact.mid()) == Fraction(float(stated)) == -Fraction(float(np.float32(0.01)))


def test_a_pair_that_is_sorted_twice_costs_what_it_costs_once() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        def half(start: int) -> str:
            return b.one("Slice", x, *(b.constant(np.array([v])) for v in (start, start + 2, 1)))

        return b.one("Concat", b.one("Max", half(0), half(2)), b.one("Min", half(2), half(0)), axis=1)

    b = GraphBuilder(np.random.default_rng(0))
    halves = build(b, "image")
    model = b.model((4,), b.one("Gemm", halves, b.constant(np.eye(4)[:, :1])), 1)
    assert 1.999999 < float(derived(model, np.array([1, 2, 3, 4])).margin_bounds[0][1]) < 2.000001


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "reason"),
    [
        ("Erf", {}, [], "no rule for this operator"),
        ("Transpose", {"perm": [1, 0]}, [], "it mixes the images of a batch"),
        ("Reshape", {}, [np.array([1, -1])], "it mixes the images of a batch"),
        ("Reshape", {}, [np.array([2, -1])], "its operands do not fit"),
        ("ReduceMax", {}, [np.array([0])], "axis 0 of 2: outside, or along the batch"),
        ("TopK", {"sorted": 0}, [np.array([2])], "k must be a constant, and the result sorted"),
        ("Concat", {"axis": 1}, [np.ones((1, 3))], "it mixes constants and numbers that depend on the image"),
        ("Gemm", {"alpha": 0.5}, [np.eye(3)], "alpha or beta other than 1"),
        ("Gemm", {}, [np.eye(4)], "a weight (4, 4) does not fit 3 numbers"),
        ("Div", {}, [np.zeros(3)], "it divides by zero"),
        ("Mul", {}, [np.full(3, 1e308)], "overflow cannot be excluded"),
    ],
)
def test_what_has_no_rule_is_named_and_refused(operator: str, attributes: Json, inputs: list[Any], reason: str) -> None:
    b = GraphBuilder(np.random.default_rng(0))
    x = b.one(operator, "image", *(b.constant(value) for value in inputs), **attributes)
    b.nodes[-1].name = "culprit"
    if operator == "TopK":
        b.nodes[-1].output.append("order")
    with pytest.raises(NotAuditableError) as caught:
        derived(b.model((3,), x, 3), np.array([1, 2, 3]))
    assert str(caught.value).startswith(f"{operator} 'culprit': ")
    assert reason in str(caught.value)


def batch_size(b: GraphBuilder, x: str) -> str:
    return b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)


def test_shapes_that_exporters_compute_are_read() -> None:
    b = GraphBuilder(np.random.default_rng(0))
    channels = b.one("Gather", b.one("Shape", "image"), b.constant(np.array([1])), axis=0)
    half = b.one("Div", channels, b.constant(np.array([2])))
    shape = b.one("Concat", batch_size(b, "image"), half, b.constant(np.array([2])), axis=0)
    pairs = b.one("Reshape", "image", shape)
    largest = b.one("ReduceMax", pairs, b.constant(np.array([2])), keepdims=0)
    exact = derived(b.model((4,), largest, 2), np.array([51, 102, 204, 153])).logits
    assert [rational(ball.mid()) for ball in exact] == pytest.approx([0.4, 0.8], abs=1e-50)


@pytest.mark.parametrize("operator", ["Slice", "Mul", "Gather", "ReduceMax"])
def test_a_graph_that_computes_with_the_batch_size_is_refused(operator: str) -> None:
    # With batches of two or more, Slice alone would leave the three numbers as they are.
    b = GraphBuilder(np.random.default_rng(0))
    size = batch_size(b, "image")
    if operator == "Slice":
        size = b.one("Concat", size, b.constant(np.array([3])), axis=0)
        start, axes = b.constant(np.array([0, 0])), b.constant(np.array([1, 2]))
        x = b.one("Slice", "image", start, size, axes)
    elif operator == "Mul":
        x = b.one("Reshape", "image", b.one("Concat", b.one("Mul", size, size), b.constant(np.array([-1])), axis=0))
    elif operator == "Gather":
        x = b.one("Gather", "image", size, axis=1)
    else:
        x = b.one("ReduceMax", "image", size, keepdims=1)
    model = b.model((2, 3), b.one("Flatten", x, axis=1), 6)
    with pytest.raises(
        NotAuditableError, match=f"^{operator} .*(computes with the size of the batch|constant integers)"
    ):
        derived(model, np.array([[1, 2, 3], [4, 5, 6]]))


def test_an_answer_of_a_graph_without_a_rule_is_undecided(kept: tuple[Json, bytes, Path], tmp_path: Path) -> None:
    answer, image, artefact = kept
    folder = Path(shutil.copytree(artefact, tmp_path / "artefact"))
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Erf", ["before"], ["logits"], name="last"))
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    card = json.loads((folder / "card.json").read_text())
    card["graphs"]["model.onnx"] = answer["digest"] = digest(content)
    (folder / "card.json").write_text(json.dumps(card))
    verdict = check(tmp_path, answer, image, folder)
    assert verdict.conclusion is Conclusion.UNDECIDED
    assert verdict.lines == ("undecided: class, logits and radius: Erf 'last': no rule for this operator",)
    # A check that fails outweighs one that is not decided, and both are reported.
    answer["label"] = "seven"
    verdict = check(tmp_path, answer, image, folder)
    assert verdict.conclusion is Conclusion.DOES_NOT_HOLD
    assert [line.partition(":")[0] for line in verdict.lines] == ["does not hold", "undecided"]


# --- norms ------------------------------------------------------------------------------------------------------------


def exact_matrix(values: np.ndarray) -> Matrix:
    rows, columns = values.shape
    numbers = float_numbers(values.ravel().tolist(), DIGITS)
    return gathered(
        np.tile(np.arange(columns), (rows, 1)), np.arange(values.size).reshape(rows, columns), numbers, columns
    )


def is_bound(bound: Fraction, values: np.ndarray) -> bool:
    """Whether `bound^2 I - W W^T` is positive semidefinite, by exact elimination of a symmetric matrix."""
    weight = np.vectorize(Fraction, otypes=[object])(values)
    rest = -(weight @ weight.T)
    for i in range(len(rest)):
        rest[i, i] += bound**2
    while len(rest):
        pivot = rest[0, 0]
        if pivot < 0 or (pivot == 0 and rest[0].any()):
            return False
        if pivot > 0:
            rest = rest - np.outer(rest[:, 0], rest[0]) / pivot
        rest = rest[1:, 1:]
    return True


@pytest.mark.parametrize("seed", range(40))
def test_norms_are_never_below_the_exact_ones(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=random.integers(1, 7, 2)) * 10.0 ** random.integers(-12, 12)
    values[random.random(values.shape) < 0.4 * (seed % 2)] = 0.0
    if seed % 5 == 0:
        values = np.linalg.qr(values)[0]
    matrix, peak = exact_matrix(values), Fraction(float(np.linalg.norm(values, 2)))
    assert is_bound(rational(matrix.norm), values)
    assert rational(matrix.norm) <= peak * (1 + Fraction(1, 10**13))
    assert is_bound(rational(matrix.absolute_norm), np.abs(values))
    assert not is_bound(peak * (1 - Fraction(1, 10**6)), values) or not values.any()


def test_a_bad_guess_never_gives_a_bad_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(6, 9))
    eigvalsh, cholesky = np.linalg.eigvalsh, np.linalg.cholesky
    for scale in (0.0, 0.5, 0.999, 3.0, np.nan):
        monkeypatch.setattr(np.linalg, "eigvalsh", lambda a, scale=scale: eigvalsh(a) * scale)
        monkeypatch.setattr(np.linalg, "cholesky", cholesky)
        assert is_bound(rational(exact_matrix(values).norm), values)
        # A factor of nothing at all, accepted as it is.
        monkeypatch.setattr(np.linalg, "cholesky", lambda a: np.tril(np.random.default_rng(1).random(a.shape)))
        assert is_bound(rational(exact_matrix(values).norm), values)


# --- the image --------------------------------------------------------------------------------------------------------


def naive_triangle(n: int, m: int) -> np.ndarray:
    scale, half = Fraction(n, m), Fraction(1, 2)
    width = max(scale, Fraction(1))
    rows = [[max(Fraction(0), 1 - abs((j + half) * scale - (k + half)) / width) for k in range(n)] for j in range(m)]
    return np.array([[weight / sum(row) for weight in row] for row in rows], dtype=object)


@pytest.mark.parametrize(("sent", "seen"), [((1, 5, 4), (1, 3, 7)), ((3, 2, 9), (1, 2, 4)), ((1, 4, 4), (3, 2, 5))])
def test_what_the_model_sees_is_the_stated_map(sent: tuple[int, int, int], seen: tuple[int, int, int]) -> None:
    ctx.prec = DIGITS
    pixels = np.random.default_rng(0).integers(0, 256, sent)
    x = rational_pixels(pixels)
    if sent[0] == 3 and seen[0] == 1:
        x = (Fraction(299, 1000) * x[0] + Fraction(587, 1000) * x[1] + Fraction(114, 1000) * x[2])[None]
    rows, columns = naive_triangle(sent[1], seen[1]), naive_triangle(sent[2], seen[2])
    expected = np.array([rows @ plane @ columns.T for plane in x])
    if seen[0] == 3 and sent[0] == 1:
        expected = np.repeat(expected, 3, axis=0)
    sight = see(SentImage(sent, pixels.ravel().tolist(), 255, ""), seen, DIGITS)
    for ball, value in zip(sight.pixels, expected.ravel(), strict=True):
        assert abs(rational(ball.mid()) - value) <= rational(ball.rad())
    channels = {(3, 1): np.array([[0.299, 0.587, 0.114]]), (1, 3): np.ones((3, 1))}.get(
        (sent[0], seen[0]), np.eye(sent[0])
    )
    norm = np.linalg.norm(np.kron(channels, np.kron(rows.astype(float), columns.astype(float))), 2)
    assert norm * (1 - 1e-14) <= float(sight.norm) <= norm * (1 + 1e-12)


# --- the command ------------------------------------------------------------------------------------------------------


def write_kept(kept: tuple[Json, bytes, Path], folder: Path) -> list[str]:
    answer, image, artefact = kept
    (folder / "answer.json").write_text(json.dumps(answer))
    (folder / "image.png").write_bytes(image)
    return ["audit", str(folder / "answer.json"), str(folder / "image.png"), "--model", str(artefact)]


def test_the_exit_status_tells_the_three_verdicts(
    kept: tuple[Json, bytes, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = write_kept(kept, tmp_path)
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("holds: class ")
    kept[0]["label"] = "seven"
    kept[0]["certificate"]["radius"] *= 2
    assert main(write_kept(kept, tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["does not hold", " label"], ["does not hold", " radius"]]
    monkeypatch.setitem(RULES, "MatMul", RULES["Conv"])
    kept[0].update(label=f"class {kept[0]['class_id']}")
    assert main(write_kept(kept, tmp_path)) == 3
    assert capsys.readouterr().out.startswith("undecided: class, logits and radius: MatMul 'node_1': ")


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no answer": ("answer.json", Path.unlink, "there is no such file; name the JSON file with the kept answer"),
    "not JSON": ("answer.json", lambda p: p.write_text("holds"), "is not JSON"),
    "not UTF-8": ("answer.json", lambda p: p.write_bytes(b"\xff"), "is not JSON"),
    "nested too deep": ("answer.json", lambda p: p.write_text("[" * 10**5), "is not JSON"),
    "NaN": ("answer.json", lambda p: p.write_text('{"radius": NaN}'), "NaN is no JSON number"),
    "a name twice": ("answer.json", lambda p: p.write_text('{"a": 1, "a": 2}'), "a name stands twice in one object"),
    "a list": ("answer.json", lambda p: p.write_text("[]"), "the file is not a JSON object; keep the JSON object that"),
    "an error": (
        "answer.json",
        lambda p: p.write_text('{"type": "about:blank", "status": 400, "detail": "x"}'),
        "this is an error that the service answered",
    ),
    "no image": ("image.png", Path.unlink, "there is no such file; name the image file that was sent"),
    "no image file": ("image.png", lambda p: p.write_bytes(b"x"), "the bytes are not an image that this server reads"),
    "no array": ("image.png", lambda p: p.write_bytes(b"\x93NUMPY"), "is not a whole npy file"),
    "pickled": (
        "image.png",
        lambda p: p.write_bytes(npy(np.array([{}]), allow_pickle=True)),
        "is not a whole npy file",
    ),
    "strings": ("image.png", lambda p: p.write_bytes(npy(np.array([["a"]]))), "uint8 or float images"),
    "outside [0, 1]": ("image.png", lambda p: p.write_bytes(npy(np.full((4, 5), 1.5))), "outside [0, 1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_status_2_and_says_what_to_do(
    kept: tuple[Json, bytes, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    command = write_kept(kept, tmp_path)
    file, spoil, message = BAD[name]
    spoil(tmp_path / file)
    assert main(command) == 2
    assert capsys.readouterr().out == ""
    (record,) = caplog.records
    assert str(tmp_path / file) in record.getMessage()
    assert message in record.getMessage()
    assert record.exc_info is None


FIELDS: dict[str, tuple[Callable[[Json], object], str]] = {
    "no certificate": (lambda a: a.pop("certificate"), "`certificate` is missing"),
    "radius as text": (
        lambda a: a["certificate"].update(radius="1"),
        "`certificate.radius` must be a number of at least 0",
    ),
    "negative radius": (lambda a: a["certificate"].update(radius=-1.0), "`certificate.radius` must be a number"),
    "huge radius": (lambda a: a["certificate"].update(radius=10**400), "`certificate.radius` must be a number"),
    "class as a flag": (lambda a: a.update(class_id=True), "`class_id` must be a whole number"),
    "logits as text": (lambda a: a.update(logits=["1"]), "`logits` must be a list of numbers"),
    "no runner-up": (lambda a: a["certificate"].update(runner_up=None), "certificate.runner_up is not a JSON object"),
    "two sizes": (lambda a: a["image"].update(shape=[4, 5]), "`image.shape` must be three sizes"),
    "predictions that are no list": (lambda a: a.update(predictions={}), "a batch with no predictions"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_no_answer_is_said_by_its_field(kept: tuple[Json, bytes, Path], tmp_path: Path, name: str) -> None:
    answer, image, artefact = kept
    change, message = FIELDS[name]
    change(answer)
    with pytest.raises(KeptError, match=re.escape(message)):
        check(tmp_path, answer, image, artefact)


@pytest.mark.parametrize("file", ["model.onnx", "transport.onnx", "card.json"])
def test_an_artefact_without_one_of_its_files_is_named(
    kept: tuple[Json, bytes, Path], tmp_path: Path, file: str
) -> None:
    answer, image, artefact = kept
    folder = Path(shutil.copytree(artefact, tmp_path / "artefact"))
    (folder / file).unlink()
    with pytest.raises(KeptError, match=rf"{file}: there is no such file; name the folder with model\.onnx"):
        check(tmp_path, answer, image, folder)


def test_a_wrong_command_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["audit", "answer.json", "image.png"])
    assert caught.value.code == 2
    assert "--model" in capsys.readouterr().err


# --- nothing is shared ------------------------------------------------------------------------------------------------


def test_the_audit_shares_no_numeric_code_with_the_server() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = (contract for contract in contracts if contract["id"] == "audit-on-its-own")
    assert contract["type"] == "forbidden"
    assert contract["source_modules"] == ["service.audit"]
    numeric = {"artefact", "certificate", "inference", "pixels.arrays", "pixels.preprocessing", "runtime"}
    assert {*(f"service.{module}" for module in numeric), "onnxruntime"} <= set(contract["forbidden_modules"])
    assert "allow_indirect_imports" not in contract
    assert "ignore_imports" not in contract
    graph = grimp.build_graph("service", include_external_packages=True, cache_dir=None)
    own = {"service.audit", *graph.find_descendants("service.audit")}
    reached = {imported for module in own for imported in graph.find_modules_directly_imported_by(module)} - own
    of_ours = {module for module in reached if module.startswith("service")}
    assert of_ours == {"service.errors", "service.pixels.images"}
    assert reached - of_ours - sys.stdlib_module_names <= {"flint", "google", "numpy", "onnx"}


def test_serving_does_not_load_the_audit_nor_the_audit_the_runtime() -> None:
    for module, absent in (
        ("service.api.app, service.__main__", "flint"),
        ("service.__main__, service.audit", "onnxruntime"),
    ):
        code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=120).returncode == 0
