"""A folder of images is read as the service reads it, or refused with the file and the cure."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from client import Client
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiff_files import tiff

from models.data import folders
from models.data.folders import load_folder
from models.data.labelled import DataError, DataSet
from models.data.resizing import decode_file, fit_image
from models.recipes import DataOptions
from service.errors import InputError
from service.pixels.images import image_digest, to_unit, unit
from service.pixels.preprocessing import preprocessing_between


def options(**changes: object) -> DataOptions:
    return DataOptions.model_validate({"dataset": "image-folder", **changes})


def encode(pixels: np.ndarray, form: str = "PNG", mode: str | None = None, **parameters: object) -> bytes:
    picture = Image.fromarray(pixels.astype(np.uint8))
    file = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, form, **parameters)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape)


def write(folder: Path, counts: dict[str, int], shape: tuple[int, ...] = (6, 8), seed: int = 0) -> Path:
    for k, (label, count) in enumerate(counts.items()):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            (folder / label / f"{n}.png").write_bytes(encode(noise(*shape, seed=1000 * (seed + k) + n)))
    return folder


def without_rows(png: bytes) -> bytes:
    """The file with half of its rows, and checksums that fit."""
    start = png.index(b"IDAT")
    length = int.from_bytes(png[start - 4 : start], "big")
    rows = zlib.decompress(png[start + 4 : start + 4 + length])
    chunk = b"IDAT" + zlib.compress(rows[: len(rows) // 9 * 4])
    new = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[: start - 4] + new + png[start + 8 + length :]


GREY, COLOUR = noise(9, 7), noise(9, 7, 3)
FILES: dict[str, bytes] = {
    "grey": encode(GREY),
    "colour": encode(COLOUR),
    "equal channels": encode(np.repeat(GREY[..., None], 3, axis=2)),
    "one bit": encode(GREY, mode="1"),
    "grey palette": encode(GREY, mode="P"),
    "colour palette": encode(COLOUR, mode="P"),
    "grey jpeg": encode(GREY, "JPEG"),
    "jpeg": encode(COLOUR, "JPEG"),
    "turned jpeg": encode(
        COLOUR, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "bmp": encode(COLOUR, "BMP"),
    "gif": encode(GREY, "GIF"),
    "webp": encode(COLOUR, "WEBP", lossless=True),
    "opaque alpha": encode(COLOUR, mode="RGBA"),
    "alpha": encode(noise(9, 7, 4)),
    "grey with alpha": encode(GREY, mode="LA"),
    "transparent colour": encode(GREY, mode="P", transparency=0),
    "16 bits": encode(GREY, mode="I;16"),
    "cmyk": encode(COLOUR, "JPEG", mode="CMYK"),
    "animated": encode(
        GREY, "GIF", save_all=True, append_images=[Image.fromarray(GREY.astype(np.uint8).T.copy().T[::-1])]
    ),
    "tiff": encode(GREY, "TIFF"),
    "32 bits": encode(GREY, "TIFF", mode="I"),
    "text": b"not an image",
    "empty": b"",
    "truncated": encode(noise(40, 40))[:-30],
    "truncated jpeg": encode(noise(40, 40), "JPEG")[:-500],
    "truncated gif": encode(GREY, "GIF")[:-1],
    "jpeg with a preview": encode(COLOUR, "MPO", save_all=True, append_images=[Image.fromarray(GREY.astype(np.uint8))]),
    "jpeg cut before its end marker": encode(noise(40, 40), "JPEG")[:-500] + b"\xff\xd9",
    "png with half of the rows": without_rows(encode(GREY)),
}


def served(client: Client, content: bytes) -> str | None:
    """Digest of the pixels that the service answers about, or None where it refuses the file."""
    answer = client.post("/predict", params={"resize": "true"}, content=content, headers={"Content-Type": "image/png"})
    assert answer.status_code in (200, 400, 415, 422), answer.text
    return answer.json()["image"]["digest"] if answer.status_code == 200 else None


def trained_on(content: bytes) -> str | None:
    """The same of the trainer."""
    try:
        return image_digest(unit(decode_file(content)))
    except InputError:
        return None


def assert_same_verdicts(client: Client, files: Iterable[bytes]) -> tuple[int, int]:
    """Number of files that both read, and that both refuse."""
    verdicts = [(served(client, content), trained_on(content)) for content in files]
    assert [verdict for verdict in verdicts if verdict[0] != verdict[1]] == []
    refused = sum(verdict[0] is None for verdict in verdicts)
    return len(verdicts) - refused, refused


def test_files_are_read_or_refused_as_by_the_service(client: Client) -> None:
    assert assert_same_verdicts(client, FILES.values()) == (17, 12)


def test_no_flipped_bit_of_a_png_is_read_by_the_trainer_and_refused_by_the_service(client: Client) -> None:
    file = encode(noise(3, 4))
    flipped = [
        file[: bit // 8] + bytes([file[bit // 8] ^ 1 << bit % 8]) + file[bit // 8 + 1 :] for bit in range(8 * len(file))
    ]
    read, refused = assert_same_verdicts(client, flipped)
    assert refused > 400 > read


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_files_without_their_end_get_the_verdict_of_the_service(client: Client, form: str) -> None:
    file = encode(noise(9, 7, 3), form)
    ends = (b"", b"\xff\xd9") if form == "JPEG" else (b"",)
    cut = [file[:length] + end for length in range(1, len(file), 3) for end in ends]
    read, refused = assert_same_verdicts(client, [file, file + b"trailing bytes", *cut])
    # No pixel is in the last byte of the BMP, and behind the last byte of its scan the JPEG is whole with its end.
    assert (read, refused) in [(2, len(cut)), (3, len(cut) - 1)]


def test_16_bits_are_rounded_to_the_nearest_of_8() -> None:
    levels_HW = np.arange(0, 65536, 41, dtype=np.uint16)[:1596].reshape(42, 38)
    fitted = fit_image(decode_file(tiff(levels_HW[..., None])), 1, (42, 38))
    assert fitted.dtype == np.uint8
    assert (np.abs(257.0 * fitted[0] - levels_HW) <= 128.5).all()
    assert np.array_equal(fit_image(decode_file(encode(GREY, mode="I;16")), 1, (4, 5)).shape, (1, 4, 5))


SIDES = st.integers(1, 40)


@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 3]), st.sampled_from([1, 3]), st.integers(0, 10))
def test_resized_pixels_are_those_of_the_service_rounded_to_8_bits(
    height: int, width: int, to_height: int, to_width: int, sent: int, taken: int, seed: int
) -> None:
    pixels = noise(sent, height, width, seed=seed).astype(np.uint8)
    found = fit_image(pixels, taken, (to_height, to_width))
    seen = preprocessing_between((sent, height, width), (taken, to_height, to_width))(to_unit(pixels)[None])[0]
    assert np.array_equal(found, np.rint(255 * seen))


def test_image_of_the_right_shape_is_left_as_it_is() -> None:
    pixels = noise(3, 5, 6).astype(np.uint8)
    np.testing.assert_array_equal(fit_image(pixels, 3, (5, 6)), pixels)


def test_grey_files_make_a_grey_set_and_one_colour_file_a_colour_set(tmp_path: Path) -> None:
    write(tmp_path, {"a": 4, "b": 4})
    assert load_folder(tmp_path, options()).train.images_NCHW.shape[1] == 1
    (tmp_path / "b" / "colour.jpg").write_bytes(FILES["jpeg"])
    assert load_folder(tmp_path, options()).train.images_NCHW.shape[1] == 3
    assert load_folder(tmp_path, options(channels=1)).train.images_NCHW.shape[1] == 1


@pytest.mark.parametrize(
    ("shape", "changes", "multiple", "expected"),
    [
        ((6, 8), {}, 1, (6, 8)),
        ((50, 50), {}, 4, (48, 48)),
        ((200, 100), {}, 4, (64, 32)),
        ((6, 8), {}, 4, (4, 8)),
        ((6, 8), {"image_size": 12}, 1, (12, 12)),
        ((6, 8), {"image_size": (5, 9)}, 4, (5, 9)),
    ],
)
def test_size_is_the_median_at_most_64_or_what_was_asked_for(
    tmp_path: Path, shape: tuple[int, int], changes: dict[str, object], multiple: int, expected: tuple[int, int]
) -> None:
    write(tmp_path, {"a": 3, "b": 3}, shape)
    # An outlier does not move a median.
    (tmp_path / "a" / "large.png").write_bytes(encode(noise(300, 300)))
    found = load_folder(tmp_path, options(**changes), multiple=multiple)
    assert tuple(found.train.images_NCHW.shape[2:]) == expected
    assert found.card["options"]["image_size"] == list(expected)


def contents(images: DataSet, part: str) -> set[bytes]:
    return {image.numpy().tobytes() for image in getattr(images, part).images_NCHW}


def test_held_out_share_is_of_each_class_and_disjoint_from_the_rest(tmp_path: Path) -> None:
    write(tmp_path, {"cats": 20, "dogs": 10, "a bird": 3})
    found = load_folder(tmp_path, options())
    assert found.labels == ("a bird", "cats", "dogs")
    assert found.card["split"] == {"test_share": 0.2, "seed": 0}
    assert found.train.counts(3) == [2, 16, 8]
    assert found.test.counts(3) == [1, 4, 2]
    assert contents(found, "train") & contents(found, "test") == set()


def test_split_depends_on_the_images_alone(tmp_path: Path) -> None:
    first = load_folder(write(tmp_path / "one", {"a": 20, "b": 20}), options())
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    for n, path in enumerate(sorted((tmp_path / "other").rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"renamed-{n:03}.png"))
    assert contents(load_folder(tmp_path / "other", options()), "test") == contents(first, "test")
    (tmp_path / "one" / "a" / "more.png").write_bytes(encode(noise(6, 8, seed=77)))
    grown = contents(load_folder(tmp_path / "one", options()), "test")
    assert len(grown ^ contents(first, "test")) <= 2
    assert contents(load_folder(tmp_path / "other", options(split_seed=1)), "test") != contents(first, "test")


def test_copies_of_an_image_fall_on_the_same_side(tmp_path: Path) -> None:
    write(tmp_path, {"a": 6, "b": 6})
    for path in list(tmp_path.rglob("*.png")):
        for n in range(3):
            shutil.copyfile(path, path.with_name(f"copy-{n}-{path.name}"))
    found = load_folder(tmp_path, options())
    assert contents(found, "train") & contents(found, "test") == set()
    assert found.card["n_in_train_and_test"] == 0


def test_folders_train_and_test_are_taken_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train", {"a": 5, "b": 7})
    write(tmp_path / "test", {"a": 2, "b": 3}, seed=50)
    (tmp_path / "val").mkdir()
    (tmp_path / "README.txt").write_text("files beside the folders are not images of a class")
    found = load_folder(tmp_path, options())
    assert (found.train.counts(2), found.test.counts(2)) == ([5, 7], [2, 3])
    assert found.card["split"] is None
    assert "val is not used" in caplog.text
    shutil.copyfile(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "a" / "leak.png")
    assert load_folder(tmp_path, options()).card["n_in_train_and_test"] == 1
    assert "1 images are in train and in test" in caplog.text


def test_folder_train_alone_is_split(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 5, "b": 5})
    assert len(load_folder(tmp_path, options()).test) == 2


def test_evaluation_reads_the_test_folder_alone_and_finds_the_same_images(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 5, "b": 7})
    write(tmp_path / "test", {"a": 2, "b": 3}, seed=50)
    first = load_folder(tmp_path, options())
    shutil.rmtree(tmp_path / "train" / "a")
    (tmp_path / "train" / "a").mkdir()
    again = load_folder(tmp_path, DataOptions.model_validate(first.card["options"]), test_only=True)
    assert torch.equal(first.test.images_NCHW, again.test.images_NCHW)
    assert torch.equal(first.test.labels_N, again.test.labels_N)
    assert first.card["digest"]["test"] == again.card["digest"]["test"]


def test_digest_tells_another_image_another_name_and_another_class(tmp_path: Path) -> None:
    def digests() -> str:
        return str(load_folder(tmp_path, options()).card["digest"])

    write(tmp_path, {"a": 5, "b": 5})
    seen = {digests()}
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "new.png")
    seen.add(digests())
    (tmp_path / "a" / "new.png").rename(tmp_path / "b" / "new.png")
    seen.add(digests())
    (tmp_path / "b" / "new.png").write_bytes(encode(noise(6, 8, seed=99)))
    seen.add(digests())
    assert len(seen) == 4


def test_the_first_images_are_of_all_classes(tmp_path: Path) -> None:
    write(tmp_path, {"a": 40, "b": 40})
    assert set(load_folder(tmp_path, options(test_share=0.5)).test.labels_N[:12].tolist()) == {0, 1}


def test_chosen_classes_keep_their_order_and_others_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": 5, "b": 5, "c": 5})
    (tmp_path / "b" / "broken.png").write_bytes(b"")
    found = load_folder(tmp_path, options(classes=["c", "a"]))
    assert found.labels == ("c", "a")
    with pytest.raises(DataError, match=r"no class d: its folders are a, b, c; correct --set classes"):
        load_folder(tmp_path, options(classes=["a", "d"]))


def test_images_beyond_the_memory_budget_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a": 4, "b": 4})
    first = load_folder(tmp_path, options())
    monkeypatch.setattr(folders, "CACHED_BYTES", 100)
    assert torch.equal(load_folder(tmp_path, options()).train.images_NCHW, first.train.images_NCHW)


def test_hidden_files_and_clutter_of_file_managers_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"a": 4, "b": 4})
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints"):
        (tmp_path / "a" / name).write_bytes(b"clutter")
    (tmp_path / ".cache").mkdir()
    assert len(load_folder(tmp_path, options()).labels) == 2


UNUSABLE = [
    ("text", r"x\.png: the bytes are not an image in a supported format \(PNG"),
    ("empty", r"x\.png: the image is empty"),
    ("truncated", r"x\.png: the PNG file is truncated or damaged"),
    ("alpha", r"x\.png: the image has transparency.*flatten"),
    ("32 bits", r"x\.png: the TIFF file does not have 8 bits.*save it so"),
    ("cmyk", r"x\.png: the image is CMYK.*convert it"),
    ("animated", r"x\.png: the file contains several images.*send one of them"),
]


@pytest.mark.parametrize(("what", "message"), UNUSABLE)
def test_unusable_file_is_named_with_its_cure_and_can_be_left_out(tmp_path: Path, what: str, message: str) -> None:
    write(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "x.png").write_bytes(FILES[what])
    with pytest.raises(DataError, match=rf"(?s)1 of 9 files.*{message}.*--set skip_broken=true"):
        load_folder(tmp_path, options())
    found = load_folder(tmp_path, options(skip_broken=True))
    assert len(found.train) + len(found.test) == 8
    assert found.card["n_left_out"] == 1


def test_all_faults_are_told_at_once_up_to_ten(tmp_path: Path) -> None:
    write(tmp_path, {"a": 4, "b": 4})
    for n in range(12):
        (tmp_path / "a" / f"x{n:02}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)12 of 20 files.*x00\.png.*x09\.png: the image is empty[^\n]*\n  \.\.\."):
        load_folder(tmp_path, options())


def test_side_that_the_service_would_not_resize_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8193 x 1 pixels, sides go to 8192"):
        decode_file(encode(np.zeros((1, 8193))))


def nothing(folder: Path) -> None: ...


def one_class(folder: Path) -> None:
    write(folder, {"only": 3})


def empty_class(folder: Path) -> None:
    write(folder, {"a": 3, "b": 0})


def images_without_classes(folder: Path) -> None:
    (folder / "x.png").write_bytes(FILES["grey"])


def nested(folder: Path) -> None:
    write(folder / "a", {"inner": 3})
    write(folder, {"b": 3})


def one_image(folder: Path) -> None:
    write(folder, {"a": 3, "b": 1})


def other_classes(folder: Path) -> None:
    write(folder / "train", {"a": 3, "b": 3})
    write(folder / "test", {"a": 3, "c": 3})


def only_test(folder: Path) -> None:
    write(folder / "test", {"a": 3, "b": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, r"no folders in it: put the images of each class into a folder"),
        (one_class, r"has one class, only: .*--data .*only"),
        (empty_class, r"the class b is empty: put images into .*b, or remove it"),
        (images_without_classes, r"no folders in it"),
        (nested, r"a/inner is a folder inside of the class a: put its images directly"),
        (one_image, r"the class b has one image \(.*0\.png\).*add images, or make folders"),
        (other_classes, r"different classes \(only in .*train: b; only in .*test: c\)"),
        (only_test, r"a folder test and no folder train: add one"),
    ],
)
def test_folder_that_is_no_data_set_is_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path, options())


def test_class_of_which_no_image_is_usable_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": 3, "b": 0})
    (tmp_path / "b" / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"class b has no usable image left \(1 files were left out\)"):
        load_folder(tmp_path, options(skip_broken=True))


def test_path_that_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: .*--data"):
        load_folder(tmp_path / "nowhere", options())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file is a file: .*--data"):
        load_folder(tmp_path / "file", options())


def test_folder_and_file_without_permission_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not bind the superuser, who may run the tests.
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path, {"a": 3, "b": 3})
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", denied)
        with pytest.raises(DataError, match=r"a/0\.png cannot be read \(Permission denied\): make it readable"):
            load_folder(tmp_path, options())
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match=r"cannot be listed \(Permission denied\)"):
        load_folder(tmp_path, options())
