"""Sample images of an artefact, for the playground and a first request: `samples/NUMBER-CLASS.png`.

CLASS is the index of the true class in the labels of the card. The images are no part of the proof, and no digest
covers them; an artefact may have no such folder. They are read once, when the model is loaded, within limits.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from service.artefact.files import open_file
from service.errors import ArtefactError

_log = logging.getLogger(__name__)

SAMPLES_FOLDER = "samples"
MOST_SAMPLES = 16
LARGEST_SAMPLE = 64 * 1024
"""Bytes of a file."""
_LISTED = 256
"""Entries of the folder that are looked at."""
_NAME = re.compile(r"(\d{1,3})-(\d{1,5})\.png", re.ASCII)
_PNG = b"\x89PNG\r\n\x1a\n"


class Sample(NamedTuple):
    """An image with its true class."""

    content: bytes
    """Of a PNG file."""
    class_id: int


def read_samples(folder: Path, n_classes: int) -> tuple[Sample, ...]:
    """Return the samples of an artefact, at most `MOST_SAMPLES`, by number; a file with a fault is passed over.

    Args:
        folder: of the artefact.
        n_classes: number of classes of its card.
    """
    try:
        with os.scandir(folder / SAMPLES_FOLDER) as entries:
            names = [entry.name for entry in itertools.islice(entries, _LISTED)]
    except OSError:
        return ()
    numbered = sorted((int(match[1]), int(match[2]), name) for name in names if (match := _NAME.fullmatch(name)))
    samples: list[Sample] = []
    passed_over = [name for name in names if not _NAME.fullmatch(name) and not name.startswith(".")]
    for _, class_id, name in numbered:
        content = _read(folder / SAMPLES_FOLDER / name)
        if content is None or class_id >= n_classes or len(samples) == MOST_SAMPLES:
            passed_over.append(name)
        else:
            samples.append(Sample(content, class_id))
    if passed_over:
        _log.warning(
            "%s: passed over %s. Samples are at most %d files NUMBER-CLASS.png of at most %d bytes.",
            folder / SAMPLES_FOLDER,
            ", ".join(sorted(passed_over)[:3]),
            MOST_SAMPLES,
            LARGEST_SAMPLE,
        )
    return tuple(samples)


def _read(path: Path) -> bytes | None:
    """Return the bytes of a PNG file; null if it is another file, too large or not readable."""
    try:
        with open_file(path) as file:
            content = file.read(LARGEST_SAMPLE + 1)
    except ArtefactError:
        return None
    return content if len(content) <= LARGEST_SAMPLE and content.startswith(_PNG) else None
