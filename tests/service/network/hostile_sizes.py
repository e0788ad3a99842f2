"""Small files that ask for large work: tensors, windows, kernels and chains of nodes, none of them refused for another
reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from onnx import numpy_helper
from random_graphs import GraphBuilder

Build = Callable[[GraphBuilder], str]


def model_of(build: Build, shape: tuple[int, ...] = (4,), opset: int = 18, batch: object = "N") -> bytes:
    """Return the file of a graph with four logits."""
    builder = GraphBuilder(np.random.default_rng(0), dtype=np.float64, opset=opset)
    return builder.model(shape, build(builder), 4, batch)


def run_on_files(folder: Path, models: Iterable[bytes], script: str) -> subprocess.CompletedProcess[str]:
    """Return the end of a process that runs a script, whose arguments are files with these models."""
    paths: list[str] = []
    for number, model in enumerate(models):
        path = folder / f"{number}.onnx"
        path.write_bytes(model)
        paths.append(str(path))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *paths]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)


def constant(b: GraphBuilder, numbers: object) -> str:
    """Return a constant that the file holds."""
    return b.constant(np.array(numbers))


def filled(b: GraphBuilder, value: object, *shape: int) -> str:
    """Return a constant that the file computes: one number, many times."""
    return b.one("ConstantOfShape", constant(b, shape), value=numpy_helper.from_array(np.array([value])))


def _wide(b: GraphBuilder, *shape: int) -> str:
    """Return an image of one pixel and `shape`, repeated."""
    pixel = b.one("Gather", "image", constant(b, [0]), axis=1)
    return b.one("Expand", b.one("Reshape", pixel, constant(b, [0, *[1] * len(shape)])), constant(b, [1, *shape]))


def _chain(operator: str, times: int, *shape: int, **attributes: object) -> Build:
    def build(b: GraphBuilder) -> str:
        x = _wide(b, *shape)
        for _ in range(times):
            x = b.one(operator, x, **attributes)
        return _few(b, x)

    return build


def _few(b: GraphBuilder, x: str) -> str:
    """Return four logits of a tensor with more."""
    return b.one("ReduceMax", b.one("Flatten", x, axis=1), constant(b, [1]), keepdims=1)


def _doubled(operator: str, times: int, **attributes: object) -> Build:
    def build(b: GraphBuilder) -> str:
        x = "image"
        for _ in range(times):
            x = b.one(operator, x, x, **attributes)
        return _few(b, x)

    return build


def _sums(times: int, size: int) -> Build:
    """Return sums of a tensor with itself: each is multiplied out as a matrix."""

    def build(b: GraphBuilder) -> str:
        x = b.one("Abs", b.one("Flatten", _wide(b, 4, size // 4), axis=1))
        for _ in range(times):
            x = b.one("Add", x, x)
        return _few(b, x)

    return build


def _products(times: int, size: int) -> Build:
    """Return products with one matrix, which the file computes."""

    def build(b: GraphBuilder) -> str:
        x, weight = b.one("Flatten", _wide(b, 4, size // 4), axis=1), filled(b, 1e-4, size, size)
        for _ in range(times):
            x = b.one("Relu", b.one("Gemm", x, weight))
        return _few(b, x)

    return build


def _weights(times: int, size: int) -> Build:
    """Return products with matrices that the file computes, each by a node."""

    def build(b: GraphBuilder) -> str:
        x = b.one("Flatten", _wide(b, 4, size // 4), axis=1)
        for _ in range(times):
            x = b.one("MatMul", x, filled(b, 1e-4, size, size))
        return _few(b, x)

    return build


def _convolved(kernel: tuple[int, ...], image: tuple[int, ...], times: int = 1, **attributes: object) -> Build:
    def build(b: GraphBuilder) -> str:
        x, weight = _wide(b, *image), filled(b, 1e-3, *kernel)
        for _ in range(times):
            x = b.one("Conv", x, weight, **attributes)
        return _few(b, x)

    return build


def _residuals(channels: int, taps: int, times: int) -> Build:
    """Return `x + conv(relu(conv(x)))`, whose kernels are multiplied out."""

    def build(b: GraphBuilder) -> str:
        weight, pads = filled(b, 1e-3, channels, channels, taps, taps), [taps // 2] * 4
        x = b.one("Abs", _wide(b, channels, 4, 4))
        for _ in range(times):
            y = b.one("Conv", b.one("Conv", x, weight, pads=pads), filled(b, 1e-3, channels, channels, 1, 1))
            x = b.one("Add", x, y)
        return _few(b, x)

    return build


def _pooled(operator: str, kernel: int, image: tuple[int, ...], times: int = 1, **attributes: object) -> Build:
    def build(b: GraphBuilder) -> str:
        x, axes = _wide(b, *image), len(image) - 1
        for _ in range(times):
            x = b.one(operator, x, kernel_shape=[kernel] * axes, pads=[kernel // 2] * (2 * axes), **attributes)
        return _few(b, x)

    return build


def _squares(kernel: int, times: int, size: int) -> Build:
    """Return the root of squares that are averaged again and again."""

    def build(b: GraphBuilder) -> str:
        x = _wide(b, 4, size, size)
        x = b.one("Mul", x, x)
        for _ in range(times):
            x = b.one("AveragePool", x, kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4)
        return _few(b, b.one("Sqrt", b.one("Add", x, constant(b, 1.0))))

    return build


def _resized(mode: str, size: int, times: int = 1) -> Build:
    def build(b: GraphBuilder) -> str:
        x = b.one("Reshape", "image", constant(b, [0, 1, 1, 4]))
        for number in range(times):
            sizes = b.one("Concat", b.one("Shape", x, end=2), constant(b, [1, size + number % 2]), axis=0)
            x = b.one("Resize", x, "", "", sizes, mode=mode, coordinate_transformation_mode="asymmetric")
        return _few(b, x)

    return build


def _gated(times: int) -> Build:
    """Return products of a tensor with functions of it, whose slopes are bounded piece by piece."""

    def build(b: GraphBuilder) -> str:
        x = "image"
        for _ in range(times):
            x = b.one("Mul", x, b.one("Sigmoid", x))
        return x

    return build


def _parts(times: int, parts: int) -> Build:
    """Return parts put together in another order, again and again."""

    def build(b: GraphBuilder) -> str:
        x = b.one("Flatten", _wide(b, 4, 1 << 14), axis=1)
        for _ in range(times):
            x = b.one("Concat", *reversed(b.add("Split", x, outputs=parts, axis=1, num_outputs=parts)), axis=1)
        return _few(b, x)

    return build


def _logits(size: int, width: int) -> Build:
    """Return many logits of a wide layer."""

    def build(b: GraphBuilder) -> str:
        x = b.one("Relu", b.one("Flatten", _wide(b, 4, width // 4), axis=1))
        return b.one("MatMul", x, filled(b, 1e-4, width, size))

    return build


LARGE = 1 << 22
SMALL_FILES: dict[str, Build] = {
    "40 Relus of 2^24": _chain("Relu", 40, 4, LARGE),
    "7 Relus of 2^24": _chain("Relu", 7, 4, LARGE),
    "1 Relu of 2^23": _chain("Relu", 1, 4, LARGE // 2),
    "1 Relu of 2^22": _chain("Relu", 1, 4, LARGE // 4),
    "2000 Relus of 2^14": _chain("Relu", 2000, 4, 1 << 12),
    "4000 Relus of 16": _chain("Relu", 4000, 4, 4),
    "sigmoids of 2^20": _chain("Sigmoid", 7, 4, LARGE // 16),
    "transposed 2^20": _chain("Transpose", 20, 4, 1 << 18, perm=[0, 2, 1]),
    "doubled by Concat": _doubled("Concat", 22, axis=1),
    "doubled by Concat 40 times": _doubled("Concat", 40, axis=1),
    "doubled by Add": _doubled("Add", 400),
    "sums of 2048": _sums(8, 2048),
    "sums of 512": _sums(200, 512),
    "products of 2048": _products(8, 2048),
    "products of 512": _products(100, 512),
    "weights of 2048": _weights(5, 2048),
    "a kernel of 2^21 taps": _convolved((1, 4, 1, 1 << 19), (4, 1, 4), pads=[0, 1 << 19, 0, 1 << 19]),
    "a kernel of 1024 taps square": _convolved((1, 4, 512, 512), (4, 4, 4), pads=[511] * 4),
    "a kernel of 2048 channels": _convolved((1024, 1024, 2, 2), (1024, 2, 2), 3, pads=[0, 0, 1, 1]),
    "a dilated kernel": _convolved((1, 4, 2, 2), (4, 4, 4), dilations=[4000, 4000], pads=[4000] * 4),
    "many strides": _convolved((4, 4, 1, 1), (4, 4, 4), strides=[4000, 4000]),
    "a long image": _convolved((4, 4, 1), (4, 1 << 17)),
    "a long image that is no period": _convolved((4, 4, 3), (4, 1 << 18)),
    "images of 1024 square": _convolved((4, 4, 3, 3), (4, 512, 512), 2, pads=[1] * 4),
    "64 channels, 128 square": _convolved((64, 64, 3, 3), (64, 128, 128), pads=[1] * 4),
    "residuals of 256 channels": _residuals(256, 3, 3),
    "residuals of 16 channels": _residuals(16, 9, 20),
    "maxima of 64 x 64 windows": _pooled("MaxPool", 65, (4, 128, 128)),
    "means of 64 x 64 windows": _pooled("AveragePool", 65, (4, 64, 64)),
    "means of 32 x 32 windows": _pooled("AveragePool", 33, (4, 32, 32), 4),
    "norms of windows": _pooled("LpPool", 33, (4, 64, 64)),
    "squares of 3 x 3 windows": _squares(3, 8, 64),
    "squares of 9 x 9 windows": _squares(9, 3, 32),
    "nearest pixels": _resized("nearest", 60_000, 20),
    "interpolated pixels": _resized("linear", 4000, 4),
    "interpolated pixels by the ten thousand": _resized("linear", 60_000, 2),
    "gates": _gated(300),
    "parts": _parts(60, 64),
    "8000 logits": _logits(8000, 64),
    "2000 logits of 2048": _logits(2000, 2048),
}
"""Files of less than 300 bytes, and longer chains of the same."""
