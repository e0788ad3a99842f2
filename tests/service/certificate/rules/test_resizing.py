"""Resize: bounds and errors against exact rational resampling in both of its modes, ties, and refusals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from random_graphs import GraphBuilder
from thorough import often

from service.certificate import Certificate, UnsupportedModelError, certify
from service.certificate.rules import resizing as resizing_module

MODES = ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Resampling:
    """A Resize of a `C x *S` image, by scales or to sizes."""

    shape: tuple[int, ...]
    mode: str
    how: str
    rounding: str = "floor"
    scales: tuple[float, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def ratios(self) -> list[Fraction]:
        if self.scales is not None:
            return [Fraction(float(np.float32(scale))) for scale in self.scales]
        assert self.sizes is not None
        return [Fraction(to, of) for to, of in zip(self.sizes, self.shape[1:], strict=True)]

    def to(self) -> list[int]:
        return [math.floor(n * s) for n, s in zip(self.shape[1:], self.ratios(), strict=True)]

    def model(self, dtype: type = np.float32) -> bytes:
        b = GraphBuilder(np.random.default_rng(0), dtype)
        operands = ["image", ""]
        if self.scales is not None:
            # Scales are float32 in graphs of every format.
            b.constants.append(onnx.numpy_helper.from_array(np.array([1, 1, *self.scales], dtype=np.float32), "scales"))
            operands.append("scales")
        else:
            assert self.sizes is not None
            operands += ["", b.constant(np.array([1, self.shape[0], *self.sizes]))]
        options = {"coordinate_transformation_mode": self.how, "nearest_mode": self.rounding}
        # Relu changes nothing: weights and pixels are not negative. It spares the bounds of all pairs of outputs.
        y = b.one("Flatten", b.one("Relu", b.one("Resize", *operands, mode=self.mode, **options)), axis=1)
        return b.model(self.shape, y, self.shape[0] * math.prod(self.to()), batch=1)

    def coordinates(self, axis: int) -> list[Fraction]:
        """As the ONNX specification defines them."""
        n, s, m = self.shape[axis + 1], self.ratios()[axis], self.to()[axis]
        if self.how == "align_corners":
            return [Fraction(j * (n - 1), m - 1) if m > 1 else Fraction(0) for j in range(m)]
        if self.how == "asymmetric":
            return [j / s for j in range(m)]
        return [(j + HALF) / s - HALF if m > 1 or self.how == "half_pixel" else Fraction(0) for j in range(m)]

    def matrix(self, axis: int) -> np.ndarray:
        """Exact weights, outputs x inputs."""
        n = self.shape[axis + 1]
        rows = []
        for x in self.coordinates(axis):
            row = [Fraction(0)] * n
            x = min(max(x, Fraction(0)), Fraction(n - 1))
            if self.mode == "linear":
                row = [max(Fraction(0), 1 - abs(x - k)) for k in range(n)]
            else:
                down, up = math.ceil(x - HALF), math.floor(x + HALF)
                picks = {"round_prefer_floor": down, "round_prefer_ceil": up}
                row[picks.get(self.rounding, math.floor(x) if self.rounding == "floor" else math.ceil(x))] = Fraction(1)
            rows.append(row)
        return np.array(rows, dtype=object)

    def exact(self, image: np.ndarray) -> np.ndarray:
        for axis in range(len(self.shape) - 1):
            image = np.moveaxis(np.tensordot(self.matrix(axis), image, axes=(1, axis + 1)), 0, axis + 1)
        return image.ravel()

    def norm(self) -> float:
        """True L2 norm, a product over the axes."""
        norms = [np.linalg.norm(self.matrix(a).astype(float), 2) for a in range(len(self.shape) - 1)]
        return float(np.prod(norms))

    def near_a_pixel(self) -> bool:
        """Whether some coordinate is a whole number that float64 may miss."""
        return any(
            x.denominator == 1 and Fraction(float(self.ratios()[axis])) != self.ratios()[axis]
            for axis in range(len(self.shape) - 1)
            for x in self.coordinates(axis)
        )


def run(model_bytes: bytes, pixels: np.ndarray, dtype: type) -> np.ndarray:
    image = (pixels / 255).astype(dtype)[None]
    if dtype is np.float64:
        # ONNX Runtime has no float64 kernel on the CPU.
        return ReferenceEvaluator(onnx.load_model_from_string(model_bytes)).run(None, {"image": image})[0][0]
    session = onnxruntime.InferenceSession(model_bytes, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0][0]


def worst_error(resampling: Resampling, pixels: np.ndarray, dtype: type) -> Fraction:
    exact = resampling.exact(np.vectorize(lambda v: Fraction(int(v), 255), otypes=[object])(pixels))
    computed = run(resampling.model(dtype), pixels, dtype)
    return max(abs(Fraction(float(c)) - e) for c, e in zip(computed, exact, strict=True))


def random_resampling(mode: str, how: str, rounding: str, seed: int) -> Resampling:
    rng = np.random.default_rng(seed)
    axes = int(rng.integers(1, 4))
    shape = (int(rng.integers(1, 3)), *(int(n) for n in rng.integers(1, 9 if axes < 3 else 4, axes)))
    if rng.integers(2):
        sizes = tuple(int(n) for n in rng.integers(1, 13 if axes < 3 else 6, axes))
        return Resampling(shape, mode, how, rounding, sizes=sizes)
    factors = [2, 3, 4, 0.5, 1.5, 0.75, 0.6, 2.5, 1 / 3, 1.25, 1]
    scales = tuple(float(s) if n * s >= 1 else 2.0 for n, s in zip(shape[1:], rng.choice(factors, axes), strict=True))
    return Resampling(shape, mode, how, rounding, scales=scales)


def outcome(model_bytes: bytes) -> tuple[Certificate | None, str]:
    """The certificate, or why there is none."""
    try:
        return certify(model_bytes), ""
    except UnsupportedModelError as refused:
        return None, str(refused)


def checked(resampling: Resampling, seed: int) -> bool:
    """Whether it is certified; then all claims of the certificate are tested."""
    rng = np.random.default_rng(seed)
    certified = False
    for dtype in (np.float32, np.float64):
        certificate, reason = outcome(resampling.model(dtype))
        if certificate is None:
            assert any(why in reason for why in ("near to a tie", "give sizes", "runtimes resample"))
            continue
        certified = True
        true = resampling.norm()
        assert true * (1 - 1e-12) <= certificate.lipschitz_bound <= true * 1.0001
        pixels = rng.integers(0, 256, resampling.shape)
        # At whole coordinates that float64 misses by a rounding, onnx's reference evaluator takes a neighbour's weight.
        if dtype is np.float32 or not resampling.near_a_pixel():
            assert worst_error(resampling, pixels, dtype) <= Fraction(certificate.logit_error)
    return certified


@pytest.mark.parametrize(
    ("mode", "how", "rounding"),
    [*product(["nearest"], MODES, ROUNDINGS), *product(["linear"], MODES, ["floor"])],
)
def test_no_resampling_violates_its_bounds(mode: str, how: str, rounding: str) -> None:
    n_seeds = often(6, 20) if mode == "nearest" else often(10, 40)
    certified = sum(checked(random_resampling(mode, how, rounding, seed), seed) for seed in range(n_seeds))
    assert certified >= n_seeds // 3


def certificate_of(*arguments: object, **options: object) -> Certificate:
    return certify(Resampling(*arguments, **options).model())


@pytest.mark.parametrize("how", MODES[:3])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_doubling_by_nearest_repeats_each_pixel_and_adds_no_error(how: str, rounding: str) -> None:
    resampling = Resampling((1, 3, 4), "nearest", how, rounding, scales=(2.0, 2.0))
    certificate = certify(resampling.model())
    assert certificate.logit_error <= 2.0**-24 * (1 + 1e-6)
    assert certificate.lipschitz_bound >= resampling.norm() * (1 - 1e-12)


def test_exact_weights_cost_less_than_weights_that_float32_rounds() -> None:
    exact = certificate_of((1, 8, 8), "linear", "half_pixel", scales=(2.0, 2.0))
    rounded = certificate_of((1, 8, 8), "linear", "half_pixel", sizes=(17, 17))
    assert exact.logit_error < 1e-5 < rounded.logit_error < 1e-4


def test_a_selection_that_float32_gets_wrong_is_refused() -> None:
    # Where j / (m / n) is a whole number, m / n rounded upwards to float32 gives the pixel before it.
    found = 0
    for n, m in product(range(2, 40), range(2, 60)):
        resampling = Resampling((1, n), "nearest", "asymmetric", "floor", sizes=(m,))
        ratio = np.float32(m) / np.float32(n)
        float32 = np.floor(np.arange(m, dtype=np.float32) / ratio).astype(int)
        exact = [math.floor(x) for x in resampling.coordinates(0)]
        if (np.minimum(float32, n - 1) != exact).any():
            found += 1
            with pytest.raises(UnsupportedModelError, match="near to a tie"):
                certify(resampling.model())
    assert found > 5


def test_forgetting_the_error_of_coordinates_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    resampling = Resampling((1, 200), "linear", "asymmetric", sizes=(231,))
    pixels = np.array([[0, 255] * 100])
    worst = worst_error(resampling, pixels, np.float32)
    assert worst <= Fraction(certify(resampling.model()).logit_error)
    matrix = resizing_module._interpolation
    monkeypatch.setattr(resizing_module, "_interpolation", lambda axis: (matrix(axis)[0], 0))
    assert worst > Fraction(certify(resampling.model()).logit_error)


# --- as exporters write it --------------------------------------------------------------------------------------------


def resized(build: Callable[[GraphBuilder, str], str], m: int, batch: object = "N") -> Certificate:
    b = GraphBuilder(np.random.default_rng(0), np.float32)
    return certify(b.model((1, 4, 4), b.one("Flatten", build(b, "image"), axis=1), m, batch=batch))


def sizes_of_shape(b: GraphBuilder, x: str, entries: Sequence[int]) -> str:
    """Batch and channels from Shape, then `entries`."""
    first = b.one("Slice", b.one("Shape", x), *(b.constant(np.array([k])) for k in (0, 2)))
    return b.one("Concat", first, b.constant(np.array(entries)), axis=0)


def test_sizes_may_be_put_together_from_the_shape() -> None:
    empty = np.array([], dtype=np.float32)

    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Resize", x, b.constant(empty), b.constant(empty), sizes_of_shape(b, x, [8, 8]), mode="nearest")

    assert 2.0 <= resized(build, 64).lipschitz_bound < 2.0 + 1e-12


def test_axes_name_what_is_resized() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        return b.one("Resize", x, "", "", b.constant(np.array([8, 12])), axes=[-2, 3], mode="nearest")

    assert resized(build, 96).lipschitz_bound ** 2 == pytest.approx(6.0)


def test_the_batch_size_never_becomes_a_height() -> None:
    def build(b: GraphBuilder, x: str) -> str:
        batch = b.one("Gather", b.one("Shape", x), b.constant(np.array([0])), axis=0)
        sizes = b.one("Concat", batch, b.constant(np.array([1])), batch, b.constant(np.array([8])), axis=0)
        return b.one("Resize", x, "", "", sizes, mode="nearest")

    with pytest.raises(UnsupportedModelError, match="batch size"):
        resized(build, 64)


def by_scales(*scales: float, **options: object) -> Callable[[GraphBuilder, str], str]:
    return lambda b, x: b.one("Resize", x, "", b.constant(np.array(scales, dtype=np.float64)), **options)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (by_scales(1, 1, 2, 2, mode="cubic"), "cubic"),
        (by_scales(1, 1, 2, 2, mode="linear", antialias=1), "antialias"),
        (by_scales(1, 1, 2, 2, mode="linear", exclude_outside=1), "exclude_outside"),
        (by_scales(1, 1, 2, 2, coordinate_transformation_mode="tf_crop_and_resize"), "tf_crop_and_resize"),
        (by_scales(1, 1, 2, 2, coordinate_transformation_mode="half_pixel_symmetric"), "half_pixel_symmetric"),
        (by_scales(1, 1, 2, 2, nearest_mode="up"), "nearest_mode"),
        (by_scales(2, 1, 2, 2), "batch axis"),
        (by_scales(1, 3, 2, 2), "channel axis"),
        (by_scales(1, 1, 1.1, 2), "runtimes resample"),
        (by_scales(1, 1, -1.0, 2), "a scale of"),
        (by_scales(1, 1, 1.3, 1.3, mode="linear", coordinate_transformation_mode="align_corners"), "whole number"),
        (by_scales(1, 1, 0.3, 2, coordinate_transformation_mode="pytorch_half_pixel"), "one pixel and a part"),
        (by_scales(1, 1, 2), "one float32 for each axis"),
        (lambda b, x: b.one("Resize", x), "either scales or sizes"),
        (lambda b, x: b.one("Resize", x, "", "", b.constant(np.array([1, 1, 8, 8]))), "batch axis a length"),
        (lambda b, x: b.one("Resize", x, "", "", b.constant(np.array([8, 8])), axes=[2, 2]), "twice"),
        (
            lambda b, x: b.one(
                "Resize", x, "", "", b.constant(np.array([8, 9])), axes=[2, 3], keep_aspect_ratio_policy="not_larger"
            ),
            "keep_aspect_ratio_policy",
        ),
    ],
)
def test_what_has_no_proof_is_refused(build: Callable[[GraphBuilder, str], str], expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        resized(build, 64)
