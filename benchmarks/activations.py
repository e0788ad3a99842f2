"""How accurate a runtime's activations are: `python benchmarks/activations.py [--write]`.

IEEE 754 says nothing about exp, tanh or erf, so that the certifier assumes a bound, `FUNCTION_ERROR` of
`service/certificate/rules/activations.py`. Here it is measured: the float32 kernels of ONNX
Runtime on a sweep of all finite float32 values (every `--step`-th bit pattern: negative, subnormal and huge ones
among them) against float64; its float64 kernels, and numpy's functions that the certifier itself uses, on random and
special values against balls of
160 bits (python-flint). `--write` replaces `benchmarks/ACTIVATIONS.md`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import flint
import numpy as np
from flint import arb

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "ACTIVATIONS.md"

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from graph_builder import GraphBuilder  # noqa: E402

from models.export import code_version, environment  # noqa: E402
from service.certificate.rules.activations import FUNCTION_ERROR  # noqa: E402
from service.runtime.engine import Engine  # noqa: E402

UNIT = {np.float32: 2.0**-24, np.float64: 2.0**-53}
BLOCK = 1 << 22
Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Activation:
    """One operator with its attributes: what it should give, and the scale of its errors (see `FUNCTION_ERROR`)."""

    operator: str
    in_float64: Function
    attributes: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0
    exact: Callable[[arb], arb] | None = None
    """For operators that have a float64 kernel."""

    @property
    def name(self) -> str:
        return " ".join([self.operator, *(f"{key}={value:.4g}" for key, value in self.attributes.items())])


@dataclass
class Row:
    """The worst of n results, in units of `u max(scale, |y|)`, and where."""

    name: str
    worst: float = 0.0
    at: float = math.nan
    n: int = 0
    not_finite: int = 0

    def see(self, x: np.ndarray, computed: np.ndarray, exact: np.ndarray, unit: float, scale: float) -> None:
        lost = ~np.isfinite(computed) & (np.abs(exact) < 1e38)
        units = np.abs(computed.astype(np.float64) - exact) / (unit * np.maximum(scale, np.abs(exact)))
        units[~np.isfinite(units)] = 0.0
        where = int(units.argmax())
        self.n += x.size
        self.not_finite += int(lost.sum())
        if units[where] > self.worst:
            self.worst, self.at = float(units[where]), float(x[where])


def single(value: float) -> float:
    """A float attribute as ONNX stores it."""
    return float(np.float32(value))


def elu(x: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(x >= 0.0, x, alpha * np.expm1(np.minimum(x, 0.0)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


ERF = np.vectorize(math.erf, otypes=[np.float64])
SELU = (single(1.67326319217681884765625), single(1.05070102214813232421875))


def activations() -> list[Activation]:
    """Every operator of `smooth.py` that works elementwise, with attributes large and small."""
    found = [
        Activation("Sigmoid", sigmoid, exact=lambda x: 1 / (1 + (-x).exp())),
        Activation("Tanh", np.tanh, exact=arb.tanh),
        Activation("Erf", ERF),
        Activation("Softplus", lambda x: np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))),
        Activation("Softsign", lambda x: x / (1.0 + np.abs(x))),
        Activation("HardSwish", lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0), scale=3.0),
        Activation("Selu", lambda x: SELU[1] * elu(x, SELU[0]), scale=SELU[0] * SELU[1]),
        Activation("Selu", lambda x: 0.5 * elu(x, 3.0), {"alpha": 3.0, "gamma": 0.5}, 1.5),
    ]
    for alpha in (1.0, single(0.1), 2.5, 100.0, -0.5):
        scale = max(1.0, abs(alpha))
        found.append(Activation("Elu", lambda x, a=alpha: elu(x, a), {"alpha": alpha}, scale))
    for alpha in (1.0, single(0.1), 30.0):
        scale = max(1.0, alpha)
        found.append(Activation("Celu", lambda x, a=alpha: a * elu(x / a, 1.0), {"alpha": alpha}, scale))
    for alpha, beta in ((single(0.2), 0.5), (single(1.0 / 6.0), 0.5), (2.0, -7.0)):
        given = {"alpha": alpha, "beta": beta}
        scale = max(1.0, abs(beta))
        found.append(Activation("HardSigmoid", lambda x, a=alpha, b=beta: np.clip(a * x + b, 0.0, 1.0), given, scale))
    return found


def kernel_of(operator: str, dtype: type, **attributes: float) -> Function:
    """Return ONNX Runtime's kernel of one operator, on the CPU, as the service runs it."""
    g = GraphBuilder(dtype=dtype)
    g.called(g.one(operator, "x", **attributes), "y")
    engine = Engine(g.build({"x": ["M"]}, {"y": ["M"]}), "cpu", threads=1)
    return lambda x_NM: engine.run(["y"], {"x": x_NM})[0]


def float32_blocks(step: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All finite float32 values, every `step`-th bit pattern; then short vectors: kernels treat remainders apart."""
    for start in range(0, 1 << 32, BLOCK * step):
        patterns = np.arange(start, min(start + BLOCK * step, 1 << 32), step, dtype=np.uint64).astype(np.uint32)
        values = patterns.view(np.float32)
        yield values[np.isfinite(values)]
    for size in range(1, 40):
        for _ in range(50):
            yield (rng.standard_normal(size) * rng.choice([0.1, 1.0, 10.0])).astype(np.float32)


def float64_values(n: int, rng: np.random.Generator) -> np.ndarray:
    """Random values of all sizes, most of them where the functions bend, and special ones."""
    patterns = rng.integers(0, 1 << 64, n // 4, dtype=np.uint64).view(np.float64)
    special = np.array([0.0, 5e-324, 2.2e-308, 1e-20, 2.0**-53, 0.5, 1.0, 20.0, 36.7, 710.0, 745.2, 1e5, 1e308])
    near = 10.0 ** rng.uniform(-18, 3, n // 4)
    parts = [rng.uniform(-40, 40, n // 4), rng.standard_normal(n // 4), near, -near, patterns, special, -special]
    values = np.concatenate(parts)
    return values[np.isfinite(values)]


def in_float32(step: int) -> list[Row]:
    """The float32 kernels, elementwise."""
    rows = []
    for activation in activations():
        kernel, row = kernel_of(activation.operator, np.float32, **activation.attributes), Row(activation.name)
        for x in float32_blocks(step, np.random.default_rng(0)):
            exact = activation.in_float64(x.astype(np.float64))
            row.see(x, kernel(x[None])[0], exact, UNIT[np.float32], activation.scale)
        rows.append(_said(row))
    return rows


def _against_balls(row: Row, x: np.ndarray, computed: np.ndarray, exact: Callable[[arb], arb]) -> Row:
    """Errors of a float64 function, decided in ball arithmetic."""
    for value, result in zip(x.tolist(), computed.tolist(), strict=True):
        true = exact(arb(value))
        units = float(abs(arb(result) - true) / max(1.0, abs(float(true)))) / UNIT[np.float64]
        row.n += 1
        row.not_finite += not math.isfinite(result)
        if units > row.worst:
            row.worst, row.at = units, value
    return _said(row)


def in_float64(n: int) -> list[Row]:
    """The float64 kernels, elementwise."""
    x = float64_values(n, np.random.default_rng(1))
    return [
        _against_balls(Row(a.name), x, kernel_of(a.operator, np.float64)(x[None])[0], a.exact)
        for a in activations()
        if a.exact is not None
    ]


def of_numpy(n: int) -> list[Row]:
    """The functions that the certifier evaluates at the centre of the box."""
    x = float64_values(n, np.random.default_rng(2))
    below, above = -np.abs(x), np.abs(x) + 1e-300
    return [
        _against_balls(Row("numpy exp, x <= 0"), below, np.exp(below), arb.exp),
        _against_balls(Row("numpy expm1, x <= 0"), below, np.expm1(below), arb.expm1),
        _against_balls(Row("numpy log"), above, np.log(above), arb.log),
        _against_balls(Row("numpy logaddexp(0, x)"), x, np.logaddexp(0.0, x), _softplus),
        _against_balls(Row("numpy tanh"), x, np.tanh(x), arb.tanh),
        _against_balls(Row("math erf"), x, ERF(x), arb.erf),
    ]


def _softplus(x: arb) -> arb:
    return x.exp().log1p() if x < 0 else x + (-x).exp().log1p()


def along_an_axis(dtype: type, vectors: int) -> list[Row]:
    """Softmax and LogSoftmax of vectors of n values: units of u, whatever the size of the result (Softmax) or of
    `u max(1, max |x|)` (LogSoftmax)."""
    rows = []
    for operator in ("Softmax", "LogSoftmax"):
        kernel = kernel_of(operator, dtype)
        for n in (2, 10, 100, 1000):
            row, rng = Row(f"{operator} n={n}"), np.random.default_rng(n)
            for spread in (0.1, 1.0, 10.0, 100.0, 1000.0):
                x = (spread * rng.standard_normal((max(2, vectors // n), n))).astype(dtype)
                computed = kernel(x)
                for values, results in zip(x.tolist(), computed.tolist(), strict=True):
                    balls = [arb(v) for v in values]
                    total = sum((b.exp() for b in balls), arb(0)).log()
                    largest = max(1.0, max(map(abs, values))) if operator == "LogSoftmax" else 1.0
                    for ball, result in zip(balls, results, strict=True):
                        true = ball - total
                        true = true if operator == "LogSoftmax" else true.exp()
                        units = float(abs(arb(result) - true)) / (UNIT[dtype] * largest)
                        if units > row.worst:
                            row.worst, row.at = units, float(ball)
                    row.n += n
            rows.append(_said(row))
    return rows


def _said(row: Row) -> Row:
    sys.stderr.write(f"{row.name}: {row.worst:.3f} at {row.at:.9g}, n = {row.n}, not finite: {row.not_finite}\n")
    return row


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    return [
        f"## {title}",
        "",
        "| | worst error | at x = | not finite | n |",
        "|---|---|---|---|---|",
        *(
            f"| {row.name} | {row.worst:.2f} | {row.at if row.worst else 0:.9g} | {row.not_finite} | {row.n:,} |"
            for row in rows
        ),
        "",
    ]


def main() -> None:
    """Measure, print, and on request write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=61, help="every how many-th float32 bit pattern; odd is best")
    parser.add_argument("--values", type=int, default=2_000_000, help="float64 values for each kernel")
    parser.add_argument("--vectors", type=int, default=20_000, help="values of each spread for Softmax and LogSoftmax")
    parser.add_argument("--write", action="store_true", help=f"replace {RESULTS.name}")
    arguments = parser.parse_args()
    flint.ctx.prec = 160
    np.seterr(all="ignore")
    float32, float64 = in_float32(arguments.step), in_float64(arguments.values)
    own = of_numpy(arguments.values // 4)
    elementwise = [*float32, *float64, *own]
    worst = max(row.worst for row in elementwise)
    lost = sum(row.not_finite for row in [*float32, *float64])
    made = environment(0.0)
    text = "\n".join(
        [
            "# Accuracy of activations",
            "",
            f"`python benchmarks/activations.py --step {arguments.step} --values {arguments.values}`, code "
            f"{code_version()}. Errors are in units of `u max(scale, |y|)`: `u` the unit roundoff of the format, `y` "
            "the exact result, `scale` as `FUNCTION_ERROR` in `service/certificate/rules/activations.py` defines it.",
            "",
            f"**Worst: {worst:.2f} units; the certifier assumes {FUNCTION_ERROR:g}**, {FUNCTION_ERROR / worst:.1f} "
            f"times as much. Results that are not finite where the exact one is: {lost}.",
            "",
            f"Hardware: {made['cpu']}, {os.cpu_count()} logical CPUs, {platform.machine()}. Versions: Python "
            f"{platform.python_version()}, ONNX Runtime {made['onnxruntime']}, numpy {made['numpy']}, python-flint "
            f"{metadata.version('python-flint')}. Kernels of other processors and of CUDA were not measured here.",
            "",
            *_table("ONNX Runtime, float32: every finite value in steps of bit patterns", float32),
            *_table("ONNX Runtime, float64", float64),
            *_table("The certifier's own functions, float64", own),
            "Softmax and LogSoftmax are bounded from exp and log by the analysis of `smooth.py`; as a check, the whole "
            "kernels in units of `u` (Softmax) and of `u max(1, max |x|)` (LogSoftmax):",
            "",
            *_table("Softmax and LogSoftmax, float32", along_an_axis(np.float32, arguments.vectors)),
            *_table("Softmax and LogSoftmax, float64", along_an_axis(np.float64, arguments.vectors)),
        ]
    )
    sys.stdout.write(text)
    if arguments.write:
        RESULTS.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
