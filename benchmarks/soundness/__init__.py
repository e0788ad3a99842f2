"""Whether the service that runs keeps its promise: the search for images that refute a radius, and what surrounds it.

`python -m benchmarks.soundness` runs everything and writes the sections of `benchmarks/SOUNDNESS.md`, see `__main__`.
Nothing here proves anything: every search gives upper bounds of the distance to the nearest other class, and a proved
radius must lie below all of them. Distances are compared as exact rationals, for a rounded one finds violations that
are none.

Axes: N images, C channels, H height, W width, K classes, D = C H W pixels, S candidates for one image.
"""

# First of all: it sets what numpy and ONNX Runtime read when they are imported, as in the server.
import service as _service  # noqa: F401
