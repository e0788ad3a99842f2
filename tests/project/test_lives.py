"""The lives in docs/architecture.md: each numbered line names functions, and a trace passes them in that order."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import builders
import numpy as np
from client import Client
from commands import run_command
from PIL import Image

import models.runs  # noqa: F401 - torch takes seconds to load, and longer under a trace
from models.__main__ import main as models_command
from service.api.app import create_app
from service.certificate.analysis import certify
from service.inference.classifier import Classifier
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SMALL = (
    'network.stem=[{"channels":8}]',
    "network.widths=[8]",
    "schedule.epochs=1",
    "schedule.batch_size=8",
    "epsilons=[0.1]",
    "augment=null",
    "schedule.precision=32-true",
)


def life(title: str) -> list[list[str]]:
    """Return the functions that each numbered line of a section names, `module.qualname`."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\d+\. (.*\n(?: {3}.*\n)*)", section, re.MULTILINE)
    return [re.findall(r"`((?:models|service)(?:\.\w+)+)`", line) for line in lines]


@contextlib.contextmanager
def called() -> Iterator[list[str]]:
    """Give the functions of the product in the order of their first call, in every thread started inside."""
    names: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith(("models.", "service.")):
            names.setdefault(f"{module}.{frame.f_code.co_qualname}")

    order: list[str] = []
    previous = sys.getprofile()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        yield order
    finally:
        sys.setprofile(previous)
        threading.setprofile(None)
        order += names


def assert_followed(lines: list[list[str]], order: list[str]) -> None:
    assert len(lines) == 10
    assert all(lines), "a line names no function"
    named = [name for line in lines for name in line]
    assert [name for name in named if name not in order] == []
    assert sorted(named, key=order.index) == named


def test_life_of_a_request(classifiers: Mapping[str, Classifier], runner: asyncio.Runner, grey_HW: np.ndarray) -> None:
    image = io.BytesIO()
    Image.fromarray(grey_HW).save(image, "png")
    client = Client(create_app(Settings(default_model="grey"), classifiers), runner)
    with called() as order:
        answer = client.post(
            "/predict?counterfactual=true", content=image.getvalue(), headers={"content-type": "image/png"}
        )
    assert answer.status_code == 200
    assert_followed(life("The life of a request"), order)


def test_life_of_a_tensor_under_proof() -> None:
    model = builders.random_groupsort(0).model
    with called() as order:
        certify(model)
    assert_followed(life("The life of a tensor under proof"), order)


def test_life_of_a_training(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label, rows in (("high", slice(0, 6)), ("low", slice(6, 12))):
        (tmp_path / "bars" / label).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 60, (12, 12)).astype(np.uint8)
            pixels[rows] += 180
            Image.fromarray(pixels).save(tmp_path / "bars" / label / f"{number}.png")
    command = ["train", str(tmp_path / "bars"), "--out", str(tmp_path / "out")]
    changes = [part for change in SMALL for part in ("--set", change)]
    with called() as order:
        result = run_command(models_command, [*command, "--threads", "1", "--device", "cpu", *changes])
    assert result.exit_code == 0, result.output
    assert_followed(life("The life of a training"), order)
