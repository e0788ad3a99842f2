"""What all peers share: the settings they are started with, the decoder, and the session with one thread."""

from __future__ import annotations

import base64
import io
import os
import socket

import numpy as np
import onnxruntime
from PIL import Image

MODEL = os.environ.get("BENCH_MODEL", "")
PORT = int(os.environ.get("BENCH_PORT", "8000"))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
MAX_BATCH = int(os.environ.get("BENCH_MAX_BATCH", "32"))


def session() -> onnxruntime.InferenceSession:
    """The graph, for one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])


def decode(png: bytes) -> np.ndarray:
    """Pixels of a grey image in [0, 1], 1 x H x W."""
    return np.asarray(Image.open(io.BytesIO(png)), np.float64)[None] / 255.0


def logits(model: onnxruntime.InferenceSession, image_NCHW: np.ndarray) -> np.ndarray:
    """N x K."""
    return model.run(["logits"], {"image": image_NCHW})[0]


def decode_base64(text: str) -> np.ndarray:
    """The same of a file in base64."""
    return decode(base64.b64decode(text))


def free_port() -> int:
    """For the further ports that some servers insist on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
