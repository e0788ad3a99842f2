"""Archived files as records: anything but an answer, an image or an artefact is refused, with its place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from audit_cases import Archived, Json, archive
from client import Client
from encoding import encode, npy

from service.__main__ import main
from service.errors import KeptError


@pytest.fixture
def archived(client: Client, zoo: Path, grey_HW: np.ndarray) -> Archived:
    """An answer of the grey model."""
    return archive(client, encode(grey_HW), zoo / "grey", counterfactual=True)


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no answer": ("answer.json", Path.unlink, "there is no such file; name the JSON file with the archived answer"),
    "not JSON": ("answer.json", lambda p: p.write_text("holds"), "is not JSON"),
    "not UTF-8": ("answer.json", lambda p: p.write_bytes(b"\xff"), "is not JSON"),
    "nested too deep": ("answer.json", lambda p: p.write_text("[" * 10**5), "is not JSON"),
    "NaN": ("answer.json", lambda p: p.write_text('{"radius": NaN}'), "NaN is no JSON number"),
    "a name twice": ("answer.json", lambda p: p.write_text('{"a": 1, "a": 2}'), "a name occurs twice in one object"),
    "a list": ("answer.json", lambda p: p.write_text("[]"), "the file is not a JSON object; keep the JSON object that"),
    "an error": (
        "answer.json",
        lambda p: p.write_text('{"type": "about:blank", "status": 400, "detail": "x"}'),
        "this is an error that the service answered",
    ),
    "no image": ("image.png", Path.unlink, "there is no such file; name the image file that was sent"),
    "no image file": ("image.png", lambda p: p.write_bytes(b"x"), "the bytes are not an image in a supported format"),
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
    archived: Archived,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    (tmp_path / "answer.json").write_text(json.dumps(archived.answer))
    (tmp_path / "image.png").write_bytes(archived.image)
    file, spoil, message = BAD[name]
    spoil(tmp_path / file)
    command = ["audit", str(tmp_path / "answer.json"), str(tmp_path / "image.png")]
    assert main([*command, "--model", str(archived.artefact)]) == 2
    assert capsys.readouterr().out == ""
    (record,) = caplog.records
    assert str(tmp_path / file) in record.getMessage()
    assert message in record.getMessage()
    assert record.exc_info is None


MEMBERS: dict[str, tuple[Callable[[Json], object], str]] = {
    "no certificate": (lambda a: a.pop("certificate"), "`certificate` is missing"),
    "radius as text": (lambda a: a["certificate"].update(radius="1"), "`certificate.radius` must be a valid number"),
    "radius as a flag": (lambda a: a["certificate"].update(radius=True), "`certificate.radius` must be a valid number"),
    "negative radius": (
        lambda a: a["certificate"].update(radius=-1.0),
        "`certificate.radius` must be greater than or equal to 0",
    ),
    "huge radius": (lambda a: a["certificate"].update(radius=10**400), "`certificate.radius` must be"),
    "class as a flag": (lambda a: a.update(class_id=True), "`class_id` must be a valid integer"),
    "class as a float": (lambda a: a.update(class_id=1.0), "`class_id` must be a valid integer"),
    "flag as a number": (lambda a: a["image"].update(resized=0), "`image.resized` must be a valid boolean"),
    "logits as text": (lambda a: a.update(logits=["1"]), "`logits.0` must be a valid number"),
    "no list of logits": (lambda a: a.update(logits={}), "`logits` must be a valid list"),
    "no runner-up": (
        lambda a: a["certificate"].update(runner_up=None),
        "`certificate.runner_up` is not a JSON object",
    ),
    "two sizes": (lambda a: a["image"].update(shape=[4, 5]), "`image.shape.2` is missing"),
    "a size of 0": (lambda a: a["image"].update(shape=[0, 4, 5]), "`image.shape.0` must be greater than 0"),
    "a size as a float": (lambda a: a["image"].update(shape=[1.0, 4, 5]), "`image.shape.0` must be a valid integer"),
    "counterfactual as text": (lambda a: a.update(counterfactual="x"), "`counterfactual` is not a JSON object"),
    "predictions that are no list": (lambda a: a.update(predictions={}), "a batch with no predictions"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_another_type_is_named(archived: Archived, tmp_path: Path, name: str) -> None:
    change, message = MEMBERS[name]
    answer = deepcopy(archived.answer)
    change(answer)
    with pytest.raises(KeptError, match=re.escape(message)):
        archived.check(tmp_path, answer)


CARDS: dict[str, tuple[Callable[[Json], object], str]] = {
    "no name": (lambda c: c.pop("name"), "`name` is missing"),
    "labels as numbers": (lambda c: c.update(labels=[0, 1, 2]), "`labels.0` must be a valid string"),
    "no channels": (lambda c: c["input"].update(channels=0), "`input.channels` must be greater than 0"),
    "no digest": (lambda c: c["graphs"].pop("model.onnx"), "`graphs.model.onnx` is missing"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_with_a_wrong_member_is_named(archived: Archived, tmp_path: Path, name: str) -> None:
    change, message = CARDS[name]
    folder = Path(shutil.copytree(archived.artefact, tmp_path / "artefact"))
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(KeptError, match=rf"card\.json: {re.escape(message)}; copy the artefact again"):
        archived.check(tmp_path, artefact=folder)


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
def test_an_artefact_without_one_of_its_files_is_named(archived: Archived, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(archived.artefact, tmp_path / "artefact"))
    (folder / file).unlink()
    with pytest.raises(KeptError, match=rf"{file}: there is no such file; name the folder with model\.onnx"):
        archived.check(tmp_path, artefact=folder)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "larger than any artefact": lambda path: (path.touch(), os.truncate(path, 2**40)),
}


@pytest.mark.parametrize("file", ["model.onnx", "card.json"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_of_an_artefact_is_refused_at_once(
    archived: Archived, tmp_path: Path, kind: str, file: str
) -> None:
    folder = Path(shutil.copytree(archived.artefact, tmp_path / "artefact"))
    (folder / file).unlink()
    ODD[kind](folder / file)
    with pytest.raises(KeptError, match=rf"{file}: is no regular file of at most .* bytes; name the folder with"):
        archived.check(tmp_path, artefact=folder)
