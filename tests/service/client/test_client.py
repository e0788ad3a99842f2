"""Both clients of the service on a port: all kinds of images, all options, typed answers, errors with their problem."""

from __future__ import annotations

import asyncio
import base64
import io
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import certificates
import httpx
import numpy as np
import pytest
from client import HEIGHT, WIDTH
from live_server import LiveServer
from PIL import Image

from service.access.certificate import Certificate
from service.api.app import create_app
from service.api.schema import Options
from service.client import AsyncClient, Client, PredictAnswer, ServiceError, UnreachableError
from service.client.parts import Parts
from service.inference.classifier import Classifier
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def url(classifiers: Mapping[str, Classifier]) -> Iterator[str]:
    settings = Settings(default_model="grey", max_batch=4, max_pixels=2_000, api_keys="")
    with LiveServer(create_app(settings, classifiers)) as server:
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def service_client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def png(grey_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(grey_HW).save(file, "PNG")
    return file.getvalue()


def test_the_answer_is_that_of_the_service_to_the_last_bit(url: str, service_client: Client, png: bytes) -> None:
    explained = {"counterfactual": True, "strength": 2, "path": 3, "saliency": True}
    for options in ({}, {"counterfactual": True, "proof": "best", "epsilon": 0.1}, explained):
        document = {"image": base64.b64encode(png).decode(), **options}
        sent = httpx.post(f"{url}/predict", json=document)
        answer = service_client.predict(png, **options)
        assert isinstance(answer, PredictAnswer)
        assert answer.model_dump_json() == sent.text


def test_every_kind_of_image_is_sent_as_it_is(
    service_client: Client, png: bytes, grey_HW: np.ndarray, tmp_path: Path
) -> None:
    file, array_file = tmp_path / "image.png", tmp_path / "image.npy"
    file.write_bytes(png)
    np.save(array_file, grey_HW)
    images: list[Any] = [
        png,
        bytearray(png),
        file,
        str(file),
        grey_HW,
        grey_HW[np.newaxis],
        grey_HW / 255.0,
        np.asfortranarray(grey_HW),
        array_file,
        array_file.read_bytes(),
        Image.open(file),
    ]
    answers = [service_client.predict(image) for image in images]
    assert len({answer.image.digest for answer in answers}) == 1
    assert len({answer.certificate.radius for answer in answers}) == 1
    many = list(service_client.predict_many(images, images_per_request=3))
    assert [answer.model_dump() for answer in many] == [answer.model_dump() for answer in answers]


def test_options_are_those_of_the_service_and_others_are_refused_before_a_request(
    service_client: Client, png: bytes
) -> None:
    answer = service_client.predict(
        png, model="grey", counterfactual=True, target=None, epsilon=1e-300, proof="best", resize=True
    )
    assert answer.certificate.epsilon == 1e-300
    assert answer.certificate.proof == "best"
    assert answer.counterfactual is not None
    for options in ({"epsilom": 1.0}, {"epsilon": -1.0}, {"proof": "better"}, {"target": "x"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            service_client.predict(png, **options)
        with pytest.raises(ValueError, match=next(iter(options))):
            next(service_client.predict_many([png], **options))
    with pytest.raises(ValueError, match=r"^epsilom: Extra inputs are not permitted \(options: counterfactual, "):
        service_client.predict(png, epsilom=1)


def test_an_error_carries_the_problem_of_the_service(service_client: Client, png: bytes) -> None:
    with pytest.raises(ServiceError, match="404 Unknown model: there is no model 'nonsense'") as raised:
        service_client.predict(png, model="nonsense")
    assert (raised.value.status, raised.value.type) == (404, "urn:problem-type:lipcert:unknown-model")
    assert raised.value.problem.instance == "/predict"
    with pytest.raises(ServiceError, match="not an image"):
        service_client.predict(b"nonsense")
    with pytest.raises(ServiceError, match="404 Not Found"):
        service_client.model("../predict")


def test_models_and_readiness_are_typed(service_client: Client) -> None:
    assert {model.name for model in service_client.models().models} == {"binary", "colour", "grey"}
    model = service_client.model("colour")
    assert (model.input.channels, model.input.height, model.input.width) == (3, HEIGHT, WIDTH)
    assert model.card["name"] == "colour"
    assert service_client.ready().status == "ready"


def test_many_images_are_answered_in_order_whatever_their_sizes_and_kinds(
    service_client: Client, grey_HW: np.ndarray
) -> None:
    random = np.random.default_rng(3)
    shapes = [(HEIGHT, WIDTH), (7, 9), (7, 9), (7, 9, 3), (HEIGHT, WIDTH), (30, 30), (30, 30), (30, 30), (2, 3)]
    arrays = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    images = [Image.fromarray(array) for array in arrays]
    alone = [service_client.predict(image, resize=True) for image in images]
    # Nine images are more than a batch of the server, and three of 30 x 30 are more pixels than a request may have.
    together = list(service_client.predict_many(images, resize=True))
    assert [answer.image.digest for answer in together] == [answer.image.digest for answer in alone]
    assert [answer.label for answer in together] == [answer.label for answer in alone]
    greys = [array for array in arrays if array.ndim == 2]
    assert [answer.image.shape[1:] for answer in service_client.predict_many(greys, resize=True)] == [
        array.shape for array in greys
    ]
    assert list(service_client.predict_many([])) == []


def test_a_broken_image_ends_the_answers_at_its_request(service_client: Client, png: bytes) -> None:
    answers = service_client.predict_many([png, png, b"broken", png], images_per_request=2)
    assert [next(answers).label, next(answers).label]
    with pytest.raises(ServiceError, match="image 0"):
        next(answers)


def test_images_are_read_as_they_are_needed_in_parts_of_bounded_bytes() -> None:
    taken: list[int] = []

    def images() -> Iterator[bytes]:
        for number in range(1000):
            taken.append(number)
            yield bytes(3 * 1024 * 1024)

    parts = Parts(images(), 64)
    assert len(next(parts)) == 2
    assert len(taken) == 3
    with pytest.raises(ValueError, match="at least one image"):
        Parts([], 0)


@pytest.mark.parametrize("image", [None, 7, [1, 2], object()])
def test_an_object_that_is_no_image_is_refused(service_client: Client, image: Any) -> None:
    with pytest.raises(TypeError, match="an image is a path"):
        service_client.predict(image)


def test_an_image_that_cannot_be_written_losslessly_is_refused(service_client: Client, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode CMYK cannot be sent"):
        service_client.predict(Image.new("CMYK", (WIDTH, HEIGHT)))
    with pytest.raises(ServiceError, match="transparency"):
        service_client.predict(Image.new("RGBA", (WIDTH, HEIGHT)))
    with pytest.raises(ValueError, match="Object arrays"):
        service_client.predict(np.array([None]))
    with pytest.raises(FileNotFoundError):
        service_client.predict(tmp_path / "missing.png")


def test_the_asynchronous_client_gives_the_same_answers(url: str, service_client: Client, png: bytes) -> None:
    async def main() -> None:
        async with AsyncClient(url) as client:
            together = await asyncio.gather(*(client.predict(png, epsilon=0.1) for _ in range(20)))
            assert {answer.model_dump_json() for answer in together} == {
                service_client.predict(png, epsilon=0.1).model_dump_json()
            }
            many = [answer async for answer in client.predict_many([png] * 9, images_per_request=6)]
            assert len(many) == 9
            assert (await client.models()) == service_client.models()
            assert (await client.model("grey")) == service_client.model("grey")
            assert (await client.ready()).status == "ready"
            with pytest.raises(ServiceError):
                await client.predict(b"nonsense")

    asyncio.run(main())


def test_the_certificate_of_the_server_is_verified_unless_the_caller_says_otherwise(
    classifiers: Mapping[str, Classifier], png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "certificate").write_text(certificates.FIRST)
    (tmp_path / "key").write_text(certificates.FIRST_KEY)
    tls = Certificate(tmp_path / "certificate", tmp_path / "key").context()
    with LiveServer(create_app(Settings(default_model="grey"), classifiers), tls=tls) as server:
        url = f"https://localhost:{server.port}"
        for verify in (tmp_path / "certificate", ssl.create_default_context(cadata=certificates.FIRST), False):
            with Client(url, verify=verify) as client:
                assert client.predict(png).model == "grey"
        started = time.monotonic()
        with Client(url) as client, pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            client.predict(png)
        # Another try would end the same way.
        assert time.monotonic() - started < 5
    with pytest.raises(OSError, match="No such file"):
        Client(url, verify=tmp_path / "missing")


def test_answers_of_a_newer_server_keep_their_new_fields() -> None:
    document = '{"class_id":1,"label":"a","new":{"b":[1]}}'
    from service.api.schema import ClassLabel

    assert ClassLabel.model_validate_json(document).model_dump_json() == document
    with pytest.raises(ValueError, match="Extra inputs"):
        Options.model_validate({"new": 1})


def test_the_client_loads_neither_the_server_nor_its_libraries() -> None:
    code = """
import sys
from service.client import AsyncClient, Client
absent = {"numpy", "onnx", "onnxruntime", "fastapi", "starlette", "uvicorn", "PIL", "jaxtyping", "service.errors"}
sys.exit(str(absent & set(sys.modules)) if absent & set(sys.modules) else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_without_httpx_a_sentence_says_what_to_install() -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "httpx" else find(name, package)
try:
    import service.client
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install 'lipcert[client]'" in result.stdout
