"""Search for images that refute a radius of the running service.

`python -m benchmarks.soundness` runs everything and writes the sections of `benchmarks/SOUNDNESS.md`, see `__main__`.
No result here is a proof: every search gives upper bounds of the distance to the nearest other class, and a proved
radius must lie below all of them. Distances are compared as exact rationals: a rounded one finds false violations.

Axes: N images, C channels, H height, W width, K classes, D = C H W pixels, S candidates for one image.
"""

import sys
from pathlib import Path

# First, as in the server: it sets variables that numpy and ONNX Runtime read when they are imported.
import service as _service  # noqa: F401

# Tests and benchmarks share the builder of graphs.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
