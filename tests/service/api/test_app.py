"""The API on models whose radius is known in closed form: (f_i - f_j) / ||w_i - w_j||."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import encode, npy
from PIL import Image

from service.api.answers import radius_in_grey_levels
from service.api.app import create_app
from service.api.examples import SAMPLE_DIGIT
from service.artefact.files import digest
from service.errors import ArtefactError, SettingsError
from service.inference.classifier import Classifier, Prediction, View
from service.pixels.images import decode_image
from service.settings import Settings

Weights = Mapping[str, tuple[np.ndarray, np.ndarray, tuple[int, int, int]]]


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


FORMS: dict[str, Callable[[Client, np.ndarray, dict[str, Any]], httpx.Response]] = {
    "json": lambda client, pixels, options: client.post("/predict", json={"image": text(encode(pixels)), **options}),
    "form": lambda client, pixels, options: client.post(
        "/predict", files={"image": ("digit.png", encode(pixels), "image/png")}, data=strings(options)
    ),
    "image body": lambda client, pixels, options: client.post(
        "/predict", content=encode(pixels), headers={"Content-Type": "image/png"}, params=strings(options)
    ),
    "npy body": lambda client, pixels, options: client.post(
        "/predict", content=npy(pixels), headers={"Content-Type": "application/x-npy"}, params=strings(options)
    ),
}


def strings(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}


def exact_radius(weights: Weights, name: str, x_D: np.ndarray) -> tuple[int, float]:
    weight_KD, bias_K, _ = weights[name]
    if len(bias_K) == 1:
        weight_KD, bias_K = np.vstack([weight_KD, -weight_KD]), np.hstack([bias_K, -bias_K])
    logits_K = weight_KD @ x_D + bias_K
    i = int(logits_K.argmax())
    return i, min(
        (logits_K[i] - logits_K[j]) / float(np.linalg.norm(weight_KD[i] - weight_KD[j]))
        for j in range(len(logits_K))
        if j != i
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["grey", "binary", "colour"])
def test_every_form_gives_the_class_and_a_radius_just_below_the_exact_one(
    client: Client,
    linear_weights: Weights,
    grey_HW: np.ndarray,
    colour_HWC: np.ndarray,
    form: str,
    name: str,
) -> None:
    pixels = colour_HWC if name == "colour" else grey_HW
    response = FORMS[form](client, pixels, {"model": name})
    assert response.status_code == 200, response.text
    answer = response.json()
    x_D = (np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels).reshape(-1) / 255.0
    class_id, radius = exact_radius(linear_weights, name, x_D)
    assert answer["model"] == name
    assert answer["class_id"] == class_id
    assert answer["label"] == f"class {class_id}"
    assert answer["certificate"]["radius"] <= radius
    assert answer["certificate"]["radius"] == pytest.approx(radius, rel=1e-9)


def test_all_forms_and_the_batch_give_the_same_answer(client: Client, grey_HW: np.ndarray) -> None:
    options = {"epsilon": 0.25, "counterfactual": True}
    answers = [send(client, grey_HW, options).json() for send in FORMS.values()]
    batch = client.post("/predict/batch", json={"images": [text(encode(grey_HW))] * 3, **options}).json()
    answers += batch["predictions"]
    assert len(answers) == 7
    assert all(answer["certificate"] == answers[0]["certificate"] for answer in answers)
    assert all(answer["class_id"] == answers[0]["class_id"] for answer in answers)


def test_the_answer_has_exactly_the_fields_of_the_contract(client: Client, grey_HW: np.ndarray) -> None:
    answer = FORMS["json"](client, grey_HW, {"epsilon": 0.5, "counterfactual": True}).json()
    assert set(answer) == {
        *("model", "digest", "card_digest", "class_id", "label", "logits", "image", "certificate", "counterfactual"),
        *("coverage", "set", "max_error", "decision", "novelty"),
    }
    assert (answer["coverage"], answer["set"], answer["max_error"], answer["decision"]) == (None, None, None, None)
    assert set(answer["image"]) == {"digest", "shape", "conversion", "resized"}
    assert set(answer["certificate"]) == {
        "norm",
        "radius",
        "radius_255",
        "certified",
        "epsilon",
        "robust_at_epsilon",
        "runner_up",
        "lipschitz_bound",
        "logit_error",
        "proof",
        "references",
    }
    assert set(answer["certificate"]["runner_up"]) == {"class_id", "label"}
    assert set(answer["counterfactual"]) == {"image", "media_type", "class_id", "label", "distance", "reached"}
    assert answer["certificate"]["norm"] == "l2"
    assert answer["counterfactual"]["media_type"] == "image/png"
    assert answer["digest"].startswith("sha256:")
    assert answer["card_digest"] == client.get("/models/grey").json()["card_digest"]


def digest_of(image_CHW: np.ndarray) -> str:
    """As the documentation of the field defines it, value by value."""
    line = "x".join(str(length) for length in image_CHW.shape) + "\n"
    return (
        "sha256:" + hashlib.sha256(line.encode() + struct.pack(f"<{image_CHW.size}d", *image_CHW.ravel())).hexdigest()
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["grey", "colour"])
def test_the_answer_names_its_image(
    client: Client, grey_HW: np.ndarray, colour_HWC: np.ndarray, form: str, name: str
) -> None:
    pixels = colour_HWC if name == "colour" else grey_HW
    levels_CHW = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
    exact_CHW = np.array([float(Fraction(int(v), 255)) for v in levels_CHW.ravel()]).reshape(levels_CHW.shape)
    image = FORMS[form](client, pixels, {"model": name}).json()["image"]
    assert image == {
        "digest": digest_of(exact_CHW),
        "shape": list(levels_CHW.shape),
        "conversion": None,
        "resized": False,
    }


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4"])
@pytest.mark.parametrize("fortran", [False, True])
def test_the_digest_of_an_array_is_about_its_values_and_not_its_layout(
    client: Client, dtype: str, fortran: bool
) -> None:
    values_HW = np.random.default_rng(8).random((HEIGHT, WIDTH)).astype(dtype)
    sent = np.asfortranarray(values_HW) if fortran else values_HW
    image = FORMS["npy body"](client, sent, {}).json()["image"]
    assert image["digest"] == digest_of(values_HW.astype(float)[None])


def test_in_a_batch_every_answer_names_its_own_image(client: Client) -> None:
    pixels_NHW = np.random.default_rng(6).integers(0, 256, (3, HEIGHT + 1, WIDTH), dtype=np.uint8)
    body = {"images": [text(encode(pixels_HW)) for pixels_HW in pixels_NHW], "resize": True}
    answers = client.post("/predict/batch", json=body).json()["predictions"]
    assert [answer["image"]["digest"] for answer in answers] == [digest_of(p[None] / 255.0) for p in pixels_NHW]
    for answer in answers:
        assert answer["image"]["shape"] == [1, HEIGHT + 1, WIDTH]
        assert answer["image"]["resized"] is True


def test_what_is_not_asked_for_is_null(client: Client, grey_HW: np.ndarray) -> None:
    answer = FORMS["json"](client, grey_HW, {}).json()
    assert answer["counterfactual"] is None
    assert answer["certificate"]["epsilon"] is None
    assert answer["certificate"]["robust_at_epsilon"] is None


def test_robust_at_epsilon_is_whether_epsilon_is_at_most_the_radius(client: Client, grey_HW: np.ndarray) -> None:
    radius = FORMS["json"](client, grey_HW, {}).json()["certificate"]["radius"]
    largest = FORMS["json"](client, grey_HW, {"proof": "best"}).json()["certificate"]["radius"]
    assert radius <= largest
    for epsilon, expected in ((0.0, True), (radius, True), (1.5 * largest, False), (1e300, False)):
        for send in FORMS.values():
            certificate = send(client, grey_HW, {"epsilon": float(epsilon)}).json()["certificate"]
            assert certificate["epsilon"] == epsilon
            assert certificate["robust_at_epsilon"] is expected
            assert certificate["proof"] == ("fast" if epsilon <= radius else "best")


def black_and_white(grey_HW: np.ndarray) -> np.ndarray:
    """Pixels at the ends of the box, where reference images gain most."""
    return np.where(grey_HW < 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("form", FORMS)
def test_the_best_proof_lists_the_images_that_prove_it(
    client: Client, classifiers: Mapping[str, Classifier], grey_HW: np.ndarray, form: str
) -> None:
    pixels_HW = black_and_white(grey_HW)
    fast = FORMS[form](client, pixels_HW, {}).json()["certificate"]
    assert (fast["proof"], fast["references"]) == ("fast", [])
    answer = FORMS[form](client, pixels_HW, {"proof": "best", "counterfactual": True}).json()
    best = answer["certificate"]
    assert best["proof"] == "best"
    assert fast["radius"] < best["radius"] <= answer["counterfactual"]["distance"]
    assert best["references"] != []
    for reference in best["references"]:
        assert reference["class_id"] != answer["class_id"]
        assert reference["media_type"] == "image/png"
        pixels_CHW = decode_image(base64.b64decode(reference["image"]), 2**20)
        assert reference["digest"] == digest_of(pixels_CHW / 255)
        # Its own answer: the margin from which the radius follows.
        margin = classifiers["grey"].predict(pixels_CHW[None] / 255)[0]
        assert margin.class_id == answer["class_id"]
        way = np.linalg.norm(pixels_CHW / 255 - pixels_HW[None] / 255)
        assert best["radius"] < margin.radius
        assert way < margin.radius


def test_reference_images_of_an_array_of_floats_are_arrays(client: Client, grey_HW: np.ndarray) -> None:
    image_HW = 0.999 * black_and_white(grey_HW) / 255.0
    answer = FORMS["npy body"](client, image_HW, {"proof": "best"}).json()
    for reference in answer["certificate"]["references"]:
        assert reference["media_type"] == "application/x-npy"
        array_CHW = np.load(io.BytesIO(base64.b64decode(reference["image"])))
        assert (array_CHW.shape, array_CHW.dtype) == ((1, HEIGHT, WIDTH), np.float64)
        assert reference["digest"] == digest_of(array_CHW)
    assert answer["certificate"]["references"] != []


def test_arrays_of_records_say_which_proof_it_was(client: Client, grey_HW: np.ndarray) -> None:
    for proof in ("fast", "best"):
        response = client.post(
            "/predict",
            content=npy(grey_HW),
            headers={"Content-Type": "application/x-npy", "Accept": "application/x-npy"},
            params={"proof": proof},
        )
        assert np.load(io.BytesIO(response.content))["proof"].tolist() == [proof]


def test_the_radius_survives_json_exactly(
    client: Client, classifiers: Mapping[str, Classifier], grey_HW: np.ndarray
) -> None:
    (prediction,) = classifiers["grey"].predict(grey_HW[None, None] / 255.0)
    answer = FORMS["npy body"](client, grey_HW, {}).json()
    assert answer["certificate"]["radius"] == prediction.radius
    assert answer["logits"] == prediction.logits_K.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_radius_in_grey_levels_is_rounded_down(seed: int) -> None:
    for radius in np.random.default_rng(seed).random(50) * 10.0 ** np.arange(-25, 25):
        grey_levels = radius_in_grey_levels(float(radius))
        assert Fraction(grey_levels) <= Fraction(float(radius)) * 255
        assert grey_levels >= float(radius) * 255 * (1 - 1e-15)


def test_the_radius_in_grey_levels_of_zero_is_zero_and_of_the_largest_float_is_finite() -> None:
    assert radius_in_grey_levels(0.0) == 0.0
    assert np.isfinite(radius_in_grey_levels(sys.float_info.max))


def test_a_tie_is_an_abstention_and_not_an_error(client: Client, linear_weights: Weights) -> None:
    """An image on the boundary of the binary model, as floats: f = 0 up to rounding."""
    weight_KD, bias_K, _ = linear_weights["binary"]
    middle_D = np.full(HEIGHT * WIDTH, 0.5)
    step_D = weight_KD[0] * -float(weight_KD[0] @ middle_D + bias_K[0]) / float(weight_KD[0] @ weight_KD[0])
    boundary = (middle_D + step_D).reshape(HEIGHT, WIDTH)
    assert boundary.min() >= 0
    assert boundary.max() <= 1
    response = FORMS["npy body"](client, boundary, {"model": "binary", "epsilon": 0})
    assert response.status_code == 200
    certificate = response.json()["certificate"]
    assert (certificate["radius"], certificate["radius_255"], certificate["certified"]) == (0.0, 0.0, False)
    assert certificate["robust_at_epsilon"] is False


@pytest.mark.parametrize("name", ["grey", "binary", "colour"])
def test_posting_the_counterfactual_back_gives_its_class_and_its_distance_is_not_below_the_radius(
    client: Client, grey_HW: np.ndarray, colour_HWC: np.ndarray, name: str
) -> None:
    pixels = colour_HWC if name == "colour" else grey_HW
    answer = FORMS["json"](client, pixels, {"model": name, "counterfactual": True}).json()
    found = answer["counterfactual"]
    assert found["reached"]
    assert found["class_id"] != answer["class_id"]
    assert found["distance"] >= answer["certificate"]["radius"]
    again = client.post("/predict", json={"model": name, "image": found["image"]}).json()
    assert (again["class_id"], again["label"]) == (found["class_id"], found["label"])
    there_CHW = decode_image(base64.b64decode(found["image"]), 1000) / 255.0
    here_CHW = (np.moveaxis(pixels, -1, 0) if name == "colour" else pixels[None]) / 255.0
    assert found["distance"] == pytest.approx(float(np.linalg.norm(there_CHW - here_CHW)), rel=1e-12)


def test_the_counterfactual_goes_to_the_target(client: Client, grey_HW: np.ndarray) -> None:
    class_id = FORMS["json"](client, grey_HW, {}).json()["class_id"]
    for target in {0, 1, 2} - {class_id}:
        options = {"counterfactual": True, "target": f"class {target}"}
        for send in FORMS.values():
            found = send(client, grey_HW, options).json()["counterfactual"]
            assert found["reached"] is (found["class_id"] == target)


def test_another_size_is_resized_where_that_is_asked_for(client: Client) -> None:
    pixels_HW = np.random.default_rng(5).integers(0, 256, (9, 11), dtype=np.uint8)
    for send in FORMS.values():
        assert send(client, pixels_HW, {}).status_code == 422
        assert send(client, pixels_HW, {"resize": True}).status_code == 200
    batch = client.post("/predict/batch", json={"images": [text(encode(pixels_HW))] * 2, "resize": True})
    assert batch.status_code == 200


CONVERTED = {
    "rgb_to_grey": ("grey", (HEIGHT, WIDTH, 3), [[0.299, 0.587, 0.114]]),
    "grey_to_rgb": ("colour", (HEIGHT, WIDTH), [[1.0], [1.0], [1.0]]),
}


@pytest.mark.parametrize("form", ["json", "form", "image body"])
@pytest.mark.parametrize("conversion", CONVERTED)
def test_a_file_of_the_other_kind_is_converted_and_its_radius_is_about_its_own_channels(
    client: Client, linear_weights: Weights, conversion: str, form: str
) -> None:
    model, shape, matrix = CONVERTED[conversion]
    weight_KD, bias_K, (channels, _, _) = linear_weights[model]
    # The linear model behind the conversion is a linear model of the image that was sent.
    seen_KD = np.einsum("kdp,dc->kcp", weight_KD.reshape(3, channels, -1), np.array(matrix)).reshape(3, -1)
    weights = {"composed": (seen_KD, bias_K, (len(matrix[0]), HEIGHT, WIDTH))}
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        sent_CHW = (np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]) / 255.0
        answer = FORMS[form](client, pixels, {"model": model}).json()
        class_id, radius = exact_radius(weights, "composed", sent_CHW.ravel())
        assert answer["class_id"] == class_id
        assert answer["certificate"]["radius"] <= radius * (1 + 1e-12)
        # Three copies are proved by the product of the norms, so something may be lost; to grey nothing is.
        if conversion == "rgb_to_grey":
            assert answer["certificate"]["radius"] == pytest.approx(radius, rel=1e-7)
        assert answer["image"] == {
            "digest": digest_of(sent_CHW),
            "shape": list(sent_CHW.shape),
            "conversion": conversion,
            "resized": False,
        }


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("conversion", CONVERTED)
def test_the_counterfactual_of_a_converted_file_is_an_image_of_the_kind_that_was_sent(
    client: Client, conversion: str, resize: bool
) -> None:
    model, shape, _ = CONVERTED[conversion]
    shape = (7, 6, *shape[2:]) if resize else shape
    options = {"model": model, "resize": resize}
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        answer = FORMS["json"](client, pixels, {**options, "counterfactual": True}).json()
        found = answer["counterfactual"]
        assert found["distance"] >= answer["certificate"]["radius"]
        assert (found["class_id"] != answer["class_id"]) is found["reached"]
        again = client.post("/predict", json={**options, "image": found["image"]}).json()
        assert again["class_id"] == found["class_id"]
        assert again["image"]["conversion"] == conversion
        assert again["image"]["shape"] == answer["image"]["shape"]
        there = decode_image(base64.b64decode(found["image"]), 1000) / 255.0
        here = (np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]) / 255.0
        assert found["distance"] == pytest.approx(float(np.linalg.norm(there - here)), rel=1e-12)


@pytest.mark.parametrize("conversion", CONVERTED)
def test_a_batch_of_converted_files_has_the_answers_of_each_alone(client: Client, conversion: str) -> None:
    model, shape, _ = CONVERTED[conversion]
    pixels = np.random.default_rng(9).integers(0, 256, (4, *shape), dtype=np.uint8)
    alone = [FORMS["json"](client, image, {"model": model}).json() for image in pixels]
    body = {"model": model, "images": [text(encode(image)) for image in pixels]}
    for one, other in zip(client.post("/predict/batch", json=body).json()["predictions"], alone, strict=True):
        assert one["image"] == other["image"]
        assert one["class_id"] == other["class_id"]
        assert one["certificate"]["radius"] == pytest.approx(other["certificate"]["radius"], rel=1e-12)


@pytest.fixture(scope="module")
def shipped(runner: Any) -> Client:
    """The application with the shipped `mnist` alone."""
    mnist = Classifier.load(Path(__file__).resolve().parents[3] / "models" / "zoo" / "mnist", "cpu", 1)
    return Client(create_app(Settings(), {"mnist": mnist}), runner)


@pytest.mark.parametrize("digit", range(10))
def test_a_colour_photograph_of_a_digit_is_answered_by_the_shipped_model(shipped: Client, digit: int) -> None:
    """The same digit as grey file and as RGB file: one class, and the radius of each in its own pixels."""
    grey_HW = np.asarray(Image.open(SAMPLE_DIGIT.with_name(f"mnist-{digit}.png")))
    grey = FORMS["json"](shipped, grey_HW, {}).json()
    colour_HWC = np.stack([grey_HW, grey_HW, grey_HW], axis=-1)
    options = {"counterfactual": True}
    colour = FORMS["json"](shipped, colour_HWC, options).json()
    assert grey["class_id"] == colour["class_id"] == digit
    assert colour["image"]["conversion"] == "rgb_to_grey"
    assert colour["image"]["shape"] == [3, 28, 28]
    assert colour["certificate"]["radius"] == pytest.approx(grey["certificate"]["radius"] / np.sqrt(0.446966), rel=1e-6)
    found = colour["counterfactual"]
    assert found["reached"]
    assert found["distance"] >= colour["certificate"]["radius"]
    again = shipped.post("/predict", json={"image": found["image"]}).json()
    assert again["class_id"] == found["class_id"]


def test_a_large_colour_photograph_is_converted_and_resized_by_the_shipped_model(shipped: Client) -> None:
    grey = Image.open(SAMPLE_DIGIT).resize((90, 110), Image.Resampling.BICUBIC)
    tinted_HWC = np.stack([np.asarray(grey), np.asarray(grey) // 2, np.asarray(grey) // 3], axis=-1)
    options = {"resize": True, "counterfactual": True}
    answer = FORMS["form"](shipped, tinted_HWC, options).json()
    assert answer["image"]["conversion"] == "rgb_to_grey"
    assert answer["image"]["resized"] is True
    assert answer["certificate"]["certified"]
    found = answer["counterfactual"]
    assert found["distance"] >= answer["certificate"]["radius"]
    again = shipped.post("/predict", json={"image": found["image"], "resize": True}).json()
    assert again["class_id"] == found["class_id"]


def test_a_batch_answers_in_order(client: Client) -> None:
    pixels_NHW = np.random.default_rng(6).integers(0, 256, (4, HEIGHT, WIDTH), dtype=np.uint8)
    one_by_one = [FORMS["npy body"](client, pixels_HW, {}).json() for pixels_HW in pixels_NHW]
    as_json = client.post("/predict/batch", json={"images": [text(encode(p)) for p in pixels_NHW]}).json()
    as_npy = client.post(
        "/predict/batch", content=npy(pixels_NHW), headers={"Content-Type": "application/x-npy"}
    ).json()
    for batch in (as_json, as_npy):
        assert [answer["class_id"] for answer in batch["predictions"]] == [a["class_id"] for a in one_by_one]
        assert [answer["certificate"]["radius"] for answer in batch["predictions"]] == pytest.approx(
            [answer["certificate"]["radius"] for answer in one_by_one], rel=1e-12
        )


def test_a_media_type_may_have_parameters_and_capitals(client: Client, grey_HW: np.ndarray) -> None:
    body = json.dumps({"image": text(encode(grey_HW))})
    response = client.post("/predict", content=body, headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


def test_the_bytes_of_an_image_body_decide_its_format(client: Client, grey_HW: np.ndarray) -> None:
    response = client.post("/predict", content=encode(grey_HW, "BMP"), headers={"Content-Type": "image/x-ms-bmp"})
    assert response.status_code == 200


def test_models_are_listed_with_what_is_proved_of_them(
    client: Client, classifiers: Mapping[str, Classifier], zoo: Path
) -> None:
    answer = client.get("/models").json()
    assert answer["broken"] == []
    models = {model["name"]: model for model in answer["models"]}
    assert set(models) == set(classifiers)
    assert [name for name, model in models.items() if model["default"]] == ["grey"]
    for name, classifier in classifiers.items():
        assert models[name]["digest"] == classifier.digest
        assert models[name]["card_digest"] == digest((zoo / name / "card.json").read_bytes())
        assert models[name]["labels"] == list(classifier.labels)
        assert models[name]["lipschitz_bound"] == classifier.certificate.lipschitz_bound
        assert models[name]["provider"] == "CPUExecutionProvider"


def test_one_model_is_shown_in_full(client: Client, classifiers: Mapping[str, Classifier]) -> None:
    model = client.get("/models/colour").json()
    certificate = classifiers["colour"].certificate
    assert model["input"] == {"channels": 3, "height": HEIGHT, "width": WIDTH}
    assert model["precision"] == "float64"
    assert model["margin_bounds"] == certificate.margin_bounds_KK.tolist()
    assert model["logit_error"] == certificate.logit_error
    assert model["card"]["name"] == "colour"


def test_health_is_live_and_ready(client: Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready", "provider": "CPUExecutionProvider"}


def test_without_its_default_model_the_server_lives_and_is_not_ready(client: Client) -> None:
    empty = Client(create_app(Settings(default_model="grey"), {}), client._runner)
    assert empty.get("/health/live").status_code == 200
    response = empty.get("/health/ready")
    reasons = ["the default model grey is not loaded; see the log of the start"]
    assert response.status_code == 503
    assert response.json() == {"status": "not ready", "provider": None, "reasons": reasons}
    assert empty.get("/openapi.json").status_code == 200


class Lost(Classifier):
    """A classifier whose GPU has failed."""

    is_lost = True

    def __init__(self, real: Classifier) -> None:
        self.__dict__.update(real.__dict__)


@pytest.mark.parametrize(("path", "answer"), [("/health/ready", {"status": "not ready"}), ("/v2/health/ready", {})])
def test_with_a_lost_gpu_the_server_lives_and_is_not_ready(
    client: Client, classifiers: Mapping[str, Classifier], path: str, answer: dict[str, str]
) -> None:
    lost = {**classifiers, "colour": Lost(classifiers["colour"])}
    app = Client(create_app(Settings(default_model="grey"), lost), client._runner)
    assert app.get("/health/live").status_code == 200
    response = app.get(path)
    assert response.status_code == 503
    assert answer.items() <= response.json().items()


def test_with_a_stuck_worker_the_server_is_neither_ready_nor_live_and_says_why(
    client: Client, classifiers: Mapping[str, Classifier]
) -> None:
    app = create_app(Settings(default_model="grey", stuck_s=0.05), classifiers)
    stuck = Client(app, client._runner)
    assert stuck.get("/health/live").json() == {"status": "live"}
    app.state.service.batcher.beats[1] = time.monotonic(), "decoding", 0.0
    until_s = time.monotonic() + 30
    while stuck.get("/health/live").status_code == 200:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    reasons = ["a worker has been stuck for 0.05 s in decoding"]
    assert stuck.get("/health/live").json() == {"status": "not live", "reasons": reasons}
    ready = {"status": "not ready", "provider": "CPUExecutionProvider", "reasons": reasons}
    assert stuck.get("/health/ready").json() == ready
    for path, answer in (("/v2/health/live", {"live": False}), ("/v2/health/ready", {"ready": False})):
        response = stuck.get(path)
        assert (response.status_code, response.json()) == (503, answer)


def test_metrics_count_requests_by_route_and_abstentions_by_model(
    client: Client, classifiers: Mapping[str, Classifier], grey_HW: np.ndarray
) -> None:
    fresh = Client(create_app(Settings(default_model="grey"), classifiers), client._runner)
    FORMS["json"](fresh, grey_HW, {})
    fresh.get("/models/colour")
    fresh.get("/nothing/here")
    fresh.request("BREW", "/predict")
    metrics = fresh.get("/metrics").text
    assert 'lipcert_http_requests_total{method="POST",route="/predict",status="200"} 1.0' in metrics
    assert 'lipcert_http_requests_total{method="GET",route="/models/{name}",status="200"} 1.0' in metrics
    assert 'lipcert_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in metrics
    assert 'method="other"' in metrics
    assert "BREW" not in metrics
    assert 'lipcert_http_request_duration_seconds_bucket{le="0.005",method="POST",route="/predict"' in metrics
    assert 'lipcert_predictions_total{model="grey"} 1.0' in metrics


def test_metrics_name_the_provider_and_the_digest_of_every_model(
    client: Client, classifiers: Mapping[str, Classifier]
) -> None:
    metrics = client.get("/metrics").text
    for name, classifier in classifiers.items():
        labels = f'digest="{classifier.digest}",model="{name}",provider="CPUExecutionProvider"'
        assert f"lipcert_model_info{{{labels}}} 1.0" in metrics


def test_abstentions_are_counted(client: Client, classifiers: Mapping[str, Classifier]) -> None:
    constant = Client(create_app(Settings(default_model="tie"), {"tie": Tie(classifiers["grey"])}), client._runner)
    answer = FORMS["json"](constant, np.zeros((HEIGHT, WIDTH), np.uint8), {}).json()
    assert answer["logits"] == [None, None, None]
    assert 'lipcert_abstentions_total{model="tie"} 1.0' in constant.get("/metrics").text


class Tie(Classifier):
    """A classifier that never knows: its logits are not finite."""

    def __init__(self, real: Classifier) -> None:
        self.__dict__.update(real.__dict__)
        self.name = "tie"

    def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
        real = super().view(sent_shape, resize)
        return TiedView(*(getattr(real, field.name) for field in fields(real)))


class TiedView(View):
    """Knows nothing about any image."""

    def predict(self, image_NCHW: np.ndarray) -> list[Prediction]:
        return [
            prediction._replace(logits_K=np.full(3, np.nan), radius=0.0, certified=False)
            for prediction in super().predict(image_NCHW)
        ]


def test_the_application_loads_every_artefact_of_its_folder(zoo: Any, client: Client) -> None:
    app = create_app(Settings(default_model="binary", models=zoo, provider="cpu"))
    assert len(Client(app, client._runner).get("/models").json()["models"]) == 3


def test_a_default_model_that_is_not_there_is_refused_at_start(zoo: Any) -> None:
    with pytest.raises(SettingsError, match=r"LIPCERT_DEFAULT_MODEL='mnist'.*binary, colour, grey"):
        create_app(Settings(models=zoo))


def test_a_folder_without_artefacts_is_refused_at_start(tmp_path: Any) -> None:
    with pytest.raises(ArtefactError, match="holds no artefact"):
        create_app(Settings(models=tmp_path))
    with pytest.raises(ArtefactError, match="cannot be read"):
        create_app(Settings(models=tmp_path / "nowhere"))
