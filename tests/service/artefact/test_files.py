"""A file is replaced as a whole or not at all, and read a second time only as it was verified."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from service.artefact.files import digest, file_digest, read_file, read_verified, write_atomically
from service.errors import ArtefactError


def test_content_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    for content in (b"old", b"new, and longer"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_other_users_can_read_the_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "model.onnx", lambda file: file.write(b"graph"))
    assert stat.S_IMODE((tmp_path / "model.onnx").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_write_that_ends_half_way_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def write_half(file: IO[bytes]) -> None:
        file.write(b"ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write_half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "card.json", lambda file: file.write(b""))


def test_a_file_that_has_changed_since_it_was_verified_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"graph")
    verified = digest(b"graph")
    assert read_verified(path, verified) == b"graph"
    path.write_bytes(b"other")
    with pytest.raises(ArtefactError, match=f"digest {digest(b'other')}; when it was verified, it was {verified}"):
        read_verified(path, verified)
    path.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        read_verified(path, verified)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is a pipe or a device"),
    "device without an end": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe or a device"),
    "folder": (Path.mkdir, "cannot be read"),
    "socket": (bind, "cannot be read"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
    "link that leads nowhere": (lambda path: path.symlink_to("nowhere"), "the file is missing"),
    "larger than any artefact": (lambda path: (path.touch(), os.truncate(path, 2**40)), "bytes"),
}


@pytest.mark.parametrize("read", [read_file, file_digest])
@pytest.mark.parametrize("name", ["model.onnx", "card.json"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_of_an_artefact_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, read: Callable[[Path], object]
) -> None:
    # The address of a socket has 108 bytes at most.
    monkeypatch.chdir(tmp_path)
    make, reason = ODD[kind]
    make(Path(name))
    with pytest.raises(ArtefactError, match=reason) as caught:
        read(Path(name))
    assert caught.value.file == Path(name)


def test_a_volume_of_links_is_read(tmp_path: Path) -> None:
    # As Kubernetes mounts a ConfigMap: card.json -> ..data/card.json, ..data -> ..2026_11_30.
    (tmp_path / "..2026_11_30").mkdir()
    (tmp_path / "..2026_11_30" / "card.json").write_bytes(b"{}")
    (tmp_path / "..data").symlink_to("..2026_11_30")
    (tmp_path / "card.json").symlink_to(Path("..data") / "card.json")
    assert read_file(tmp_path / "card.json") == b"{}"
    assert file_digest(tmp_path / "card.json") == digest(b"{}")
