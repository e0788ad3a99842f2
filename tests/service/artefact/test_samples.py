"""Samples are read by number, within limits; a folder without them, or with other files, is no fault."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from service.artefact.card import read_card
from service.artefact.samples import LARGEST_SAMPLE, MOST_SAMPLES, SAMPLES_FOLDER, read_samples
from service.pixels.images import decode_image, encode_png

ROOT = Path(__file__).resolve().parents[3]
# A novelty model has none: no image is one of its own.
ZOO = sorted(path.parent for path in (ROOT / "models/zoo").glob("*/card.json") if "-novelty" not in path.parent.name)
PNG = encode_png(np.zeros((1, 2, 2), np.uint8))


def folder_of(artefact: Path, **files: bytes) -> Path:
    (artefact / SAMPLES_FOLDER).mkdir()
    for name, content in files.items():
        (artefact / SAMPLES_FOLDER / name.replace("_", "-").replace("PNG", ".png")).write_bytes(content)
    return artefact


def test_an_artefact_without_samples_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_samples(tmp_path, 3) == ()
    (tmp_path / SAMPLES_FOLDER).write_bytes(b"a file, not a folder")
    assert read_samples(tmp_path, 3) == ()
    assert caplog.messages == []


def test_samples_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    samples = read_samples(folder_of(tmp_path, **{"10_0PNG": PNG, "2_1PNG": PNG, "0_2PNG": PNG}), 3)
    assert [sample.class_id for sample in samples] == [2, 1, 0]
    assert {sample.content for sample in samples} == {PNG}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0_3PNG", PNG),
        ("0_1PNG", b"<svg onload=alert(1)>"),
        ("0_1PNG", PNG + bytes(LARGEST_SAMPLE)),
        ("0_1PNG", b""),
        ("catPNG", PNG),
        ("0_1PNG.txt", PNG),
    ],
)
def test_a_file_that_is_no_sample_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    with caplog.at_level(logging.WARNING):
        samples = read_samples(folder_of(tmp_path, **{name: content, "5_0PNG": PNG}), 3)
    assert [sample.class_id for sample in samples] == [0]
    assert "passed over" in caplog.text


def test_a_pipe_or_a_link_to_nothing_is_passed_over(tmp_path: Path) -> None:
    import os

    folder = folder_of(tmp_path) / SAMPLES_FOLDER
    os.mkfifo(folder / "0-0.png")
    (folder / "1-0.png").symlink_to(folder / "nothing")
    assert read_samples(tmp_path, 1) == ()


def test_no_more_samples_than_the_limit_are_read(tmp_path: Path) -> None:
    files = {f"{number}_0PNG": PNG for number in range(MOST_SAMPLES + 5)}
    assert len(read_samples(folder_of(tmp_path, **files), 1)) == MOST_SAMPLES


@pytest.mark.parametrize("artefact", ZOO, ids=lambda path: path.name)
def test_every_shipped_model_has_samples_of_all_its_classes_and_of_its_size(artefact: Path) -> None:
    card = read_card(artefact)
    samples = read_samples(artefact, len(card.labels))
    assert 4 <= len(samples) <= 10
    assert {sample.class_id for sample in samples} == set(range(len(card.labels)))
    for sample in samples:
        assert len(sample.content) < 8192
        assert decode_image(sample.content, max_pixels=10_000).shape == card.input.shape
