"""The server: decodes images, classifies them and proves a radius around each answer. No torch in here."""

import os

# ONNX Runtime otherwise reports its use to its makers. It reads this when it is imported, so it stands here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The same for numpy. Threads of two libraries that wait for each other by spinning made a proof 50 times slower on a
# busy machine, and the matrices of a proof are small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"
