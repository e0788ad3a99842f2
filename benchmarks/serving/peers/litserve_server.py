"""LitServe: one worker process for each CPU, batches of up to 32.

Its JSON requests take the image as base64, as in its own guide.
"""

from __future__ import annotations

import inference
import litserve
import numpy as np


class Logits(litserve.LitAPI):
    def setup(self, device):
        del device
        self.model = inference.session()

    def decode_request(self, request):
        return inference.decode_base64(request["image"])

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return inference.logits(self.model, x)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"logits": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Logits(max_batch_size=inference.MAX_BATCH, batch_timeout=0.005),
        accelerator="cpu",
        workers_per_device=inference.WORKERS,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=inference.PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
