"""MLServer: one inference process for each CPU, adaptive batching, a runtime of its own that decodes and runs.

The protocol is the Open Inference Protocol; the image is a BYTES element in base64.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import inference
import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Logits(MLModel):
    async def load(self) -> bool:
        self.model = inference.session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        image_NCHW = np.stack([inference.decode_base64(image) for image in payload.inputs[0].data])
        logits_NK = inference.logits(self.model, image_NCHW)
        output = ResponseOutput(
            name="logits", shape=list(logits_NK.shape), datatype="FP64", data=logits_NK.ravel().tolist()
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    here = str(Path(__file__).resolve().parent)
    folder = Path(os.environ["BENCH_FOLDER"])
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "host": "127.0.0.1",
        "http_port": inference.PORT,
        "grpc_port": inference.free_port(),
        "metrics_port": inference.free_port(),
        "parallel_workers": inference.WORKERS,
        "debug": False,
        "use_structured_logging": False,
    }
    model = {
        "name": "logits",
        "implementation": "mlserver_server.Logits",
        "max_batch_size": inference.MAX_BATCH,
        "max_batch_time": 0.005,
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    os.environ["PYTHONPATH"] = here
    command = str(Path(sys.executable).parent / "mlserver")
    os.execv(command, [command, "start", str(folder)])
