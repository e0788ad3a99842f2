"""Answers of `/predict/batch`: npy where the service gives it, JSON otherwise."""

from __future__ import annotations

import io
import json

import numpy as np

NPY_MAGIC = b"\x93NUMPY"


def is_npy(answer: bytes) -> bool:
    """Whether the answer is an npy array."""
    return answer.startswith(NPY_MAGIC)


def logits_of_batch(answer: bytes) -> list[list[float]]:
    """Logits of each image.

    Raises:
        ValueError: an array without a field `logits`.
    """
    if not is_npy(answer):
        return [prediction["logits"] for prediction in json.loads(answer)["predictions"]]
    array = np.load(io.BytesIO(answer))
    if array.dtype.names is None or "logits" not in array.dtype.names:
        raise ValueError(f"the npy answer has no field `logits`: {array.dtype}")
    return array["logits"].tolist()
