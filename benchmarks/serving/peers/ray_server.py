"""Ray Serve: one replica for each CPU, `serve.batch`, and the variable that its guide names for throughput."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Its workers otherwise run at a lower priority than the load generator on the same machine.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_TMPDIR", tempfile.gettempdir())

import inference
import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


@serve.deployment(
    num_replicas=inference.WORKERS,
    max_ongoing_requests=256,
    ray_actor_options={"num_cpus": 1},
    graceful_shutdown_timeout_s=1,
)
class Logits:
    def __init__(self) -> None:
        self.model = inference.session()

    @serve.batch(max_batch_size=inference.MAX_BATCH, batch_wait_timeout_s=0.005)
    async def logits(self, bodies: list[bytes]) -> list[list[float]]:
        image_NCHW = np.stack([inference.decode(body) for body in bodies])
        return inference.logits(self.model, image_NCHW).tolist()

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return Response("ready")
        return JSONResponse({"logits": await self.logits(await request.body())})


if __name__ == "__main__":
    ray.init(num_cpus=inference.WORKERS, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": inference.PORT}, logging_config={"enable_access_log": False})
    serve.run(Logits.bind(), blocking=True)
