"""API keys: only the whole key of a stored line is found, wrong keys are cheap, and a changed file counts at once."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import run_command
from fake_clock import Clock
from hypothesis import given
from hypothesis import strategies as st

from lipcert.__main__ import main
from service.access import keys, watch
from service.access.keys import KeyRing, new_key, read_lines
from service.errors import SettingsError

KEY, LINE = new_key("ci", ["predict"])
OTHER, OTHER_LINE = new_key("ops", ["metrics", "predict"])
RING = KeyRing(f"{LINE};{OTHER_LINE}", None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock().install(monkeypatch, watch)


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The secrets for which scrypt ran."""
    seen: list[bytes] = []
    scrypt = hashlib.scrypt

    def note(secret: bytes, **parameters: int) -> bytes:
        seen.append(secret)
        return scrypt(secret, **parameters)

    monkeypatch.setattr(keys.hashlib, "scrypt", note)
    yield seen
    monkeypatch.undo()


def name_found(ring: KeyRing, sent: str | bytes) -> str | None:
    found = asyncio.run(ring.find(sent if isinstance(sent, bytes) else sent.encode()))
    return None if found is None else found.name


def replace(file: Path, text: str) -> None:
    """As an orchestrator does: another file takes the name."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_a_key_is_found_by_itself_alone() -> None:
    assert [name_found(RING, sent) for sent in (KEY, OTHER, KEY)] == ["ci", "ops", "ci"]


@given(st.binary(max_size=200))
def test_no_other_bytes_are_a_key(sent: bytes) -> None:
    assert name_found(RING, sent) is None


@given(st.data())
def test_no_change_of_a_key_is_a_key(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(KEY) - 1))
    change = data.draw(st.sampled_from(["cut", "drop", "insert", "replace", "case"]))
    letter = data.draw(st.characters(codec="latin-1"))
    changed = {
        "cut": KEY[:at],
        "drop": KEY[:at] + KEY[at + 1 :],
        "insert": KEY[:at] + letter + KEY[at:],
        "replace": KEY[:at] + letter + KEY[at + 1 :],
        "case": KEY[:at] + KEY[at:].swapcase(),
    }[change]
    assert name_found(RING, changed.encode("latin-1")) == ("ci" if changed == KEY else None)


def test_the_secret_of_one_name_is_none_for_another() -> None:
    assert name_found(RING, OTHER.replace(".ops.", ".ci.")) is None


def test_a_wrong_key_costs_no_scrypt_and_a_right_one_costs_one(hashes: list[bytes]) -> None:
    ring = KeyRing(LINE, None)
    for number in range(100):
        assert name_found(ring, f"lipcert.ci.{number:043}") is None
        assert name_found(ring, f"lipcert.nobody.{number:043}") is None
    assert hashes == []
    for _ in range(100):
        assert name_found(ring, KEY) == "ci"
    assert len(hashes) == 1


def test_many_first_requests_at_once_cost_one_scrypt(hashes: list[bytes]) -> None:
    ring = KeyRing(LINE, None)

    async def ask() -> list[keys.Key | None]:
        return list(await asyncio.gather(*(ring.find(KEY.encode()) for _ in range(20))))

    assert {key and key.name for key in asyncio.run(ask())} == {"ci"}
    assert len(hashes) == 1


def test_a_secret_with_the_right_tag_alone_is_refused() -> None:
    parts = LINE.split(":")
    forged = ":".join([*parts[:-1], "0" * 64])
    assert name_found(KeyRing(forged, None), KEY) is None


def test_a_key_has_256_random_bits_and_its_line_does_not_hold_it() -> None:
    made = [new_key("ci", ["predict"]) for _ in range(3)]
    secrets = {key.rpartition(".")[2] for key, _ in made}
    assert {len(secret) for secret in secrets} == {43}
    assert len(secrets) == 3
    assert all(key.rpartition(".")[2] not in line for key, line in made)


def test_rotation_counts_without_a_restart(tmp_path: Path, clock: Clock, hashes: list[bytes]) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{LINE}  # of the pipeline\n\n{OTHER_LINE}\n")
    ring = KeyRing("", file)
    assert [name_found(ring, KEY), name_found(ring, OTHER)] == ["ci", "ops"]
    key, line = new_key("ci", ["metrics"])
    hashes.clear()
    replace(file, f"{line}\n{OTHER_LINE.replace('metrics,', '')}\n")
    clock.now_s += 1.0
    assert [name_found(ring, sent) for sent in (KEY, OTHER, key)] == [None, "ops", "ci"]
    # The key that stayed is not hashed again, and has its new scopes.
    assert hashes == [key.rpartition(".")[2].encode()]
    found = asyncio.run(ring.find(OTHER.encode()))
    assert found is not None
    assert found.scopes == {"predict"}


def test_the_last_key_can_be_revoked(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "keys"
    file.write_text(LINE)
    ring = KeyRing("", file)
    assert name_found(ring, KEY) == "ci"
    replace(file, "")
    clock.now_s += 1.0
    assert name_found(ring, KEY) is None


@pytest.mark.parametrize("damage", ["cut short", "not text", "missing", "a folder"])
def test_a_damaged_file_changes_nothing_and_is_one_line_of_the_log(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(LINE)
    ring = KeyRing("", file)
    file.unlink()
    if damage == "cut short":
        file.write_text(LINE[:-5])
    elif damage == "not text":
        file.write_bytes(b"\xff\xfe\xff")
    elif damage == "a folder":
        file.mkdir()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            clock.now_s += 1.0
            assert name_found(ring, KEY) == "ci"
    (record,) = (record for record in caplog.records if record.name == "service.access.keys")
    assert record.levelno == logging.ERROR
    assert str(file) in record.getMessage()
    assert LINE.split(":")[-1][:20] not in record.getMessage()


@pytest.mark.parametrize("left", [OTHER_LINE, new_key("ci", ["admin"])[1]], ids=["revoked", "rotated"])
def test_a_key_that_leaves_while_it_is_checked_is_refused(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{LINE}\n{OTHER_LINE}")
    ring = KeyRing("", file)
    hash_of = keys._hash_of

    def revoke(*arguments: object) -> str:
        replace(file, left)
        clock.now_s += 1.0
        assert name_found(ring, "lipcert.ci.wrong") is None
        return hash_of(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(keys, "_hash_of", revoke)
    assert name_found(ring, KEY) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("ci predict", "2 words instead of name, scopes and hash"),
        (f"{LINE}\n{LINE}", "line 2: the name 'ci' is used twice"),
        (LINE.replace("predict", "predictions"), "'predictions' is no scope .scopes are predict, metrics, admin."),
        (LINE.replace("predict", "predict,"), "'' is no scope"),
        (LINE.replace("ci ", "c.i "), "'c.i' is no name"),
        (LINE.replace("scrypt", "md5"), "the hash of 'ci' is damaged"),
        (LINE.replace(":14:8:", ":0:8:"), "parameters of scrypt of 'ci' are zero, or take too much memory"),
        (LINE.replace(":14:8:", ":30:8:"), "parameters of scrypt of 'ci' are zero, or take too much memory"),
    ],
)
def test_a_damaged_line_is_refused_with_its_number_and_without_its_hash(text: str, fault: str) -> None:
    with pytest.raises(SettingsError, match=fault) as caught:
        read_lines(text, "keys")
    assert "keys, line " in str(caught.value)
    assert "lipcert keys new" in str(caught.value)
    assert LINE.split(":")[-1] not in str(caught.value)


def test_keys_of_file_and_variable_are_one_ring(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(LINE)
    ring = KeyRing(OTHER_LINE, file)
    assert [name_found(ring, KEY), name_found(ring, OTHER)] == ["ci", "ops"]
    with pytest.raises(SettingsError, match="both have a key 'ci'"):
        KeyRing(LINE, file)


def test_a_file_without_keys_or_that_cannot_be_read_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# no key yet\n")
    with pytest.raises(SettingsError, match="empty has no key; `lipcert keys new NAME --scope predict` makes one"):
        KeyRing("", tmp_path / "empty")
    with pytest.raises(SettingsError, match=r"LIPCERT_API_KEYS_FILE=.* cannot be read"):
        KeyRing("", tmp_path / "missing")


def test_admin_includes_every_scope() -> None:
    (key,) = read_lines(new_key("root", ["admin"])[1], "keys").values()
    assert all(map(key.allows, ("predict", "metrics", "admin")))
    (key,) = read_lines(LINE, "keys").values()
    assert [key.allows(scope) for scope in ("predict", "metrics", "admin")] == [True, False, False]


def test_the_command_prints_a_key_and_its_line() -> None:
    result = run_command(main, ["keys", "new", "ci", "--scope", "predict", "--scope", "metrics"])
    assert result.exit_code == 0
    printed = dict(line.split(": ", 1) for line in result.output.splitlines())
    ring = KeyRing(printed["line"].strip(), None)
    assert name_found(ring, printed["key"].strip()) == "ci"
    assert printed["line"].split()[:2] == ["ci", "predict,metrics"]


def test_the_command_refuses_a_name_that_is_no_name(caplog: pytest.LogCaptureFixture) -> None:
    assert run_command(main, ["keys", "new", "a name"]).exit_code == 2
    assert "'a name' cannot name a key" in caplog.text
