"""Triton through its Python wheel (PyTriton): one instance for each CPU, Triton's dynamic batcher.

The PNG is the body, as a raw binary request of one BYTES element.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile

import inference
import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def instance():
    """One callable with a session of its own."""
    model = inference.session()

    @batch
    def infer(image):
        image_NCHW = np.stack([inference.decode(row[0]) for row in image])
        return {"logits": inference.logits(model, image_NCHW)}

    return infer, int(model.get_outputs()[0].shape[-1])


if __name__ == "__main__":
    # Triton's Python stub would load the system's libpython, which need not be that of this interpreter.
    os.environ["LD_LIBRARY_PATH"] = str(sysconfig.get_config_var("LIBDIR"))
    instances = [instance() for _ in range(inference.WORKERS)]
    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=inference.PORT,
        allow_grpc=False,
        allow_metrics=False,
        log_verbose=0,
    )
    # Sockets lie there, whose paths must be short; the default folder is never removed.
    with Triton(config=config, workspace=f"{tempfile.gettempdir()}/workspace") as triton:
        triton.bind(
            model_name="logits",
            infer_func=[infer for infer, _ in instances],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="logits", dtype=np.float64, shape=(instances[0][1],))],
            config=ModelConfig(
                max_batch_size=inference.MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=1000)
            ),
        )
        triton.serve()
