"""Answers of the Open Inference Protocol, read as its clients read them, and compared with those of `/predict`."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

DTYPES = {"UINT8": "u1", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BOOL": "?"}


def in_type(datatype: str, levels: np.ndarray) -> np.ndarray:
    return levels if datatype == "UINT8" else (levels / 255.0).astype(DTYPES[datatype])


def texts(data: bytes) -> list[str]:
    found = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    return found


def assert_are_those_of_predict(found: Mapping[str, np.ndarray], predictions: list[Any]) -> None:
    certificates = [one["certificate"] for one in predictions]
    expected = {
        "class_id": [one["class_id"] for one in predictions],
        "logits": [one["logits"] for one in predictions],
        "radius": [one["radius"] for one in certificates],
        "certified": [one["certified"] for one in certificates],
        "proof": [one["proof"] for one in certificates],
        "image_digest": [one["image"]["digest"] for one in predictions],
    }
    assert {"class_id", "radius", "logits"} <= set(found)
    for name in expected.keys() & found.keys():
        assert found[name].tolist() == expected[name], name
