"""Signatures, on an artefact that minisign 0.11 signed: `minisign -Sm card.json`, once as older versions do (`-l`), and
with another key."""

from __future__ import annotations

import re
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import minisign
import pytest

from service.artefact.files import digest
from service.artefact.signature import Signers
from service.artefact.verification import verify
from service.errors import ArtefactError, SettingsError
from service.inference.classifier import Classifier
from service.inference.loading import load_classifiers
from service.settings import Settings

SAMPLE = Path(__file__).resolve().parents[2] / "signed_artefact"
KEY = (SAMPLE / "minisign.pub").read_text().splitlines()[1]
BASE64 = string.ascii_letters + string.digits + "+/"
ANOTHER = (SAMPLE / "another.pub").read_text().splitlines()[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The signed artefact as it is shipped."""
    (tmp_path / "models" / "signed").mkdir(parents=True)
    for name in ("card.json", "card.json.minisig", "model.onnx"):
        shutil.copy(SAMPLE / name, tmp_path / "models" / "signed")
    return tmp_path / "models" / "signed"


def check(folder: Path, setting: str = KEY) -> None:
    """As the server does."""
    Classifier.from_findings(folder, verify(folder), "cpu", 1, signers=Signers.of(setting))


def load(folder: Path, key: str = KEY, **settings: bool) -> None:
    load_classifiers(
        Settings(models=folder.parent, default_model="signed", provider="cpu", require_signature=key, **settings)  # type: ignore[arg-type]
    )


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def test_what_minisign_signed_is_accepted(folder: Path) -> None:
    check(folder)
    load(folder)
    shutil.copy(SAMPLE / "card.json.legacy.minisig", folder / "card.json.minisig")
    check(folder)


@pytest.mark.parametrize(
    "keys", ["{key}", "  {key}\n", "{another}\n{key}\n", "untrusted comment: a\n{key}\n\n# b\n{another}"]
)
def test_keys_come_from_the_setting_or_a_file(folder: Path, tmp_path: Path, keys: str) -> None:
    text = keys.format(key=KEY, another=ANOTHER)
    (tmp_path / "keys.pub").write_text(text)
    check(folder, str(tmp_path / "keys.pub"))
    if ANOTHER not in text:
        check(folder, text)
    check(folder, str(SAMPLE / "minisign.pub"))


def changed_model(folder: Path) -> None:
    """Other weights, and their digest in the card."""
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    edit(folder / "card.json", digest((SAMPLE / "model.onnx").read_bytes()), digest(bytes(content)))


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no signature": (lambda folder: (folder / "card.json.minisig").unlink(), "it is required .*minisign -Sm card.json"),
    "empty signature": (lambda folder: (folder / "card.json.minisig").write_bytes(b""), "no signature of minisign"),
    "no text": (lambda folder: (folder / "card.json.minisig").write_bytes(b"\xff\n" * 4), "no signature of minisign"),
    "a signature that is a folder": (
        lambda folder: ((folder / "card.json.minisig").unlink(), (folder / "card.json.minisig").mkdir()),
        "cannot be read",
    ),
    "signed by another": (
        lambda folder: shutil.copy(SAMPLE / "card.json.another.minisig", folder / "card.json.minisig"),
        "of a key that LIPCERT_REQUIRE_SIGNATURE does not name",
    ),
    "another label": (
        lambda folder: edit(folder / "card.json", "class 0", "class 9"),
        r"signature of another card\.json",
    ),
    "one more space": (lambda folder: edit(folder / "card.json", "{", "{ "), r"signature of another card\.json"),
    "another model": (changed_model, r"signature of another card\.json"),
    "another trusted comment": (
        lambda folder: edit(folder / "card.json.minisig", "version 1", "version 2"),
        r"signature of another card\.json",
    ),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_what_is_not_signed_as_it_is_is_refused(folder: Path, forgery: str) -> None:
    change, reason = FORGED[forgery]
    change(folder)
    with pytest.raises(ArtefactError, match=reason) as caught:
        check(folder)
    assert caught.value.file == folder / "card.json.minisig"
    with pytest.raises(ArtefactError, match=reason):
        load(folder)
    if "signature" not in forgery:
        Classifier.load(folder, "cpu", 1)


def test_a_model_that_the_signed_card_does_not_name_is_refused(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match="the card states the digest"):
        check(folder)


def test_no_flipped_bit_of_a_signature_is_accepted(folder: Path) -> None:
    path, signers = folder / "card.json.minisig", Signers.of(KEY)
    card, signature = (folder / "card.json").read_bytes(), path.read_bytes()
    written = minisign.Signature.from_bytes(signature)
    spare = {found.start() - 1 for found in re.finditer(b"=+\n", signature)}
    first = signature.index(b"\n") + 1  # the first line is a comment that nobody signs
    for place in range(first, len(signature.rstrip())):
        for bit in range(8):
            forged = bytearray(signature)
            forged[place] ^= 1 << bit
            path.write_bytes(forged)
            # The last character of base64 has bits that mean nothing.
            same = place in spare and chr(forged[place]) in BASE64 and minisign.Signature.from_bytes(forged) == written
            with nullcontext() if same else pytest.raises(ArtefactError):
                signers.check(folder / "card.json", card)


def test_a_signed_model_of_the_same_key_in_another_folder_is_a_model_of_its_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    with pytest.raises(ArtefactError, match="the name 'signed' is taken"):
        load(folder)


def test_an_unsigned_model_beside_a_signed_one_is_broken(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "unsigned")
    edit(folder.parent / "unsigned" / "card.json", '"signed"', '"unsigned"')
    settings = Settings(models=folder.parent, default_model="signed", provider="cpu", require_signature=KEY)
    loaded = load_classifiers(settings)
    assert (list(loaded), list(loaded.broken)) == (["signed"], ["unsigned"])
    with pytest.raises(ArtefactError, match=r"signature of another card\.json"):
        load(folder, strict=True)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("no-such-file.pub", r"no key, and no file that can be read \(No such file"),
        (KEY[:-4], "no key, and no file"),
        ("{empty}", "the file holds no key"),
        ("{secret}", "a key in the file is not valid"),
        ("{bytes}", "no key, and no file that can be read"),
    ],
)
def test_a_setting_that_names_no_keys_ends_the_start(folder: Path, tmp_path: Path, setting: str, reason: str) -> None:
    (tmp_path / "empty").write_text("untrusted comment: none\n")
    (tmp_path / "secret").write_bytes(bytes(minisign.KeyPair.generate().secret_key))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    value = setting.format(**{name: tmp_path / name for name in ("empty", "secret", "bytes")})
    with pytest.raises(SettingsError, match=reason) as caught:
        load(folder, value)
    assert str(caught.value).endswith("the second line of minisign.pub, or a file of such keys")


def test_a_server_that_requires_no_signature_loads_no_cryptography(folder: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from service.inference.loading import load_classifiers
from service.settings import Settings
load_classifiers(Settings(models=Path({str(folder.parent)!r}), default_model="signed", provider="cpu"))
print(sorted({{"minisign", "cryptography"}} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "[]\n"
