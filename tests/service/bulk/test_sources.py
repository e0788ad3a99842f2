"""Every kind of source: each input is one row, and its answer is that of `POST /predict` to the last bit."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_runs import ask, certify, check_row, npy, rows_of
from client import HEIGHT, WIDTH
from PIL import Image

from service.sheets import files

arrow: Any = importlib.import_module("pyarrow")
parquet: Any = importlib.import_module("pyarrow.parquet")
pytestmark = pytest.mark.usefixtures("here")
RANDOM = np.random.default_rng(11)


def png(pixels_HW: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    return file.getvalue()


def images(count: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, HEIGHT, WIDTH), dtype=np.uint8)


def run(out: Path, zoo: Path, *words: object) -> list[dict[str, Any]]:
    """Return all rows in order, answers and errors; each input of the run has one."""
    result = certify(*words, "--model", zoo / "grey", "--out", out, "--part-rows", 7)
    assert result.exit_code in (0, 1), result.output
    rows = sorted(rows_of(out) + rows_of(out, "errors"), key=lambda row: row["row"])
    assert [row["row"] for row in rows] == list(range(json.loads((out / "manifest.json").read_text())["inputs"]))
    assert result.exit_code == int(any("error" in row for row in rows))
    return rows


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--counterfactual", "--proof", "best"], {"counterfactual": True, "proof": "best"}),
        (["--epsilon", "0.25", "--resize"], {"epsilon": 0.25, "resize": True}),
    ],
    ids=["plain", "searches", "resized"],
)
def test_a_folder_has_one_row_for_each_file_with_the_answer_of_the_server(
    words: list[str], options: dict[str, Any], url: str, zoo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number, pixels_HW in enumerate(images(9)):
        (folder / "sub" / f"{number}.png").write_bytes(png(pixels_HW))
    Image.fromarray(images(1)[0]).convert("RGB").save(folder / "colour.bmp")
    (folder / "large.png").write_bytes(png(RANDOM.integers(0, 256, (9, 8), dtype=np.uint8)))
    (folder / "broken.png").write_bytes(png(images(1)[0])[:40])
    (folder / "one.npy").write_bytes(npy(RANDOM.random((HEIGHT, WIDTH))))
    (folder / "nan.npy").write_bytes(npy(np.full((HEIGHT, WIDTH), np.nan)))
    (folder / "ünïcode.png").write_bytes(png(images(1)[0]))
    (folder / "Thumbs.db").write_bytes(b"clutter")
    rows = run(tmp_path / "out", zoo, folder, *words)
    assert [Path(row["file"]).name for row in rows[:6]] == [
        *("broken.png", "colour.bmp", "large.png", "nan.npy", "one.npy", "ünïcode.png")
    ]
    assert len(rows) == 15
    for row in rows:
        check_row(row, ask(url, Path(row["file"]).read_bytes(), options))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_rows_of_an_array_are_images_as_the_service_reads_them(
    dtype: type, url: str, zoo: Path, tmp_path: Path
) -> None:
    batch = images(20)[:, np.newaxis] if dtype == np.uint8 else RANDOM.random((20, 1, HEIGHT, WIDTH)).astype(dtype)
    if dtype == np.float64:
        batch[3, 0, 0, 1] = 1.5
    np.save(tmp_path / "first.npy", batch)
    np.save(tmp_path / "flat.npy", batch[:, 0])
    np.save(tmp_path / "last.npy", np.moveaxis(batch, 1, -1))
    np.savez_compressed(tmp_path / "both.npz", a=batch[:3], b=batch[3:])
    words = [tmp_path / name for name in ("first.npy", "flat.npy", "last.npy", "both.npz")]
    rows = run(tmp_path / "out", zoo, *words)
    assert [row["item"] for row in rows[:20]] == [str(number) for number in range(20)]
    assert [row["item"] for row in rows[60:64]] == ["a:0", "a:1", "a:2", "b:0"]
    assert len(rows) == 80
    for number, row in enumerate(rows):
        check_row(row, ask(url, npy(batch[number % 20]), {}))


def test_a_parquet_file_may_hold_bytes_structs_or_pixels(url: str, zoo: Path, tmp_path: Path) -> None:
    pixels = images(30)
    contents = [png(pixels_HW) for pixels_HW in pixels]
    contents[4] = b"no image"
    table = arrow.table({"id": range(30), "image": [*contents[:-1], None]})
    parquet.write_table(table, tmp_path / "bytes.parquet", row_group_size=11)
    structs = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(contents)]
    parquet.write_table(arrow.table({"picture": structs}), tmp_path / "structs.parquet")
    lists = arrow.array(pixels.reshape(30, -1).tolist(), arrow.list_(arrow.uint8(), HEIGHT * WIDTH))
    parquet.write_table(arrow.table({"pixels": lists, "thumbnail": contents}), tmp_path / "lists.parquet")
    rows = run(tmp_path / "bytes", zoo, tmp_path / "bytes.parquet")
    assert rows[29]["error"] == "the row holds no image"
    for row, content in zip(rows[:29], contents, strict=False):
        check_row(row, ask(url, content, {}))
    keyed = run(tmp_path / "structs", zoo, tmp_path / "structs.parquet")
    assert [row["key"] for row in keyed] == [f"{number}.png" for number in range(30)]
    assert [row.get("radius") for row in keyed[:29]] == [row.get("radius") for row in rows[:29]]
    (refused,) = run(tmp_path / "refused", zoo, tmp_path / "lists.parquet")
    assert "name one with --column; the columns are: pixels (fixed_size_list" in refused["error"]
    named = run(tmp_path / "lists", zoo, tmp_path / "lists.parquet", "--column", "pixels")
    for row, pixels_HW in zip(named, pixels, strict=True):
        check_row(row, ask(url, npy(pixels_HW), {}))


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_samples_of_a_webdataset_have_their_key(suffix: str, url: str, zoo: Path, tmp_path: Path) -> None:
    path, contents = tmp_path / f"shard{suffix}", [png(pixels_HW) for pixels_HW in images(20)]
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as archive:
        for number, content in enumerate(contents):
            for name, data in ((f"a/{number:03d}.cls", b"1"), (f"a/{number:03d}.seg.png", content)):
                if number == 5 and name.endswith("png"):
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    rows = run(tmp_path / "out", zoo, path)
    assert [row["key"] for row in rows] == [f"a/{number:03d}" for number in range(20)]
    assert rows[5]["error"].startswith("the sample holds no image")
    assert rows[6]["item"] == "a/006.seg.png"
    for number, row in enumerate(rows):
        if number != 5:
            check_row(row, ask(url, contents[number], {}))


def test_damaged_files_are_rows_with_their_reason(zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    batch = images(40)
    (folder / "cut.npy").write_bytes(npy(batch)[:-100])
    (folder / "objects.npy").write_bytes(npy(np.zeros(3, complex)))
    (folder / "text.npz").write_bytes(b"no archive")
    (folder / "text.parquet").write_bytes(b"no table")
    parquet.write_table(arrow.table({"image": [png(one) for one in batch]}), folder / "torn.parquet")
    content = bytearray((folder / "torn.parquet").read_bytes())
    content[20:600] = bytes(580)
    (folder / "torn.parquet").write_bytes(content)
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for number, one in enumerate(batch):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(png(one))
            archive.addfile(info, io.BytesIO(png(one)))
    (folder / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[: 30 * 1024 + 100])
    rows = run(tmp_path / "out", zoo, folder, tmp_path / "missing.png", tmp_path / "missing.npy")
    counts = dict.fromkeys(("cut.npy", "cut.tar", "objects.npy", "text.npz", "text.parquet", "torn.parquet"), 0)
    for row in rows[:-2]:
        counts[Path(row["file"]).name] += 1
        assert row.get("error") != ""
    assert counts == {
        **{"cut.npy": 40, "cut.tar": counts["cut.tar"], "objects.npy": 1, "text.npz": 1, "text.parquet": 1},
        "torn.parquet": 40,
    }
    assert counts["cut.tar"] > 5
    assert "cannot be read" in rows[-1]["error"]
    assert "No such file" in rows[-2]["error"]


def test_a_list_names_files_and_containers_relative_to_itself(url: str, zoo: Path, tmp_path: Path) -> None:
    contents = [png(pixels_HW) for pixels_HW in images(3)]
    np.save(tmp_path / "three.npy", images(3))
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    (tmp_path / "list.txt").write_text(f"2.png\n\n{tmp_path / '0.png'}\nthree.npy\ngone.png\n", encoding="utf-8")
    rows = run(tmp_path / "out", zoo, tmp_path / "list.txt")
    assert [(Path(row["file"]).name, row["item"]) for row in rows] == [
        *(("2.png", None), ("0.png", None), ("three.npy", "0"), ("three.npy", "1"), ("three.npy", "2")),
        ("gone.png", None),
    ]
    check_row(rows[0], ask(url, contents[2], {}))


def test_urls_of_fsspec_are_sources(zoo: Path, tmp_path: Path) -> None:
    system = importlib.import_module("fsspec").filesystem("memory")
    pixels = images(12)
    for number, pixels_HW in enumerate(pixels):
        system.pipe(f"/bucket/{number:02d}.png", png(pixels_HW))
        (tmp_path / f"{number:02d}.png").write_bytes(png(pixels_HW))
    system.pipe("/arrays/all.npy", npy(pixels))
    system.pipe("/tables/all.parquet", _table([png(pixels_HW) for pixels_HW in pixels]))
    try:
        local = [row["radius"] for row in run(tmp_path / "local", zoo, tmp_path / "*.png")]
        words = ["memory://bucket", "memory://bucket/*.png", "memory://arrays/all.npy", "memory://tables/all.parquet"]
        rows = run(tmp_path / "remote", zoo, *words, "memory://bucket/gone.png")
        assert [row["radius"] for row in rows[:-1]] == 4 * local
        assert rows[0]["file"] == "memory:///bucket/00.png"
        assert "no such file" in rows[-1]["error"]
        system.pipe("/arrays/all.npy", npy(pixels[:5]))
        again = certify(*words, "memory://bucket/gone.png", "--model", zoo / "grey", "--out", tmp_path / "remote")
        assert again.exit_code == 2
    finally:
        for folder in ("/bucket", "/arrays", "/tables"):
            system.rm(folder, recursive=True)


def _table(contents: list[bytes]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(arrow.table({"image": contents}), file)
    return file.getvalue()


@pytest.fixture
def files_url(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_images_behind_http_are_sources(files_url: str, zoo: Path, tmp_path: Path) -> None:
    names = []
    for number, pixels_HW in enumerate(images(20)):
        (tmp_path / "served" / f"{number}.png").write_bytes(png(pixels_HW))
        names.append(f"{files_url}/{number}.png")
    (tmp_path / "urls.txt").write_text("\n".join([*names, f"{files_url}/gone.png"]), encoding="utf-8")
    rows = run(tmp_path / "out", zoo, tmp_path / "urls.txt")
    assert [row["file"] for row in rows[:20]] == names
    local = run(tmp_path / "local", zoo, *[tmp_path / "served" / f"{number}.png" for number in range(20)])
    assert [row["radius"] for row in rows[:20]] == [row["radius"] for row in local]
    assert "no such file" in rows[20]["error"]


def test_a_url_without_its_library_says_what_to_install(zoo: Path, tmp_path: Path) -> None:
    result = certify("nowhere://bucket/a.png", "--model", zoo / "grey", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "nowhere://bucket/a.png cannot be read" in result.output


def test_a_large_folder_is_sorted_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "_SORTED_AT_ONCE", 7)
    names = [f"{number}\n.png" for number in range(40)]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in files.files_below(tmp_path)] == sorted(names)
