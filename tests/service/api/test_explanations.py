"""The options `strength`, `path` and `saliency` in every form of request."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import httpx
import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client
from encoding import encode, npy
from thorough import shipped_models

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.pixels.images import decode_image
from service.settings import Settings

NPY = {"Content-Type": "application/x-npy"}
ZOO = Path(__file__).resolve().parents[3] / "models" / "zoo"
Json = dict[str, Any]
EVERY: Json = {"counterfactual": True, "strength": 2.0, "path": 3, "saliency": True}


@pytest.fixture(scope="module")
def client(runner: asyncio.Runner) -> Client:
    models = {
        "grey": builders.load(builders.random_groupsort(2, (1, HEIGHT, WIDTH), 4), "grey"),
        "rgb": builders.load(builders.random_groupsort(2, (3, HEIGHT, WIDTH), 4), "rgb"),
        "two": builders.load(builders.random_groupsort(2, (2, HEIGHT, WIDTH), 4), "two"),
        "five": builders.load(builders.random_groupsort(2, (5, HEIGHT, WIDTH), 4), "five"),
    }
    return Client(create_app(Settings(default_model="grey", **LIMITS), models), runner)


@pytest.fixture(scope="module")
def image_NHW() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (4, HEIGHT, WIDTH), dtype=np.uint8)


def text(pixels: np.ndarray) -> str:
    return base64.b64encode(encode(pixels)).decode()


def in_text(options: Json) -> dict[str, str]:
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}


FORMS: dict[str, Callable[[Client, np.ndarray, Json], httpx.Response]] = {
    "json": lambda client, pixels, options: client.post("/predict", json={"image": text(pixels), **options}),
    "form": lambda client, pixels, options: client.post(
        "/predict", files={"image": ("x.png", encode(pixels), "image/png")}, data=in_text(options)
    ),
    "image body": lambda client, pixels, options: client.post(
        "/predict", content=encode(pixels), headers={"Content-Type": "image/png"}, params=in_text(options)
    ),
    "npy body": lambda client, pixels, options: client.post(
        "/predict", content=npy(pixels), headers=NPY, params=in_text(options)
    ),
}


def array(answer: Json) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(answer["saliency"]["array"])))


def check_answer(answer: Json, pixels: np.ndarray, predict: Callable[[str], Json], count: int) -> None:
    """Check an answer with every option against itself and against what its images get when they are posted back.

    Args:
        answer: of an 8-bit image.
        pixels: H W or H W 3, as sent.
        predict: posts base64 of a file without options.
        count: images of the path.
    """
    found, radius = answer["counterfactual"], answer["certificate"]["radius"]
    assert found["reached"] == ("nearest_distance" in found)
    if found["reached"]:
        assert radius <= found["nearest_distance"] <= found["distance"] + 1e-12
        assert found["distance"] <= 2.0 * found["nearest_distance"] * (1 + 1e-12)
    path = found["path"]
    assert len(path) == count
    first, last = path[0], path[-1]
    sent_CHW = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    assert (decode_image(base64.b64decode(first["image"]), 2**20) == sent_CHW).all()
    assert (first["distance"], first["class_id"]) == (0.0, answer["class_id"])
    assert last["image"] == found["image"]
    assert (last["class_id"], last["label"], last["distance"]) == tuple(
        found[name] for name in ("class_id", "label", "distance")
    )
    for step in path:
        again = predict(step["image"])
        assert (again["class_id"], again["label"]) == (step["class_id"], step["label"])
        assert again["certificate"]["radius"] == pytest.approx(step["radius"], rel=1e-9, abs=1e-12)
    saliency = answer["saliency"]
    assert {name: saliency[name] for name in ("class_id", "label")} == answer["certificate"]["runner_up"]
    gradient = array(answer)
    assert gradient.dtype == np.float32
    assert gradient.shape == sent_CHW.shape
    norm = np.linalg.norm(gradient.astype(np.float64))
    assert 0.0 < norm <= answer["certificate"]["lipschitz_bound"] * (1 + 1e-6)
    assert decode_image(base64.b64decode(saliency["overlay"]), 2**20).shape == (3, *sent_CHW.shape[1:])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_strength_path_and_saliency(client: Client, image_NHW: np.ndarray, form: str) -> None:
    for pixels in image_NHW:
        answer = FORMS[form](client, pixels, EVERY).json()
        assert answer == FORMS["json"](client, pixels, EVERY).json()
        check_answer(answer, pixels, lambda image: client.post("/predict", json={"image": image}).json(), 3)


@pytest.mark.parametrize("options", [{}, {"counterfactual": True}, {"counterfactual": True, "proof": "best"}])
def test_absent_options_and_their_defaults_leave_the_answer_as_it_was(
    client: Client, image_NHW: np.ndarray, options: Json
) -> None:
    defaults: Json = {"strength": 1.0, "saliency": False, "path": None}
    known = {"image", "media_type", "class_id", "label", "distance", "reached"}
    for pixels in image_NHW:
        answer = FORMS["json"](client, pixels, options)
        assert FORMS["json"](client, pixels, {**options, **defaults}).content == answer.content
        assert "saliency" not in answer.json()
        assert answer.json()["counterfactual"] is None or set(answer.json()["counterfactual"]) == known


def test_the_nearest_distance_is_that_of_the_answer_without_strength(client: Client, image_NHW: np.ndarray) -> None:
    for pixels in image_NHW:
        nearest = FORMS["json"](client, pixels, {"counterfactual": True}).json()["counterfactual"]
        found = FORMS["json"](client, pixels, {"counterfactual": True, "strength": 1.5}).json()["counterfactual"]
        assert found["nearest_distance"] == nearest["distance"]
        assert found["class_id"] == nearest["class_id"]


def test_strength_and_path_lead_to_the_target(client: Client, image_NHW: np.ndarray) -> None:
    answer = FORMS["json"](client, image_NHW[0], {}).json()
    other = next(k for k in range(4) if k not in (answer["class_id"], answer["certificate"]["runner_up"]["class_id"]))
    found = FORMS["json"](client, image_NHW[0], {**EVERY, "target": f"class {other}"}).json()["counterfactual"]
    assert not found["reached"] or found["class_id"] == found["path"][-1]["class_id"] == other


def test_batch_records_and_the_open_inference_protocol_say_the_same(client: Client, image_NHW: np.ndarray) -> None:
    batch = {"images": [text(pixels) for pixels in image_NHW], **EVERY}
    answers = client.post("/predict/batch", json=batch).json()["predictions"]
    for answer, pixels in zip(answers, image_NHW, strict=True):
        check_answer(answer, pixels, lambda image: client.post("/predict", json={"image": image}).json(), 3)
    reply = client.post(
        "/predict/batch",
        content=npy(image_NHW),
        headers={**NPY, "Accept": "application/x-npy"},
        params=in_text(EVERY),
    )
    records = np.load(io.BytesIO(reply.content))
    tensor = {"name": "image", "shape": [4, 1, HEIGHT, WIDTH], "datatype": "UINT8", "data": image_NHW.ravel().tolist()}
    outputs = client.post("/v2/models/grey/infer", json={"inputs": [tensor], "parameters": EVERY}).json()["outputs"]
    columns = {one["name"]: np.reshape(one["data"], one["shape"]) for one in outputs}
    for table in (records, columns):
        for n, answer in enumerate(answers):
            found, path = answer["counterfactual"], answer["counterfactual"]["path"]
            assert table["counterfactual_nearest_distance"][n] == found["nearest_distance"]
            for name in ("class_id", "margin", "radius", "distance"):
                assert table[f"path_{name}"][n].tolist() == [step[name] for step in path]
            images = np.stack([decode_image(base64.b64decode(step["image"]), 2**20) for step in path])
            assert (table["path"][n] == images).all()
            assert (table["saliency"][n].astype(np.float32) == array(answer)).all()
            assert table["saliency_class_id"][n] == answer["saliency"]["class_id"]
    assert records["saliency"].dtype == np.float32
    plain = client.post("/predict", content=npy(image_NHW[0]), headers={**NPY, "Accept": "application/x-npy"})
    assert not any(name.startswith(("path", "saliency")) for name in np.load(io.BytesIO(plain.content)).dtype.names)


def test_an_image_that_is_not_8_bit_starts_at_the_nearest_8_bit_image(client: Client) -> None:
    pixels = np.random.default_rng(3).random((HEIGHT, WIDTH))
    found = client.post("/predict", content=npy(pixels), headers=NPY, params=in_text(EVERY)).json()["counterfactual"]
    first = found["path"][0]
    level = np.rint(pixels * 255)
    assert (decode_image(base64.b64decode(first["image"]), 2**20)[0] == level).all()
    assert first["distance"] == pytest.approx(np.linalg.norm(pixels - level / 255))


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_any_number_of_channels_are_explained(client: Client, channels: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (channels, HEIGHT, WIDTH), dtype=np.uint8)
    params = {"model": {2: "two", 5: "five"}[channels], **in_text(EVERY)}
    response = client.post("/predict", content=npy(pixels), headers=NPY, params=params)
    assert response.status_code == 200
    answer = response.json()
    assert array(answer).shape == (channels, HEIGHT, WIDTH)
    for one in [answer["counterfactual"], *answer["counterfactual"]["path"]]:
        assert one["media_type"] == "application/x-npy"
        content = base64.b64decode(one["image"])
        again = client.post("/predict", content=content, headers=NPY, params={"model": params["model"]}).json()
        assert again["class_id"] == one["class_id"]


BAD: dict[str, tuple[Json, str]] = {
    "strength alone": ({"strength": 2.0}, "strength is that of the counterfactual; set counterfactual=true"),
    "path alone": ({"path": 3}, "path leads to the counterfactual; set counterfactual=true"),
    "strength below 1": ({"counterfactual": True, "strength": 0.99}, "strength is not valid; expected a number from 1"),
    "strength above 3": ({"counterfactual": True, "strength": 3.01}, "strength is not valid; expected a number from 1"),
    "strength in words": ({"counterfactual": True, "strength": "strong"}, "strength is not valid"),
    "strength that is not a number": ({"counterfactual": True, "strength": "nan"}, "strength is not valid"),
    "path of one image": ({"counterfactual": True, "path": 1}, "path is not valid; expected a whole number from 2"),
    "path of 17 images": ({"counterfactual": True, "path": 17}, "path is not valid; expected a whole number from 2"),
    "half an image": ({"counterfactual": True, "path": 2.5}, "path is not valid; expected a whole number from 2"),
    "saliency of something": ({"saliency": "9"}, "saliency is not valid; expected true or false"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_valid_is_a_problem(client: Client, image_NHW: np.ndarray, form: str, kind: str) -> None:
    options, expected = BAD[kind]
    response = FORMS[form](client, image_NHW[0], options)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert expected in response.json()["detail"]
    tensor = {"name": "image", "shape": [1, 1, HEIGHT, WIDTH], "datatype": "FP64", "data": [0.5] * HEIGHT * WIDTH}
    response = client.post("/v2/models/grey/infer", json={"inputs": [tensor], "parameters": options})
    assert response.status_code == 422
    assert expected in response.json()["error"]


def test_images_of_paths_count_towards_the_pixels_of_a_request(client: Client) -> None:
    side = 15  # 225 pixels; the limit is 2,000.
    pixels = np.random.default_rng(5).integers(0, 256, (side, side), dtype=np.uint8)
    options = {"counterfactual": True, "resize": True}
    assert FORMS["json"](client, pixels, {**options, "path": 8}).status_code == 200
    for form in FORMS.values():
        response = form(client, pixels, {**options, "path": 9})
        assert response.status_code == 413
        assert response.json()["type"] == "urn:problem-type:lipcert:path-too-long"
        assert "9 images for each image has 2025 pixels in all" in response.json()["detail"]
    tensor = {"name": "image", "shape": [3, 1, HEIGHT * 3, WIDTH * 3], "datatype": "FP64", "data": [0.5] * 540}
    wanted = {"inputs": [tensor], "parameters": {**options, "path": 4}}
    assert client.post("/v2/models/grey/infer", json=wanted).status_code == 413


def test_outputs_that_were_not_asked_for_are_refused_with_what_they_need(client: Client) -> None:
    tensor = {"name": "image", "shape": [1, 1, HEIGHT, WIDTH], "datatype": "FP64", "data": [0.5] * HEIGHT * WIDTH}
    for name in ("path_radius", "saliency", "counterfactual_nearest_distance"):
        response = client.post("/v2/models/grey/infer", json={"inputs": [tensor], "outputs": [{"name": name}]})
        assert response.status_code == 422
        assert "those of the path path" in response.json()["detail"]


@pytest.mark.parametrize("name", shipped_models())
def test_the_answers_of_the_shipped_models_keep_their_promises(runner: asyncio.Runner, name: str) -> None:
    model = Classifier.load(ZOO / name, "cpu", 1)
    shipped = Client(create_app(Settings(default_model=name), {name: model}), runner)
    channels, height, width = model.input_shape
    random = np.random.default_rng(11)
    for coarse in (7, height):
        squares = random.integers(0, 256, (coarse, coarse, channels), dtype=np.uint8)
        rows, columns = np.arange(height) * coarse // height, np.arange(width) * coarse // width
        picture = squares[rows[:, None], columns[None]]
        pixels = picture[:, :, 0] if channels == 1 else picture
        answer = FORMS["json"](shipped, pixels, {**EVERY, "path": 5}).json()
        check_answer(answer, pixels, lambda image: shipped.post("/predict", json={"image": image}).json(), 5)
