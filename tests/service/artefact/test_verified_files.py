"""Files after their verification: a change is found whatever it is, reported once, and forgiven when it is undone."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from service.artefact import verified_files
from service.artefact.files import CARD_FILE, MODEL_FILE, digest
from service.artefact.verified_files import VerifiedFiles, watched
from service.errors import ArtefactChangedError

MODEL, CARD = b"graph" * 100, b"{}"


@pytest.fixture
def files(tmp_path: Path) -> VerifiedFiles:
    (tmp_path / MODEL_FILE).write_bytes(MODEL)
    (tmp_path / CARD_FILE).write_bytes(CARD)
    return VerifiedFiles(tmp_path, "test", {MODEL_FILE: digest(MODEL), CARD_FILE: digest(CARD)})


def replace(path: Path, content: bytes) -> None:
    (path.parent / "new").write_bytes(content)
    (path.parent / "new").replace(path)


CHANGES = {
    "replaced": lambda path: replace(path, b"other"),
    "written over with as many bytes": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
    "truncated": lambda path: os.truncate(path, 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link that leads nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("file", [MODEL_FILE, CARD_FILE])
@pytest.mark.parametrize("checks_before", [0, 1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_and_reported_once_and_so_is_its_end(
    files: VerifiedFiles, caplog: pytest.LogCaptureFixture, change: str, checks_before: int, file: str
) -> None:
    path = files.folder / file
    content = path.read_bytes()
    for _ in range(checks_before):
        files.check()
    assert not files.have_changed
    CHANGES[change](path)
    for _ in range(3):
        files.check()
        assert files.have_changed
        with pytest.raises(ArtefactChangedError, match="files of model 'test' have changed"):
            files.refuse_changed()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(f"model test: {path}: ")
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)
    files.refuse_changed()
    assert not files.have_changed
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


def test_times_that_are_set_back_hide_no_change(files: VerifiedFiles) -> None:
    path = files.folder / MODEL_FILE
    for _ in range(3):
        files.check()
    before = path.stat()
    path.write_bytes(bytes(len(MODEL)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    files.check()
    assert files.have_changed


def test_a_file_that_is_written_again_with_its_content_has_not_changed(
    files: VerifiedFiles, caplog: pytest.LogCaptureFixture
) -> None:
    for write in (lambda path: path.write_bytes(MODEL), lambda path: replace(path, MODEL), lambda path: path.touch()):
        files.check()
        write(files.folder / MODEL_FILE)
        files.check()
        assert not files.have_changed
    assert caplog.records == []


@pytest.mark.parametrize("content", [MODEL, b"other"])
def test_a_file_whose_status_stays_is_read_twice_and_then_no_more(
    files: VerifiedFiles, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (files.folder / MODEL_FILE).write_bytes(content)
    read: list[str] = []
    file_digest = verified_files.file_digest

    def counting(path: Path) -> str:
        read.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(verified_files, "file_digest", counting)
    for _ in range(5):
        files.check()
    # A second change within one tick of the clock of the file system would leave the status as it is.
    assert sorted(read) == [CARD_FILE] * 2 + [MODEL_FILE] * 2


def test_a_model_that_is_read_again_is_the_verified_one_or_none(
    files: VerifiedFiles, caplog: pytest.LogCaptureFixture
) -> None:
    assert files.read_model() == MODEL
    (files.folder / MODEL_FILE).write_bytes(b"other")
    for _ in range(3):
        with pytest.raises(ArtefactChangedError):
            files.read_model()
    assert files.have_changed
    assert len(caplog.records) == 1
    (files.folder / MODEL_FILE).write_bytes(MODEL)
    assert files.read_model() == MODEL


def test_a_thread_looks_at_the_files(files: VerifiedFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified_files, "_EVERY_S", 0.001)
    with watched(lambda: [files]):
        (files.folder / CARD_FILE).unlink()
        end = time.monotonic() + 30.0
        while not files.have_changed and time.monotonic() < end:
            time.sleep(0.001)
    assert files.have_changed
