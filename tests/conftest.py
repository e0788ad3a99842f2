"""Models whose radii are known in closed form, and a client of the application that serves them."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import builders
import httpx
import hypothesis
import numpy as np
import pytest
from client import HEIGHT, LIMITS, WIDTH, Client
from ray_client import RayServer, RemoteClient
from thorough import often

from service.api.app import create_app
from service.inference.classifier import Classifier
from service.settings import Settings

# Tests run side by side; several threads for small arrays spend their time in waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# No timed unit tests: a busy machine is no defect. Few examples are the same in each run; of many, others are searched.
hypothesis.settings.register_profile(
    "lipcert", deadline=None, max_examples=often(25, 100), derandomize=often(True, False)
)
hypothesis.settings.load_profile("lipcert")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the tests and their libraries, which stay to the end, out of the garbage collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture
def without_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU, no other setting of the shell, and the level of the log as it was afterwards."""
    for name in list(os.environ):
        if name.upper().startswith("LIPCERT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LIPCERT_PROVIDER", "cpu")
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def linear_weights() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[int, int, int]]]:
    """Weight K x D, bias K and input shape of the linear models: grey, colour, and one output."""
    random = np.random.default_rng(7)
    shapes = {"grey": (3, (1, HEIGHT, WIDTH)), "colour": (3, (3, HEIGHT, WIDTH)), "binary": (1, (1, HEIGHT, WIDTH))}
    return {
        name: (random.normal(size=(n_outputs, int(np.prod(shape)))), random.normal(size=n_outputs), shape)
        for name, (n_outputs, shape) in shapes.items()
    }


@pytest.fixture(scope="session")
def zoo(linear_weights: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artefacts of `linear_weights`."""
    folder = tmp_path_factory.mktemp("zoo")
    for name, weights in linear_weights.items():
        builders.write(folder / name, builders.linear(*weights), name)
    return folder


@pytest.fixture(scope="session")
def classifiers(zoo: Path) -> Mapping[str, Classifier]:
    """The loaded artefacts of `zoo`."""
    return {folder.name: Classifier.load(folder, "cpu", 1) for folder in zoo.iterdir()}


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all requests."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def client(classifiers: Mapping[str, Classifier], runner: asyncio.Runner, zoo: Path) -> Iterator[Client | RemoteClient]:
    """A client of the application; the default model is `grey`, the limits are `LIMITS`.

    With the variable `TESTS_ON_RAY`, the application runs in a replica of Ray Serve.
    """
    if os.environ.get("TESTS_ON_RAY"):
        settings = {"models": zoo, "default_model": "grey", "provider": "cpu", **LIMITS}
        with RayServer(settings) as server, httpx.Client(base_url=server.url, timeout=60.0) as http:
            yield RemoteClient(http)
        return
    yield Client(create_app(Settings(default_model="grey", **LIMITS), classifiers), runner)


@pytest.fixture(scope="session")
def grey_HW() -> np.ndarray:
    """A grey image, uint8, of the size of the models."""
    return np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


@pytest.fixture(scope="session")
def colour_HWC() -> np.ndarray:
    """A colour image, uint8, of the size of the models."""
    return np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
