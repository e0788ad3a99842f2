"""Contradictions between a certificate and its graph.

A search in float64 proposes images; exact arithmetic alone decides. So every finding is a fact, and no tolerance is
anywhere: a secant `||f(x) - f(x')|| / ||x - x'||` of two images of the box is never above the Lipschitz constant, for
piecewise linear and for smooth graphs alike.

Axes: N images, D pixels, K elements of a tensor.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from exact_graphs import FLOATS, Program
from flint import arb, fmpq
from onnx import helper, numpy_helper
from random_graphs import Graph

from service.certificate import Certificate, UnsupportedModelError, certify, matrices
from service.runtime.engine import Engine
from service.runtime.fixed_batches import GraphError

STEP = 2.0**-20
"""Of difference quotients; a power of two, so that `x + STEP` rounds little."""
TIGHT = 1.0 - 1e-7
"""A secant, in float64 and relative to its bound, from which on exact arithmetic looks at it."""

_CONVOLUTIONS = frozenset(["Conv", "ConvTranspose", "AveragePool"])


@contextmanager
def kernels_only() -> Iterator[None]:
    """The certifier as for tensors too large for matrices: joint maps are convolution kernels alone."""
    before = matrices._LARGEST_MATRIX
    matrices._LARGEST_MATRIX = 0
    try:
        yield
    finally:
        matrices._LARGEST_MATRIX = before


@dataclass(frozen=True)
class Bounds:
    """The smallest of several certificates of one graph: each has to hold."""

    certificates: tuple[Certificate, ...]

    @classmethod
    def of(cls, model_bytes: bytes) -> "Bounds | None":
        """Null where the graph is refused."""
        try:
            certificates = [certify(model_bytes)]
            if _CONVOLUTIONS & Program.parse(model_bytes).operators:
                with kernels_only():
                    certificates.append(certify(model_bytes))
        except UnsupportedModelError:
            return None
        return cls(tuple(certificates))

    @cached_property
    def margins_KK(self) -> np.ndarray:
        return np.min([certificate.margin_bounds_KK for certificate in self.certificates], axis=0)

    @cached_property
    def logit_error(self) -> float:
        return min(certificate.logit_error for certificate in self.certificates)

    def lipschitz(self, program: Program) -> dict[str, float]:
        """Of every tensor that the certificates report on, by its name."""
        return self._reported(program, "lipschitz_bound")

    def errors(self, program: Program) -> dict[str, float]:
        return self._reported(program, "error")

    def _reported(self, program: Program, fact: str) -> dict[str, float]:
        names = {f"{operator} {outputs[0]!r}": outputs[0] for operator, _, outputs, _ in program.nodes}
        found: dict[str, float] = {}
        for certificate in self.certificates:
            # Of several operators for one node, the last gives its output.
            last = {names[node.node]: getattr(node, fact) for node in certificate.nodes}
            for name, bound in last.items():
                found[name] = min(found.get(name, np.inf), bound)
        return found


# --- Lipschitz bounds -------------------------------------------------------------------------------------------------


def lipschitz_findings(graph: Graph, bounds: Bounds, seed: int = 0) -> list[str]:
    """Secants above a Lipschitz bound: of the logits, of a tensor inside, or of the difference of two logits."""
    return Search(graph, bounds, seed).findings


def _first_images(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(
        [
            np.full(shape, 0.5),
            rng.integers(0, 2, shape).astype(np.float64),
            rng.uniform(0.0, 1.0, shape),
            rng.integers(0, 3, shape) / 2.0,
            np.full(shape, float(rng.uniform())),
            rng.integers(0, 256, shape) / 255.0,
        ]
    )


@dataclass
class _Candidate:
    ratio: float
    start: np.ndarray
    end: np.ndarray


class Search:
    """For secants above a Lipschitz bound; where there are none, `findings` is empty."""

    findings: list[str]
    tensors: int
    """How many had their bound compared."""
    tightness: float
    """The largest slope of the logits that was seen, relative to its bound."""

    def __init__(self, graph: Graph, bounds: Bounds, seed: int) -> None:
        self.program = Program.parse(graph.model)
        self.bounds = bounds
        self.lipschitz = bounds.lipschitz(self.program)
        self.lipschitz["logits"] = min(c.lipschitz_bound for c in bounds.certificates)
        self.shape = graph.shape
        self.rng = np.random.default_rng(seed)
        self.candidates: dict[str, _Candidate] = {}
        self._seen: list[np.ndarray] = []
        self._best: tuple[float, np.ndarray, np.ndarray] | None = None
        self.tensors = len(self.lipschitz)
        best = self._look_at(_first_images(self.rng, graph.shape))
        widths = np.array([0.5, 0.1, 0.02]).reshape(-1, *[1] * len(graph.shape))
        for _ in range(2):
            # Uphill: along the direction of the largest slope, and to random neighbours.
            image, direction = best
            moves = [step * direction for step in (0.3, -0.3, 0.01)]
            noise = self.rng.standard_normal((3, *graph.shape)) * widths
            best = self._look_at(np.clip(image + np.concatenate([np.stack(moves), noise]), 0.0, 1.0))
        self._far_pairs()
        self.tightness = self._best[0] / max(self.lipschitz["logits"], 1e-300) if self._best else 0.0
        self.findings = self._decided()

    def _look_at(self, images_NX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Jacobians at some images, by central differences; returns the steepest image so far, and where to."""
        self._seen += list(images_NX)
        n, size = len(images_NX), int(np.prod(self.shape))
        centres = np.clip(images_NX.reshape(n, 1, size), STEP, 1.0 - STEP)
        moved = np.concatenate([centres + STEP * np.eye(size), centres - STEP * np.eye(size)], axis=1)
        values = self.program.evaluate(moved.reshape(-1, *self.shape), FLOATS)
        for name, bound in self.lipschitz.items():
            value = values[name].reshape(n, 2, size, -1)
            jacobians_NDK = (value[:, 0] - value[:, 1]) / (2.0 * STEP)
            # The Frobenius norm is larger: most tensors need no decomposition.
            frobenius_N = np.sqrt(np.square(jacobians_NDK).sum(axis=(1, 2)))
            near_N = np.flatnonzero(np.isfinite(frobenius_N) & (frobenius_N >= TIGHT * bound))
            if name == "logits" and not len(near_N):
                near_N = np.array([int(np.argmax(np.nan_to_num(frobenius_N)))])
            for k in near_N:
                left, values_of, _ = np.linalg.svd(jacobians_NDK[k], full_matrices=False)
                direction = left[:, 0]
                self._propose(name, values_of[0] / max(bound, 1e-300), centres[k, 0], direction)
                if name == "logits" and (self._best is None or values_of[0] > self._best[0]):
                    self._best = (values_of[0], images_NX[k], direction.reshape(self.shape))
            if name == "logits":
                self._margins(jacobians_NDK, centres[:, 0])
        if self._best is None:
            self._best = (0.0, images_NX[0], np.zeros(self.shape))
        return self._best[1:]

    def _margins(self, jacobians_NDK: np.ndarray, centres_ND: np.ndarray) -> None:
        bounds_KK = self.bounds.margins_KK
        if jacobians_NDK.shape[2] == 1:
            jacobians_NDK = np.concatenate([jacobians_NDK, -jacobians_NDK], axis=2)
        differences = jacobians_NDK[:, :, :, None] - jacobians_NDK[:, :, None, :]
        ratios = np.sqrt(np.square(differences).sum(axis=1)) / np.maximum(bounds_KK, 1e-300)
        ratios = np.where(np.eye(len(bounds_KK), dtype=bool) | ~np.isfinite(ratios), 0.0, ratios)
        k, i, j = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
        gradient = differences[k, :, i, j]
        if ratios[k, i, j] > 0.0:
            self._propose(f"margin {i} {j}", ratios[k, i, j], centres_ND[k], gradient / np.linalg.norm(gradient))

    def _propose(self, name: str, ratio: float, centre_D: np.ndarray, direction_D: np.ndarray) -> None:
        if ratio < TIGHT or (name in self.candidates and self.candidates[name].ratio >= ratio):
            return
        ends = (centre_D + sign * STEP * direction_D for sign in (1.0, -1.0))
        start, end = (np.clip(at, 0.0, 1.0).reshape(self.shape) for at in ends)
        self.candidates[name] = _Candidate(ratio, start, end)

    def _far_pairs(self) -> None:
        """Secants between all images that were looked at."""
        images = np.stack(self._seen)
        values = self.program.evaluate(images, FLOATS)
        flat = images.reshape(len(images), -1)
        first, second = np.triu_indices(len(images), 1)
        distances = np.linalg.norm(flat[first] - flat[second], axis=1)
        apart = distances > 0.0
        first, second, distances = first[apart], second[apart], distances[apart]
        for name, bound in self.lipschitz.items():
            value = values[name].reshape(len(images), -1)
            ratios = np.linalg.norm(value[first] - value[second], axis=1) / distances / max(bound, 1e-300)
            if not len(ratios):
                continue
            worst = int(np.argmax(np.nan_to_num(ratios)))
            known = self.candidates.get(name)
            if ratios[worst] > 1.0 + 1e-9 and (known is None or ratios[worst] > known.ratio):
                self.candidates[name] = _Candidate(ratios[worst], images[first[worst]], images[second[worst]])

    def _decided(self) -> list[str]:
        """Violations by exact arithmetic, among all candidates above their bounds and the tightest others."""
        ranked = sorted(self.candidates.items(), key=lambda item: -item[1].ratio)
        noisy: str | None = None
        for position, (name, candidate) in enumerate(ranked):
            if position >= 2 and candidate.ratio < 1.0 + 1e-9:
                break
            found = self._exactly(candidate)
            if found:
                return found
            if candidate.ratio > 1.0 + 1e-9 and (noisy is None or name == "logits"):
                noisy = name
        # Huge numbers that cancel leave no digits in float64: there the slopes are looked for in exact arithmetic.
        return [] if noisy is None else self._exactly(self._steepest(noisy, self.candidates[noisy]))

    def _steepest(self, name: str, candidate: _Candidate) -> _Candidate:
        """Two images along the steepest direction, found by exact differences."""
        size = candidate.start.size
        centre_D = np.clip(candidate.start.reshape(size), STEP, 1.0 - STEP)
        moved = np.concatenate([centre_D[None], centre_D + STEP * np.eye(size)])
        values = self.program.evaluate(moved.reshape(-1, *self.shape), self.program.exact_numbers)
        value = values["logits" if name.startswith("margin") else name].reshape(size + 1, -1)
        jacobian_DK = np.vectorize(as_float, otypes=[np.float64])(value[1:] - value[0]) / STEP
        if name.startswith("margin") and jacobian_DK.shape[1] > 1:
            i, j = (int(k) for k in name.split()[1:])
            jacobian_DK = (jacobian_DK[:, i] - jacobian_DK[:, j])[:, None]
        direction_D = np.linalg.svd(jacobian_DK, full_matrices=False)[0][:, 0]
        ends = (centre_D + sign * STEP * direction_D for sign in (1.0, -1.0))
        start, end = (np.clip(at, 0.0, 1.0).reshape(self.shape) for at in ends)
        return _Candidate(candidate.ratio, start, end)

    def _exactly(self, candidate: _Candidate) -> list[str]:
        numbers = self.program.exact_numbers
        ends = np.stack([candidate.start, candidate.end])
        values = self.program.evaluate(ends, numbers)
        x = values["image"].reshape(2, -1)
        square = ((x[0] - x[1]) ** 2).sum()
        if not square > 0:
            return []
        found = []
        for name, bound in self.lipschitz.items():
            y = values[name].reshape(2, -1)
            if ((y[0] - y[1]) ** 2).sum() > as_number(bound, square) ** 2 * square:
                ratio = float(as_float(((y[0] - y[1]) ** 2).sum()) / as_float(square)) ** 0.5
                found.append(f"{name}: a secant of {ratio!r} against the bound {bound!r}")
        logits = values["logits"]
        logits = np.concatenate([logits, -logits], axis=1) if logits.shape[1] == 1 else logits
        for i in range(logits.shape[1]):
            for j in range(i):
                difference = (logits[0, i] - logits[0, j]) - (logits[1, i] - logits[1, j])
                bound = float(self.bounds.margins_KK[i, j])
                if difference**2 > as_number(bound, square) ** 2 * square:
                    ratio = (as_float(difference**2) / as_float(square)) ** 0.5
                    found.append(f"margin {i} {j}: a secant of {ratio!r} against the bound {bound!r}")
        return found


def as_number(value: float, like: object) -> fmpq | arb:
    return arb(value) if isinstance(like, arb) else fmpq(*value.as_integer_ratio())


def as_float(value: fmpq | arb) -> float:
    return float(value) if isinstance(value, arb) else int(value.p) / int(value.q)


# --- rounding errors --------------------------------------------------------------------------------------------------


def runnable(graph: Graph) -> Graph:
    """The graph in a format that ONNX Runtime has kernels for: float32 where float64 lacks one."""
    if graph.dtype is np.float32:
        return graph
    try:
        Engine(graph.model, "cpu", 1)
    except GraphError:
        return _in_float32(graph)
    return graph


def _in_float32(graph: Graph) -> Graph:
    model = onnx.load_model_from_string(graph.model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.DOUBLE:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = onnx.TensorProto.FLOAT
    return replace(graph, model=model.SerializeToString(), dtype=np.float32)


def error_findings(graph: Graph, bounds: Bounds, seed: int = 0, images: int = 3) -> list[str]:
    """Computed tensors further from their exact value than the certificate says, for 8-bit images."""
    rng = np.random.default_rng(seed)
    pixels_NX = np.stack(
        [
            rng.integers(0, 256, graph.shape),
            rng.choice([0, 255], graph.shape),
            np.full(graph.shape, rng.integers(256)),
        ][:images]
    )
    program = Program.parse(graph.model)
    errors = bounds.errors(program)
    computed = _computed(program, graph, pixels_NX, list(errors))
    numbers = program.exact_numbers
    exact = program.evaluate(np.frompyfunc(lambda p: fmpq(int(p), 255), 1, 1)(pixels_NX), numbers)
    found = []
    for k in range(len(pixels_NX)):
        if not all(np.isfinite(array[k]).all() for array in computed.values()):
            return ["a computed value is not finite"]
        worst = max((abs(off) for off in numbers.convert(computed["logits"][k]) - exact["logits"][k]), key=as_float)
        if worst > as_number(bounds.logit_error, worst):
            found.append(f"logits: off by {as_float(worst)!r} against the bound {bounds.logit_error!r}")
        for name, bound in errors.items():
            off = numbers.convert(computed[name][k].ravel()) - exact[name][k].ravel()
            square = (off * off).sum()
            if square > as_number(bound, square) ** 2:
                found.append(f"{name}: off by {as_float(square) ** 0.5!r} in L2 against the bound {bound!r}")
    return found


def _computed(program: Program, graph: Graph, pixels_NX: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tensors of ONNX Runtime as the service runs it, those inside of the graph included."""
    image_NX = (pixels_NX / 255).astype(graph.dtype)
    outputs = ["logits", *(name for name in names if name != "logits")]
    made = onnx.ModelProto()
    made.CopyFrom(program.model)
    element = onnx.TensorProto.DOUBLE if graph.dtype is np.float64 else onnx.TensorProto.FLOAT
    made.graph.output.extend(helper.make_tensor_value_info(name, element, None) for name in outputs[1:])
    # With every tensor an output, nothing is fused: the logits come from the graph as it is served.
    logits = run(graph, ["logits"], image_NX)
    inside = run(replace(graph, model=made.SerializeToString()), outputs[1:], image_NX) if outputs[1:] else []
    return dict(zip(outputs, [*logits, *inside], strict=True))


def run(graph: Graph, names: Sequence[str], images_NX: np.ndarray) -> list[np.ndarray]:
    """Tensors of a graph by ONNX Runtime, as the service runs it, in batches of a size that the graph takes."""
    engine, n = Engine(graph.model, "cpu", 1), graph.batch or len(images_NX)
    parts = [engine.run(list(names), {"image": images_NX[k : k + n]}) for k in range(0, len(images_NX), n)]
    return [np.concatenate(rows) for rows in zip(*parts, strict=True)]
