"""BentoML: one worker process for each CPU, each with its adaptive batcher.

A batchable method takes a list; a request is a list of one file as base64.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import bentoml
import inference
import numpy as np


@bentoml.service(workers=inference.WORKERS, traffic={"timeout": 60}, metrics={"enabled": False})
class Logits:
    def __init__(self) -> None:
        self.model = inference.session()

    @bentoml.api(batchable=True, max_batch_size=inference.MAX_BATCH, max_latency_ms=10_000)
    def predict(self, images: list[str]) -> list[list[float]]:
        image_NCHW = np.stack([inference.decode_base64(image) for image in images])
        return inference.logits(self.model, image_NCHW).tolist()


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    options = ["--working-dir", str(folder), "--host", "127.0.0.1", "--port", str(inference.PORT)]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Logits", *options])
