"""Everything that has no answer: its status, its media type, and a detail that says what was expected."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import builders
import httpx
import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client
from encoding import encode, npy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.api.app import create_app
from service.inference.classifier import Classifier, View
from service.settings import Settings

JSON = {"Content-Type": "application/json"}
PNG = {"Content-Type": "image/png"}
NPY = {"Content-Type": "application/x-npy"}
GOOD_HW = np.full((HEIGHT, WIDTH), 99, np.uint8)
GOOD = encode(GOOD_HW)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def assert_problem(response: httpx.Response, status: int, *expected: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    members = response.json()
    assert members["status"] == status
    assert members["type"]
    assert members["title"]
    for words in expected:
        assert words in members["detail"], members["detail"]


ANIMATION = encode(
    Image.new("L", (WIDTH, HEIGHT), 0), "GIF", save_all=True, append_images=[Image.new("L", (WIDTH, HEIGHT), 9)]
)
IMAGES: dict[str, tuple[bytes, int, str]] = {
    "not an image": (b"this is a letter", 422, "send a PNG, JPEG, WEBP, BMP, GIF or TIFF file"),
    "an svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "send a PNG, JPEG, WEBP, BMP, GIF or TIFF file"),
    "truncated tiff": (encode(GOOD_HW, "TIFF")[:-4], 422, "send the whole file"),
    "a tiff of pages": (
        encode(Image.fromarray(GOOD_HW), "TIFF", save_all=True, append_images=[Image.fromarray(GOOD_HW)]),
        422,
        "send one image",
    ),
    "avif": (b"\0\0\0\x18ftypavif" + bytes(40), 422, "save it as JPEG or PNG"),
    "damaged heic": (b"\0\0\0\x18ftypheic" + bytes(40), 422, "send the whole file"),
    "truncated png": (GOOD[:-20], 422, "send the whole file"),
    "truncated jpeg": (encode(GOOD_HW, "JPEG")[:-4], 422, "send the whole file"),
    "wrong size": (
        encode(np.zeros((9, 8), np.uint8)),
        422,
        "the model takes 4 x 5; send that size, or set resize=true",
    ),
    "alpha": (encode(Image.new("RGBA", (WIDTH, HEIGHT))), 422, "flatten it"),
    "transparent palette": (encode(Image.new("P", (WIDTH, HEIGHT)), transparency=0), 422, "flatten it"),
    "32 bits": (encode(Image.new("I", (WIDTH, HEIGHT)), "TIFF"), 422, "send the values in [0, 1] as a float npy"),
    "cmyk": (encode(Image.new("CMYK", (WIDTH, HEIGHT)), "JPEG"), 422, "send RGB or grey"),
    "animation": (ANIMATION, 422, "send one of them"),
    "too many pixels": (encode(np.zeros((60, 60), np.uint8)), 413, "at most 2000 pixels"),
    "an npy file": (npy(GOOD_HW), 422, "Content-Type application/x-npy"),
    "empty": (b"", 400, "send a"),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("form", ["json", "form", "body", "batch"])
def test_a_bad_image_is_refused_in_every_form(client: Client, form: str, kind: str) -> None:
    data, status, expected = IMAGES[kind]
    if form == "json":
        response = client.post("/predict", json={"image": text(data)})
    elif form == "form":
        response = client.post("/predict", files={"image": ("x.png", data, "image/png")})
    elif form == "body":
        response = client.post("/predict", content=data, headers=PNG)
    else:
        response = client.post("/predict/batch", json={"images": [text(GOOD), text(data)]})
        assert response.json()["detail"].startswith("image 1: ")
    assert_problem(response, status, expected)
    assert response.json()["instance"] == ("/predict/batch" if form == "batch" else "/predict")


COLOUR = encode(Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)))
PALETTE = encode(Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).quantize(4))


@pytest.mark.parametrize("model", ["grey", "colour"])
@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize(("first", "then", "said"), [(GOOD, COLOUR, "is RGB"), (PALETTE, GOOD, "is grey")])
def test_grey_and_colour_do_not_make_a_batch(
    client: Client, model: str, resize: bool, first: bytes, then: bytes, said: str
) -> None:
    body = {"images": [text(first), text(first), text(then)], "model": model, "resize": resize}
    response = client.post("/predict/batch", json=body)
    assert_problem(response, 422, "image 2: ", said, "send the others separately")


def test_arrays_and_tensors_are_not_converted(client: Client) -> None:
    grey, colour = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros((3, HEIGHT, WIDTH), np.uint8)
    for model, array in (("grey", colour), ("colour", grey), ("colour", grey[None])):
        one = client.post("/predict", content=npy(array), headers=NPY, params={"model": model})
        assert_problem(one, 422)
        batch = client.post("/predict/batch", content=npy(array[None]), headers=NPY, params={"model": model})
        assert_problem(batch, 422)
        shape = [1, *array.reshape(-1, HEIGHT, WIDTH).shape]
        tensor = {"name": "image", "shape": shape, "datatype": "UINT8", "data": array.ravel().tolist()}
        for parameters in ({}, {"resize": True}):
            infer = client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor], "parameters": parameters})
            assert_problem(infer, 422, "channels", "only image files are converted")


@pytest.mark.parametrize("channels", [2, 4])
def test_image_files_are_refused_by_a_model_of_other_channels(client: Client, tmp_path: Path, channels: int) -> None:
    shape = (channels, HEIGHT, WIDTH)
    builders.write(tmp_path / "other", builders.linear(np.ones((2, int(np.prod(shape)))), np.zeros(2), shape), "other")
    app = create_app(Settings(default_model="other", models=tmp_path, provider="cpu"))
    other = Client(app, client._runner)
    for image in (GOOD, COLOUR):
        said = f"takes {channels} channels and image files have 1 or 3"
        assert_problem(other.post("/predict", json={"image": text(image)}), 422, said, "application/x-npy")
    array = npy(np.zeros(shape, np.uint8))
    assert other.post("/predict", content=array, headers=NPY).json()["image"]["shape"] == list(shape)


def with_value(value: float) -> np.ndarray:
    array = np.zeros((HEIGHT, WIDTH))
    array[1, 2] = value
    return array


ARRAYS: dict[str, tuple[bytes, int, str]] = {
    "nan": (npy(with_value(np.nan)), 422, "expected in [0, 1]"),
    "infinite": (npy(with_value(np.inf)), 422, "expected in [0, 1]"),
    "negative": (npy(with_value(-0.1)), 422, "expected in [0, 1]"),
    "grey levels as floats": (npy(with_value(254.0)), 422, "divide 0..255 by 255, or send uint8"),
    "wrong size": (npy(np.zeros((8, 9))), 422, "the model takes 4 x 5"),
    "one axis": (npy(np.zeros(20)), 422, "(1, 4, 5) or (4, 5, 1) or (4, 5)"),
    "a batch": (npy(np.zeros((1, 1, 4, 5))), 422, "/predict/batch"),
    "three channels": (npy(np.zeros((4, 5, 3))), 422, "takes 1 channel"),
    "integers": (npy(np.zeros((4, 5), np.int64)), 422, "expected uint8 (0..255), or float16, float32 or float64"),
    "booleans": (npy(np.zeros((4, 5), bool)), 422, "expected uint8"),
    "pickled": (npy(np.array([[None]]), allow_pickle=True), 422, "never loaded"),
    "cut short": (npy(np.zeros((4, 5)))[:-1], 422, "send the whole file"),
    "an image file": (GOOD, 422, "numpy.save"),
    "an archive of arrays": (b"PK\x03\x04" + bytes(50), 422, "numpy.save"),
    "too many pixels": (npy(np.zeros((60, 60), np.uint8)), 413, "at most 2000 pixels"),
    "empty": (b"", 400, "body is empty"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_bad_array_is_refused(client: Client, kind: str) -> None:
    data, status, expected = ARRAYS[kind]
    assert_problem(client.post("/predict", content=data, headers=NPY), status, expected)


def test_bad_batches_of_arrays_are_refused(client: Client) -> None:
    for array, status, expected in (
        (np.zeros((4, 5)), 422, "expected a batch"),
        (np.zeros((5, 4, 5)), 413, "accepts 1 to 4 per batch"),
        (np.zeros((2, 4, 5, 3)), 422, "takes 1 channel"),
        (np.zeros((2, 8, 9)), 422, "the model takes 4 x 5"),
        (np.full((2, 4, 5), np.nan), 422, "(0, 0, 0, 0) is nan"),
    ):
        assert_problem(client.post("/predict/batch", content=npy(array), headers=NPY), status, expected)


BASE64 = {
    "not base64": ("!!!", "is not base64"),
    "truncated": (text(GOOD)[:-1], "truncated"),
    "data uri": (f"data:image/png;base64,{text(GOOD)}", "send only the part after its comma"),
    "line breaks": (text(GOOD)[:40] + "\n" + text(GOOD)[40:], "base64 -w0"),
    "url-safe": ("-_-_", "URL-safe"),
    "not ascii": ("äöü=", "is not base64"),
}


@pytest.mark.parametrize("kind", BASE64)
def test_broken_base64_is_refused(client: Client, kind: str) -> None:
    broken, expected = BASE64[kind]
    assert_problem(client.post("/predict", json={"image": broken}), 422, "standard base64", expected)
    batch = client.post("/predict/batch", json={"images": [text(GOOD), broken]})
    assert_problem(batch, 422, "image 1: ", expected)


# Each as JSON value and, where it can be written so, as text in a form or query.
OPTIONS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "minst"}, 404, "available models: binary, colour, grey"),
    "model that is no name": ({"model": "../grey"}, 404, "available models: binary, colour, grey"),
    "unknown target": (
        {"counterfactual": True, "target": "class 9"},
        422,
        "its labels are: class 0, class 1, class 2",
    ),
    "target without counterfactual": ({"target": "class 1"}, 422, "set counterfactual=true"),
    "negative epsilon": ({"epsilon": -0.5}, 422, "epsilon is not valid; expected a finite number of at least 0"),
    "epsilon that overflows": ({"epsilon": "1e999"}, 422, "expected a finite number"),
    "epsilon that is text": ({"epsilon": "large"}, 422, "expected a finite number"),
    "epsilon nan": ({"epsilon": "nan"}, 422, "expected a finite number"),
    "epsilon infinite": ({"epsilon": "Infinity"}, 422, "expected a finite number"),
    "counterfactual maybe": ({"counterfactual": "maybe"}, 422, "expected true or false"),
    "resize twice": ({"resize": 2}, 422, "expected true or false"),
    "unknown field": ({"epsilom": 1}, 422, "known fields: "),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("form", ["json", "form", "query", "batch"])
def test_a_bad_option_is_refused_in_every_form(client: Client, form: str, kind: str) -> None:
    options, status, expected = OPTIONS[kind]
    as_text = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in options.items()}
    if form == "json":
        response = client.post("/predict", json={"image": text(GOOD), **options})
    elif form == "form":
        response = client.post("/predict", files={"image": ("x.png", GOOD, "image/png")}, data=as_text)
    elif form == "query":
        response = client.post("/predict", content=GOOD, headers=PNG, params=as_text)
    else:
        response = client.post("/predict/batch", json={"images": [text(GOOD)], **options})
    assert_problem(response, status, expected)


def test_the_target_must_not_be_the_predicted_class(client: Client) -> None:
    label = client.post("/predict", json={"image": text(GOOD)}).json()["label"]
    options = {"counterfactual": True, "target": label}
    one = client.post("/predict", json={"image": text(GOOD), **options})
    assert_problem(one, 422, f"target '{label}' is already the predicted class", "choose another label")
    batch = client.post("/predict/batch", json={"images": [text(GOOD)] * 2, **options})
    assert_problem(batch, 422, "image 0: ", "choose another label")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"0.5"', "[1]"])
def test_an_epsilon_that_json_has_no_number_for_is_refused(client: Client, number: str) -> None:
    content = f'{{"image": "{text(GOOD)}", "epsilon": {number}}}'
    response = client.post("/predict", content=content, headers=JSON)
    assert_problem(response, 400 if number.endswith(("NaN", "Infinity")) else 422)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'"image"',
        b"null",
        b"\xff\xfe",
        b'{"image": "\xff"}',
        b"[" * 10_000,
        b'{"epsilon": ' + b"1" * 5000 + b"}",
        b'{"image": "a", "image": "b"}',
    ],
)
def test_a_body_that_is_not_one_json_object_is_refused(client: Client, content: bytes) -> None:
    for path, field in (("/predict", "image"), ("/predict/batch", "images")):
        assert_problem(client.post(path, content=content, headers=JSON), 400, "send one object", field)


def test_a_missing_image_is_refused(client: Client) -> None:
    assert_problem(client.post("/predict", json={}), 422, "image is missing; expected an image file as a base64 string")
    assert_problem(client.post("/predict", json={"image": None}), 422, "expected an image file as a base64 string")
    assert_problem(client.post("/predict", json={"image": [1]}), 422, "expected an image file as a base64 string")
    for images in ([], "x", [1], None):
        assert_problem(client.post("/predict/batch", json={"images": images}), 422, "expected a list of at least one")
    assert_problem(client.post("/predict/batch", json={"image": text(GOOD)}), 422, "known fields: ", "images")


def test_images_of_several_sizes_do_not_make_a_batch(client: Client) -> None:
    images = [text(encode(np.zeros(shape, np.uint8))) for shape in ((4, 5), (4, 6))]
    response = client.post("/predict/batch", json={"images": images, "resize": True})
    assert_problem(response, 422, "image 1: ", "4 x 6", "must have the same size")
    assert_problem(client.post("/predict/batch", json={"images": images}), 422, "image 1: ", "set resize=true")


def test_a_batch_has_a_limit(client: Client) -> None:
    assert_problem(client.post("/predict/batch", json={"images": [text(GOOD)] * 5}), 413, "1 to 4 per batch; split it")


def test_the_pixels_of_a_batch_count_together(client: Client) -> None:
    images = [text(encode(np.zeros((30, 30), np.uint8)))] * 3
    assert_problem(client.post("/predict/batch", json={"images": images, "resize": True}), 413, "image 2: ", "pixels")


def form_of(*parts: tuple[str, bytes], boundary: str = "XX", end: str = "--XX--\r\n") -> bytes:
    return (
        b"".join(
            f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
            for head, data in parts
        )
        + end.encode()
    )


FILE = 'name="image"; filename="x.png"'
FORM_TYPE = "multipart/form-data; boundary=XX"
BROKEN_FORMS: dict[str, tuple[bytes, str, str]] = {
    "no boundary": (form_of((FILE, GOOD)), "multipart/form-data", "boundary of its Content-Type"),
    "another boundary": (form_of((FILE, GOOD)), "multipart/form-data; boundary=YY", "boundary of its Content-Type"),
    "truncated": (form_of((FILE, GOOD), end=""), FORM_TYPE, "truncated"),
    "not a form": (b"hello", FORM_TYPE, "is not multipart/form-data"),
    "no image": (form_of(('name="epsilon"', b"1")), FORM_TYPE, "no file field image; send exactly one"),
    "two images": (form_of((FILE, GOOD), (FILE, GOOD)), FORM_TYPE, "2 file fields image; send exactly one"),
    "image as text": (form_of(('name="image"', b"x.png")), FORM_TYPE, "send it as a file (curl -F image=@"),
    "part without name": (form_of(('filename="x"', GOOD)), FORM_TYPE, "has no name"),
    "text that is not utf-8": (form_of((FILE, GOOD), ('name="model"', b"\xff")), FORM_TYPE, "not UTF-8"),
    "many parts": (form_of(*[('name="model"', b"grey")] * 40), FORM_TYPE, "more than 32 parts"),
}


@pytest.mark.parametrize("kind", BROKEN_FORMS)
def test_a_broken_form_is_refused(client: Client, kind: str) -> None:
    content, content_type, expected = BROKEN_FORMS[kind]
    assert_problem(client.post("/predict", content=content, headers={"Content-Type": content_type}), 400, expected)


def test_a_transfer_encoding_of_a_part_is_not_decoded(client: Client) -> None:
    content = form_of((f"{FILE}\r\nContent-Transfer-Encoding: base64", base64.b64encode(GOOD)))
    response = client.post("/predict", content=content, headers={"Content-Type": FORM_TYPE})
    assert_problem(response, 422, "the bytes are not an image in a supported format")


def test_a_file_in_a_field_of_another_name_is_an_unknown_field(client: Client) -> None:
    response = client.post("/predict", files={"file": ("x.png", GOOD, "image/png")})
    assert_problem(response, 422, "unknown field 'file' in the form; known fields: image, counterfactual")


def test_an_option_twice_is_refused(client: Client) -> None:
    content = form_of((FILE, GOOD), ('name="epsilon"', b"1"), ('name="epsilon"', b"2"))
    assert_problem(
        client.post("/predict", content=content, headers={"Content-Type": FORM_TYPE}),
        422,
        "'epsilon' is repeated in the form",
    )
    response = client.post("/predict?epsilon=1&epsilon=2", content=GOOD, headers=PNG)
    assert_problem(response, 422, "'epsilon' is repeated in the query; give every option once")


def test_options_in_the_query_of_a_json_or_form_body_are_refused(client: Client) -> None:
    for response in (
        client.post("/predict?epsilon=1", json={"image": text(GOOD)}),
        client.post("/predict?epsilon=1", files={"image": ("x.png", GOOD, "image/png")}),
        client.post("/predict/batch?epsilon=1", json={"images": [text(GOOD)]}),
    ):
        assert_problem(response, 422, "the query has 'epsilon'", "leave the query empty")


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/octets", "nonsense"])
def test_a_missing_or_unknown_content_type_is_refused_with_those_that_are_read(
    client: Client, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = client.post("/predict", content=GOOD, headers=headers)
    assert_problem(response, 415, "application/json, multipart/form-data, image/png", "application/x-npy")
    response = client.post("/predict/batch", content=GOOD, headers=headers)
    assert_problem(response, 415, "send one of: application/json, application/x-npy")


def test_a_batch_takes_no_forms_and_no_image_files(client: Client) -> None:
    assert_problem(client.post("/predict/batch", content=GOOD, headers=PNG), 415, "application/x-npy")


@pytest.mark.parametrize("headers", [JSON, PNG, NPY, {"Content-Type": FORM_TYPE}])
def test_an_empty_body_is_refused(client: Client, headers: dict[str, str]) -> None:
    assert_problem(client.post("/predict", headers=headers), 400, "the body is empty; send an image")


@pytest.mark.parametrize("headers", [JSON, PNG, NPY, {"Content-Type": FORM_TYPE}])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not(
    client: Client, headers: dict[str, str], declared: bool
) -> None:
    size = LIMITS["max_body_bytes"] + 1

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(size // 100 + 1):
            yield bytes(100)

    response = client.post("/predict", content=bytes(size) if declared else chunks(), headers=headers)
    assert_problem(response, 413, f"larger than {LIMITS['max_body_bytes']} bytes", "LIPCERT_MAX_BODY_BYTES")


def test_a_body_of_exactly_the_limit_is_read(client: Client) -> None:
    """Zeros after the end of an image are ignored by its decoder."""
    content = GOOD + bytes(LIMITS["max_body_bytes"] - len(GOOD))
    assert client.post("/predict", content=content, headers=PNG).status_code == 200


def test_a_huge_body_is_not_kept_while_it_arrives(client: Client) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield bytes(2**20)

    response = client.post("/predict", content=endless(), headers=PNG)
    assert_problem(response, 413, "the body is larger")
    assert sent < 80


def test_paths_and_methods_that_are_not_there_are_problems_too(client: Client) -> None:
    assert_problem(client.get("/nothing"), 404, "there is no resource at /nothing; /docs lists all paths")
    assert_problem(client.get("/static/nothing"), 404, "/docs")
    assert_problem(client.get("/models/nothing"), 404, "available models: binary, colour, grey")
    response = client.get("/predict")
    assert_problem(response, 405, "method GET is not allowed at /predict; use POST")
    assert response.headers["allow"] == "POST"


def test_an_unexpected_failure_is_a_problem_without_its_traceback(
    client: Client, classifiers: Mapping[str, Classifier]
) -> None:
    class Broken(Classifier):
        def __init__(self) -> None:
            self.__dict__.update(classifiers["grey"].__dict__)

        def view(self, sent_shape: tuple[int, int, int], resize: bool = False) -> View:
            raise RuntimeError("the secret of the machine")

    app = create_app(Settings(default_model="none"), {"grey": Broken()})
    response = Client(app, client._runner).post("/predict", json={"image": text(GOOD), "model": "grey"})
    assert_problem(response, 500, "the server failed")
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_what_is_quoted_back_is_valid_json(client: Client) -> None:
    content = json.dumps({"image": text(GOOD), "model": '"\ud800\u0000<script>'})
    response = client.post("/predict", content=content, headers=JSON)
    assert response.status_code in (404, 422)
    assert json.loads(response.content)["status"] == response.status_code


def test_a_refused_request_is_not_counted_as_a_prediction(
    client: Client, classifiers: Mapping[str, Classifier]
) -> None:
    fresh = Client(create_app(Settings(default_model="grey"), classifiers), client._runner)
    fresh.post("/predict", content=b"x", headers=PNG)
    assert 'lipcert_predictions_total{model="grey"}' not in fresh.get("/metrics").text


def test_a_png_with_a_bomb_in_a_text_chunk_is_refused(client: Client) -> None:
    info = PngInfo()
    info.add_text("bomb", "0" * 2_000_000, zip=True)
    file = io.BytesIO()
    Image.fromarray(GOOD_HW).save(file, "PNG", pnginfo=info)
    assert_problem(client.post("/predict", content=file.getvalue(), headers=PNG), 422)
