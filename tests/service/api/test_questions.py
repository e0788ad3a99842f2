"""The decoding of requests and the writing of answers by workers: JSON and npy have the same content."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import httpx
import numpy as np
import pytest
from client import HEIGHT, WIDTH, Client
from encoding import encode, npy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.api.answers import in_records, in_words, radius_in_grey_levels
from service.api.app import create_app
from service.api.body import Head, prefers_npy
from service.api.predict import ImageQuestion, Service
from service.api.schema import BatchAnswer, Options, PredictAnswer
from service.errors import Base64Error
from service.inference.admission import Limits
from service.inference.batching import Batcher
from service.inference.catalogue import Catalogue
from service.inference.classifier import Classifier, Prediction
from service.inference.counterfactual import Counterfactual
from service.inference.outcome import Outcome
from service.inference.served import Models
from service.metrics import Metrics
from service.pixels.images import decode_image
from service.settings import Settings

NPY = {"Accept": "application/x-npy"}
IMAGE = {"Content-Type": "image/png"}
SETTINGS = Settings(default_model="grey")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/x-npy", True),
        ("APPLICATION/X-NPY", True),
        ("application/x-npy; q=0.5", True),
        ("application/x-npy;q=0", False),
        ("application/x-npy;q=0.0, */*", False),
        ("application/x-npy, application/json", True),
        ("application/json, application/x-npy", True),
        ("application/x-npy;q=0.5, application/json;q=0.4", True),
        ("application/x-npy;q=0.4, application/json;q=0.5", False),
        ("application/x-npy;q=0.4, application/json", False),
        ("application/x-npy;q=0.4, application/*;q=0.5", False),
        ("application/x-npy;q=0.4, */*;q=0.5", False),
        ("application/x-npy, */*;q=0.5", True),
        ("application/x-npy;q=0.4, application/json;q=0.3, */*;q=0.9", True),
        ("text/html, application/x-npy;q=0.1", True),
        ("application/x-npy;q=many", False),
        ("application/x-npy;q=", False),
        ("application/x-npy;q=nan", False),
        ("application/x-npyz", False),
        (",,;;=,application/x-npy", True),
        ("application/json;profile=application/x-npy", False),
    ],
)
def test_npy_is_written_where_the_client_ranks_it_no_lower_than_json(accept: str, wanted: bool) -> None:
    assert prefers_npy(accept) is wanted


def records(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


def assert_agree(record: Any, answer: dict[str, Any]) -> None:
    """A record of an npy answer and an object of a JSON answer about one image."""
    certificate = answer["certificate"]
    assert record["class_id"] == answer["class_id"]
    assert record["radius"] == certificate["radius"]
    assert record["certified"] == certificate["certified"]
    assert record["runner_up"] == certificate["runner_up"]["class_id"]
    assert [None if not np.isfinite(logit) else logit for logit in record["logits"].tolist()] == answer["logits"]
    for field in ("lipschitz_bound", "logit_error"):
        assert (None if not np.isfinite(record[field]) else record[field]) == certificate[field]
    found = answer["counterfactual"]
    if found is None:
        assert "counterfactual" not in (record.dtype.names or ())
        return
    assert np.array_equal(record["counterfactual"], decode_image(base64.b64decode(found["image"]), 10_000))
    assert record["counterfactual_class_id"] == found["class_id"]
    assert record["counterfactual_distance"] == found["distance"]
    assert record["counterfactual_reached"] == found["reached"]


@pytest.mark.parametrize("counterfactual", [False, True])
@pytest.mark.parametrize("name", ["grey", "colour", "binary"])
def test_npy_and_json_say_the_same(client: Client, name: str, counterfactual: bool) -> None:
    shape = (HEIGHT, WIDTH, 3) if name == "colour" else (HEIGHT, WIDTH)
    pixels = np.random.default_rng(3).integers(0, 256, (4, *shape), dtype=np.uint8)
    options: dict[str, Any] = {"model": name, "counterfactual": counterfactual}
    one = {"image": text(encode(pixels[0])), **options}
    as_json, as_npy = client.post("/predict", json=one), client.post("/predict", json=one, headers=NPY)
    assert as_npy.headers["content-type"] == "application/x-npy"
    assert records(as_npy.content).shape == (1,)
    assert_agree(records(as_npy.content)[0], as_json.json())

    several = {"images": [text(encode(image)) for image in pixels], **options}
    as_json = client.post("/predict/batch", json=several)
    as_npy = client.post("/predict/batch", json=several, headers=NPY)
    assert len(records(as_npy.content)) == 4
    for record, answer in zip(records(as_npy.content), as_json.json()["predictions"], strict=True):
        assert_agree(record, answer)


def test_an_error_is_a_problem_whatever_the_client_accepts(client: Client) -> None:
    response = client.post("/predict", content=b"no image", headers=NPY | IMAGE)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


def floats(least: float | None = None) -> st.SearchStrategy[float]:
    return st.floats(min_value=least, allow_nan=least is None, allow_infinity=least is None)


@st.composite
def computed(draw: st.DrawFn) -> Sequence[Prediction]:
    """Predictions about images, with any float where one can stand."""
    count, n_classes, with_counterfactual = draw(st.integers(1, 3)), 3, draw(st.booleans())
    return [
        Prediction(
            class_id=draw(st.integers(0, n_classes - 1)),
            logits_K=np.array(draw(st.lists(floats(), min_size=n_classes, max_size=n_classes))),
            radius=draw(floats(0.0)),
            certified=draw(st.booleans()),
            runner_up=draw(st.integers(0, n_classes - 1)),
            lipschitz_bound=draw(floats()),
            logit_error=draw(floats()),
            counterfactual=Counterfactual(
                pixels_CHW=np.full((1, HEIGHT, WIDTH), draw(st.integers(0, 255)), np.uint8),
                class_id=draw(st.integers(0, n_classes - 1)),
                distance=draw(floats(0.0)),
                reached=draw(st.booleans()),
            )
            if with_counterfactual
            else None,
        )
        for _ in range(count)
    ]


def outcome(classifier: Classifier, predictions: Sequence[Prediction], epsilon: float | None) -> Outcome[Options]:
    options = Options.model_construct(epsilon=epsilon)
    return Outcome(classifier, options, np.zeros((len(predictions), 1, HEIGHT, WIDTH)), predictions)


@pytest.fixture(scope="module")
def service(classifiers: Mapping[str, Classifier]) -> Service:
    metrics = Metrics()
    return Service(SETTINGS, Catalogue(Models(classifiers), SETTINGS), None, metrics, Batcher(Limits(), metrics))


def question(
    service: Service, content: bytes = b"", media_type: str = "image/png", is_batch: bool = False
) -> ImageQuestion:
    head = Head(
        media_type.partition(";")[0], media_type, len(content), expects=False, wait_s=math.inf, prefers_npy=False
    )
    return ImageQuestion(service, (), is_batch, head, content)


@given(computed(), st.booleans(), floats(0.0) | st.none())
def test_the_json_is_what_the_schema_itself_would_write(
    service: Service,
    predictions: Sequence[Prediction],
    is_batch: bool,
    epsilon: float | None,
) -> None:
    said = outcome(service.models["grey"], predictions, epsilon)
    reply = question(service, is_batch=is_batch).answer(said)
    answers = [PredictAnswer.model_validate(one) for one in in_words(said)]
    whole = BatchAnswer(predictions=answers) if is_batch else answers[0]
    assert reply.media_type == "application/json"
    assert reply.content.decode() == whole.model_dump_json()
    read = json.loads(reply.content)
    first = read["predictions"][0] if is_batch else read
    assert first["certificate"]["radius"] == predictions[0].radius


@given(computed())
def test_records_hold_the_very_floats(classifiers: Mapping[str, Classifier], predictions: Sequence[Prediction]) -> None:
    file = io.BytesIO()
    np.save(file, in_records(outcome(classifiers["grey"], predictions, None)), allow_pickle=False)
    for record, prediction in zip(records(file.getvalue()), predictions, strict=True):
        assert record["logits"].tobytes() == prediction.logits_K.tobytes()
        for name in ("class_id", "radius", "certified", "runner_up"):
            assert record[name] == getattr(prediction, name)
        for name in ("lipschitz_bound", "logit_error"):
            assert np.array_equal(record[name], getattr(prediction, name), equal_nan=True)
        found = prediction.counterfactual
        assert ("counterfactual" in record.dtype.names) is (found is not None)
        if found is not None:
            assert np.array_equal(record["counterfactual"], found.pixels_CHW)
            assert record["counterfactual_distance"] == found.distance


@given(floats(0.0))
def test_the_radius_in_grey_levels_is_the_product_rounded_down(radius: float) -> None:
    levels = radius_in_grey_levels(radius)
    product = Fraction(radius) * 255
    assert Fraction(levels) <= product
    above = math.nextafter(levels, math.inf)
    assert math.isinf(above) or Fraction(above) > product


FORM = b'--X\r\nContent-Disposition: form-data; name="image"; filename="x.png"\r\n\r\n%b\r\n--X--\r\n'
SMALL = encode(np.zeros((HEIGHT, WIDTH), np.uint8))
# Body, media type, whether it is a batch; and who decodes it.
DECODED: dict[str, tuple[tuple[Any, ...], str]] = {
    "plain PNG": ((SMALL,), "loop"),
    "plain PNG in JSON": ((json.dumps({"image": text(SMALL)}).encode(), "application/json"), "loop"),
    "plain PNG in a form": ((FORM % SMALL, "multipart/form-data; boundary=X"), "loop"),
    "npy": ((npy(np.zeros((HEIGHT, WIDTH))), "application/x-npy"), "loop"),
    "plain PNG of many bytes": ((encode(np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)),), "worker"),
    "npy of many bytes": ((npy(np.zeros((99, 99))), "application/x-npy"), "worker"),
    "npy batch": ((npy(np.zeros((1, HEIGHT, WIDTH))), "application/x-npy", True), "worker"),
    "damaged plain PNG": ((SMALL[:44] + b"\xff" + SMALL[45:],), "worker"),
    "many pixels": ((encode(np.zeros((65, 65), np.uint8)),), "child"),
    "PNG with trailing bytes": ((SMALL + b"\0",), "child"),
    "JPEG": ((encode(np.zeros((HEIGHT, WIDTH), np.uint8), "JPEG"),), "child"),
    "JPEG in JSON": (
        (json.dumps({"image": text(encode(Image.new("L", (5, 4)), "JPEG"))}).encode(), "application/json"),
        "child",
    ),
    "JSON of many bytes": ((b'{"image": "%b"}' % bytes(9000), "application/json"), "child"),
    "batch": ((b'{"images": []}', "application/json", True), "child"),
}


@pytest.mark.parametrize("case", DECODED)
def test_only_plain_images_and_arrays_are_decoded_in_the_process_of_the_server(service: Service, case: str) -> None:
    arguments, expected = DECODED[case]
    asked = question(service, *arguments)
    at_once, order = asked.decode_at_once(), asked.order()
    assert ("loop" if at_once else "worker" if order is None else "child") == expected


def test_a_broken_text_is_refused_on_the_event_loop(service: Service) -> None:
    with pytest.raises(Base64Error):
        question(service, b'{"image": "!"}', "application/json").decode_at_once()


# So many at once are an overload, unless a longest wait is set.
LARGER = Settings(default_model="grey", max_batch=300, max_pixels=20_000, max_wait_ms=60_000)


def test_many_clients_at_once_get_the_answers_that_each_gets_alone(classifiers: Mapping[str, Classifier]) -> None:
    """Forms, models, sizes, counterfactuals, the other protocol, broken files and batches of all sizes, all at once."""
    random = np.random.default_rng(11)

    def some(number: int) -> dict[str, Any]:
        model = ("grey", "colour", "binary")[number % 3]
        counterfactual = number % 4 == 0
        resize = number % 7 == 0
        size = (HEIGHT + resize, WIDTH + 2 * resize)
        pixels = random.integers(0, 256, (*size, 3) if number % 2 else size, dtype=np.uint8)
        options = {"model": model, "counterfactual": counterfactual, "resize": resize}
        match number % 6:
            case 0:
                return {"url": "/predict", "json": {"image": text(encode(pixels)), **options}}
            case 1:
                query = {name: str(value).lower() for name, value in options.items()}
                return {"url": "/predict", "params": query, "headers": IMAGE, "content": encode(pixels)}
            case 2:
                broken = encode(pixels)[: int(random.integers(1, 60))]
                return {"url": "/predict", "headers": IMAGE, "content": broken}
            case 3:
                count = int(random.choice([1, 2, 64, 65, 200, 300]))
                array = random.integers(0, 256, (count, HEIGHT, WIDTH), dtype=np.uint8)
                headers = {"Content-Type": "application/x-npy"}
                return {"url": "/predict/batch", "headers": headers, "content": npy(array)}
            case 4:
                images = [text(encode(pixels // (1 + k))) for k in range(5)]
                return {"url": "/predict/batch", "json": {"images": images, **options}}
            case _:
                tensor = {"name": "image", "shape": [2, 1, HEIGHT, WIDTH], "datatype": "FP64"}
                data = random.random(2 * HEIGHT * WIDTH).tolist()
                body = {"inputs": [{**tensor, "data": data}], "parameters": {"counterfactual": counterfactual}}
                return {"url": "/v2/models/grey/infer", "json": body}

    requests = [some(number) for number in range(90)]

    async def send_all() -> tuple[list[httpx.Response], list[httpx.Response]]:
        transport = httpx.ASGITransport(create_app(LARGER, classifiers))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
            together = await asyncio.gather(*(http.post(**request) for request in requests))
            return together, [await http.post(**request) for request in requests]

    for together, alone in zip(*asyncio.run(send_all()), strict=True):
        assert together.status_code == alone.status_code
        assert_close(together.json(), alone.json())


def assert_close(one: Any, other: Any, name: str = "") -> None:
    """The same object; floats and counterfactuals as near as another order of summation leaves them."""
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in other:
            if not (key == "request_id" or (key == "image" and isinstance(other[key], str))):
                assert_close(one[key], other[key], key)
    elif isinstance(other, list) and name != "data":
        for mine, yours in zip(one, other, strict=True):
            assert_close(mine, yours, name)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=0.05 if name == "distance" else 1e-9, abs=1e-12)
    elif name == "data":
        pass
    else:
        assert one == other
