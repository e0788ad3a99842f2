"""Decode every file of a folder as the server does, and compare each accepted one with the pixels that Pillow gives.

`python -m benchmarks.pictures DIR [--max-pixels N]` prints a table of outcomes by format. Files are decoded in a child
process with the limits of the server, `resize=true` and a background. Exit status 1: pixels differ, or an answer is no
refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import io
import sys
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from service.api.body import Head
from service.api.decoding import Decoders, Order, end_children
from service.errors import InputError

GREY = "808080"
_SHAPES = {"colour": (3, 224, 224)}


async def outcome(decoders: Decoders, content: bytes, max_pixels: int) -> tuple[str, np.ndarray | None]:
    """Return `read` and the pixels, or the kind of the refusal."""
    head = Head("image/png", "image/png", len(content), False, 60.0, False)
    query = (("resize", "true"), ("background", GREY))
    order = Order("predict", head, query, "colour", _SHAPES, {}, max_pixels, 1)
    try:
        async with decoders.decoded(order, content) as request:
            return "read", request.pixels_NCHW[0]
    except InputError as error:
        return type(error).__name__, None


def of_pillow(content: bytes) -> tuple[np.ndarray, int] | None:
    """Return the pixels that Pillow gives and the levels that its compositing may differ by; null if it fails."""
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        if picture.mode.startswith("I;16"):
            return np.asarray(picture, np.uint16)[np.newaxis], 0
        is_transparent = picture.has_transparency_data
        if is_transparent:
            behind = Image.new("RGBA", picture.size, f"#{GREY}")
            picture = Image.alpha_composite(behind, picture.convert("RGBA"))
        return np.moveaxis(np.asarray(picture.convert("RGB")), -1, 0), int(is_transparent)
    except Exception:
        return None


def agrees(pixels_CHW: np.ndarray, found: tuple[np.ndarray, int] | None) -> bool:
    """Return whether the pixels are those of Pillow, in as many bits as Pillow gives."""
    if found is None:
        return False
    expected_CHW, most = found
    levels_CHW = pixels_CHW.astype(np.int64)
    if pixels_CHW.dtype != np.uint8:
        levels_CHW = np.rint(pixels_CHW * 65535.0).astype(np.int64) >> (8 if expected_CHW.dtype == np.uint8 else 0)
    return bool(np.abs(levels_CHW - expected_CHW).max() <= most)


async def measure(folder: Path, max_pixels: int) -> int:
    """Print the table; return the exit status."""
    decoders = Decoders()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    faults: list[str] = []
    slowest = (0.0, "")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if not content:
            continue
        started = time.perf_counter()
        try:
            found, pixels_CHW = await outcome(decoders, content, max_pixels)
        except Exception as error:
            faults.append(f"{path}: {type(error).__name__}: {error}")
            continue
        slowest = max(slowest, (time.perf_counter() - started, str(path)))
        counts[path.suffix.lower() or path.name][found] += 1
        if pixels_CHW is not None and not agrees(pixels_CHW, of_pillow(content)):
            faults.append(f"{path}: the pixels are not those of Pillow")
    outcomes = sorted({found for row in counts.values() for found in row}, key=lambda found: (found != "read", found))
    sys.stdout.write(f"| files | {' | '.join(outcomes)} |\n|---|{'---|' * len(outcomes)}\n")
    for suffix, row in sorted(counts.items(), key=lambda item: -item[1].total()):
        sys.stdout.write(f"| {suffix} | {' | '.join(str(row[found] or '') for found in outcomes)} |\n")
    sys.stdout.write(f"{sum(row.total() for row in counts.values())} files, slowest {slowest[0]:.2f} s: {slowest[1]}\n")
    sys.stdout.write("".join(f"{fault}\n" for fault in faults))
    return 1 if faults else 0


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-pixels", type=int, default=2 * 1024 * 1024)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    # Where the extra `heic` is installed, Pillow has the values of the same library.
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    try:
        return asyncio.run(measure(chosen.folder, chosen.max_pixels))
    finally:
        end_children()


if __name__ == "__main__":
    sys.exit(main())
