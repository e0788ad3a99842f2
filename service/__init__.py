"""The server: decodes images, classifies them and proves a radius around each answer. No torch in here."""

import os

# ONNX Runtime otherwise reports its use to its makers. It reads this when it is imported, so it stands here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
