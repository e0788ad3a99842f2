"""Files that hold many images: npy and npz arrays, Parquet tables, and tar files as WebDataset writes them.

Each is read in one pass from a given input on, so that memory does not grow with the file.
"""

from __future__ import annotations

import importlib
import itertools
import math
import posixpath
import tarfile
import zipfile
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np

from service.bulk.locations import opened
from service.errors import ArrayError, InputError
from service.pixels.arrays import batch_of, read_header, unit_range
from service.pixels.folders import is_clutter

Kind = Literal["file", "npy", "npz", "parquet", "tar"]
Shape = tuple[int, int, int]

_ARCHIVES = (".tar", ".tar.gz", ".tgz")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy")
_READ_BYTES = 4 * 1024 * 1024
"""Bytes of an array that are read together."""
_READ_ROWS = 256
"""Rows of a Parquet file that are read together."""


class Item(NamedTuple):
    """One input of a container."""

    item: str
    """Its place in the file: number of a row, array and number, or name of a member."""
    key: str | None
    """Key of the sample in a WebDataset, or path in a Parquet struct."""
    content: bytes | np.ndarray | Exception
    """An image or npy file, pixels C x H x W, or the reason why it cannot be read."""


class Rows(NamedTuple):
    """Inputs of an array or a table that follow each other and are all images."""

    prefix: str
    """In front of the number in `Item.item`."""
    first: int
    """Number of the first one."""
    pixels_NCHW: np.ndarray
    """As the service decodes them: 0..255, or float64 in [0, 1]."""

    def split(self, count: int) -> tuple[Rows, Rows | None]:
        """Return the first `count` of them at most, and the others."""
        if len(self.pixels_NCHW) <= count:
            return self, None
        return self._replace(pixels_NCHW=self.pixels_NCHW[:count]), Rows(
            self.prefix, self.first + count, self.pixels_NCHW[count:]
        )


class Reading(NamedTuple):
    """How containers are read."""

    shape: Shape
    """Channels, height and width that the model takes."""
    column: str | None
    """Column of images in Parquet files; default: the only one of such a type."""
    most_bytes: int
    """Of one image file."""


def kind_of(name: str) -> Kind:
    """Return how a file of this name is read."""
    lower = name.lower()
    if lower.endswith(_ARCHIVES):
        return "tar"
    suffix = posixpath.splitext(lower)[1]
    kinds: dict[str, Kind] = {".npy": "npy", ".npz": "npz", ".parquet": "parquet", ".pq": "parquet"}
    return kinds.get(suffix, "file")


def count_inputs(kind: Kind, name: str, reading: Reading) -> int | None:
    """Return the number of inputs; null for an npy file of one image, which is read like an image file.

    Args:
        kind: not `file`.
        name: path or URL.
        reading: see `Reading`.

    Raises:
        Exception: the file is not of this kind or is damaged, in the words of its library.
    """
    with opened(name) as file:
        if kind == "npy":
            shape, _, _ = _batch_header(file, reading.shape)
            return None if _is_image(shape, reading.shape) else shape[0]
        if kind == "npz":
            with zipfile.ZipFile(file) as archive:
                return sum(_rows_of_member(archive, member, reading.shape) for member in archive.namelist())
        if kind == "parquet":
            table = _parquet().ParquetFile(file)
            _column(table.schema_arrow, reading.column)
            return table.metadata.num_rows
        return _count_members(file)


def read_inputs(kind: Kind, name: str, start: int, reading: Reading) -> Generator[Item | Rows]:
    """Yield the inputs of a container from number `start` on, one by one or many together.

    Args:
        kind: neither `file` nor an npy file of one image.
        name: path or URL.
        start: number of the first input, from 0.
        reading: see `Reading`.

    Raises:
        Exception: as in `count_inputs`, also between two inputs.
    """
    with opened(name) as file:
        if kind == "npy":
            yield from _rows(file, reading.shape, start, "")
        elif kind == "npz":
            yield from _rows_of_archive(file, reading.shape, start)
        elif kind == "parquet":
            yield from _rows_of_table(file, start, reading)
        else:
            yield from itertools.islice(_members(file, reading.most_bytes), start, None)


def _is_image(array_shape: tuple[int, ...], shape: Shape) -> bool:
    """Return whether an array of this shape is one image for `/predict`, and not a batch of images."""
    return len(array_shape) == 2 or (len(array_shape) == 3 and shape[0] in (array_shape[0], array_shape[-1]))


def _batch_header(file: IO[bytes], shape: Shape) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape and type of an array, and the bytes of one of its images."""
    array_shape, fortran_order, dtype = read_header(file)
    if _is_image(array_shape, shape):
        return array_shape, dtype, 0
    if fortran_order:
        raise ArrayError("the array is in Fortran order; save it with numpy.save(file, numpy.ascontiguousarray(array))")
    # Refuses shapes that hold no images for the model.
    batch_of(np.empty((0, *array_shape[1:]), dtype), shape)
    return array_shape, dtype, math.prod(array_shape[1:]) * dtype.itemsize


def _rows(file: IO[bytes], shape: Shape, start: int, prefix: str) -> Iterator[Item | Rows]:
    array_shape, dtype, row_bytes = _batch_header(file, shape)
    file.seek(start * row_bytes, 1)
    step = max(1, _READ_BYTES // row_bytes)
    for first in range(start, array_shape[0], step):
        count = min(step, array_shape[0] - first)
        content = file.read(count * row_bytes)
        if len(content) < count * row_bytes:
            raise ArrayError("the file ends before the array that its header declares")
        array = np.frombuffer(content, dtype).reshape(count, *array_shape[1:])
        yield from _decoded(Rows(prefix, first, batch_of(array, shape)))


def _decoded(rows: Rows) -> Iterator[Item | Rows]:
    """Yield the images as the service decodes them; one by one where some are refused."""
    prefix, first, batch_NCHW = rows
    if batch_NCHW.dtype == np.uint8:
        yield rows
        return
    try:
        yield Rows(prefix, first, unit_range(batch_NCHW))
    except InputError:
        for number, pixels_CHW in enumerate(batch_NCHW, first):
            yield Item(f"{prefix}{number}", None, _unit_or_error(pixels_CHW))


def _unit_or_error(pixels_CHW: np.ndarray) -> np.ndarray | Exception:
    try:
        return unit_range(pixels_CHW)
    except InputError as error:
        return error


def _rows_of_member(archive: zipfile.ZipFile, member: str, shape: Shape) -> int:
    with archive.open(member) as file:
        array_shape, _, _ = _batch_header(file, shape)
    if _is_image(array_shape, shape):
        raise ArrayError(f"{member} is one image of shape {array_shape}; store N images along a first axis")
    return array_shape[0]


def _rows_of_archive(file: IO[bytes], shape: Shape, start: int) -> Iterator[Item | Rows]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            rows = _rows_of_member(archive, member, shape)
            if start < rows:
                with archive.open(member) as array:
                    yield from _rows(array, shape, start, f"{member.removesuffix('.npy')}:")
            start = max(0, start - rows)


def _parquet() -> Any:
    return importlib.import_module("pyarrow.parquet")


def _column(schema: Any, name: str | None) -> Any:
    """Return the field of images; raise `ValueError` unless exactly one fits."""
    types: Any = importlib.import_module("pyarrow").types

    def holds_images(field: Any) -> bool:
        kind = field.type
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        if types.is_fixed_size_list(kind):
            return types.is_uint8(kind.value_type) or types.is_floating(kind.value_type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field for field in schema if holds_images(field) and name in (None, field.name)]
    if len(found) == 1:
        return found[0]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"{len(found)} columns hold images; name one with --column; the columns are: {columns}")


def _rows_of_table(file: IO[bytes], start: int, reading: Reading) -> Iterator[Item | Rows]:
    # A buffer of its own for each column chunk: a row group would otherwise be read as a whole.
    table = _parquet().ParquetFile(file, buffer_size=1024 * 1024, pre_buffer=False)
    name = _column(table.schema_arrow, reading.column).name
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if first + rows > start:
            for batch in table.iter_batches(_READ_ROWS, [group], [name], use_threads=False):
                passed = min(len(batch), max(0, start - first))
                yield from _items(batch.column(0)[passed:], first + passed, reading.shape)
                first += len(batch)
        else:
            first += rows


def _items(column: Any, first: int, shape: Shape) -> Iterator[Item | Rows]:
    arrow: Any = importlib.import_module("pyarrow")
    if arrow.types.is_fixed_size_list(column.type):
        yield from _lists(column, first, shape)
        return
    keys: Iterable[str | None] = itertools.repeat(None)
    if arrow.types.is_struct(column.type):
        contents = column.field("bytes").to_pylist()
        if column.type.get_field_index("path") >= 0:
            keys = (None if path is None else str(path) for path in column.field("path").to_pylist())
    else:
        contents = column.to_pylist()
    for number, (content, key) in enumerate(zip(contents, keys, strict=False), first):
        yield _missing(number) if content is None else Item(str(number), key, content)


def _lists(column: Any, first: int, shape: Shape) -> Iterator[Item | Rows]:
    size = column.type.list_size
    if size != math.prod(shape):
        raise ArrayError(f"the lists have {size} values, and an image of the model has {math.prod(shape)}: {shape}")
    pixels_NCHW = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)
    start = 0
    for is_valid, group in itertools.groupby(column.is_valid().to_pylist()):
        count = len(list(group))
        if is_valid:
            yield from _decoded(Rows("", first, pixels_NCHW[start : start + count]))
            start += count
        else:
            yield from map(_missing, range(first, first + count))
        first += count


def _missing(number: int) -> Item:
    return Item(str(number), None, ArrayError("the row holds no image"))


def _count_members(file: IO[bytes]) -> int:
    """Return the images of a WebDataset, and one more where it is damaged behind the first: that one is an error."""
    count = 0
    try:
        for _ in _members(file, None):
            count += 1
    except Exception:
        if not count:
            raise
        count += 1
    return count


def _members(file: IO[bytes], most_bytes: int | None) -> Iterator[Item]:
    """Yield the images of a WebDataset: each sample has one at least, or is one error.

    Args:
        file: a tar file, also compressed.
        most_bytes: of an image; null to count, without contents.
    """
    with tarfile.open(fileobj=file) as archive:
        for key, sample in itertools.groupby(_files(archive), lambda member: _key(member.name)):
            is_empty = True
            for member in sample:
                if member.name.lower().endswith(_IMAGES):
                    is_empty = False
                    yield Item(member.name, key, _content(archive, member, most_bytes))
            if is_empty:
                yield Item(key, key, ArrayError(f"the sample holds no image; images end in {', '.join(_IMAGES)}"))


def _files(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        # It would remember all of them.
        cast("Any", archive).members.clear()
        if member.isfile() and not any(map(is_clutter, member.name.split("/"))):
            yield member


def _key(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, most_bytes: int | None) -> bytes | Exception:
    if most_bytes is None:
        return b""
    if member.size > most_bytes:
        return ArrayError(f"it has {member.size} bytes, and at most {most_bytes} are read")
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
