"""Every operator of the table of lowerings, in many variants: exact arithmetic against the kernels of ONNX Runtime.

The canonical graph as the service runs it stays within the proved error of its exact value; the file itself, which
ONNX Runtime reads with its own eyes and optimisations off, within twice that of the same value. `make thorough`
compares 50 variants of each operator (of up to 300 that are drawn: some are refused, or have no kernel), `make test`
two; `pytest -s` prints the figures.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exact_graphs import Program
from flint import fmpq
from graph_checks import as_float, as_number
from operator_variants import VARIANTS, Variant, variant
from thorough import often

from service.certificate import certify
from service.network.lowering import LOWERINGS
from service.network.operators import UnsupportedModelError
from service.network.reader import read
from service.network.writer import write
from service.runtime.engine import Engine
from service.runtime.session import GraphError, session_options

COUNT = often(2, 50)
NO_PROOF = ("ThresholdedRelu",)
ROUGH = {"Gelu": 1e-7}
"""What the runtime's reading of a file is off by: its function body of Gelu has constants in float32, in any format.
The graph that the service writes has them exact."""
IMAGES = 2


@cache
def tally() -> Counter[str]:
    return Counter()


def original(model: bytes, images_NX: np.ndarray) -> np.ndarray | str:
    """Return the logits of a file as ONNX Runtime reads it, or why it does not."""
    try:
        session = onnxruntime.InferenceSession(model, session_options(1), providers=["CPUExecutionProvider"])
        return session.run(["logits"], {"image": images_NX})[0]  # type: ignore[return-value]
    except Exception as error:  # The runtime's exceptions share no base class.
        return str(error)


def contradictions(made: Variant, seed: int, rough: float = 0.0) -> list[str]:
    """Return what contradicts the proof of a variant; count it under what was compared."""
    try:
        network, certificate = read(made.model), certify(made.model)
    except UnsupportedModelError:
        tally()["refused"] += 1
        return []
    written = write(network)
    try:
        engine = Engine(written, "cpu", 1)
    except GraphError:
        tally()["no kernel in this format"] += 1
        return []
    pixels_NX = np.random.default_rng(seed).choice([0, 3, 64, 127, 128, 200, 255], (IMAGES, *made.shape))
    images_NX = (pixels_NX / 255).astype(made.dtype)
    (computed_NK,) = engine.run(["logits"], {"image": images_NX})
    program = Program.parse(written)
    numbers = program.exact_numbers
    exact_NK = program.evaluate(np.frompyfunc(lambda p: fmpq(int(p), 255), 1, 1)(pixels_NX), numbers)["logits"]
    by_file_NK = original(made.model, images_NX)
    found: list[str] = []
    for name, logits_NK, bound in (
        ("canonical", computed_NK, certificate.logit_error),
        ("the file", by_file_NK, 2.0 * certificate.logit_error + rough),
    ):
        if isinstance(logits_NK, str):
            tally()["the runtime does not read the file"] += 1
        elif logits_NK.shape != exact_NK.shape:
            found.append(f"{name}: {logits_NK.shape} logits against {exact_NK.shape}")
        else:
            worst = max((abs(off) for off in (numbers.convert(logits_NK) - exact_NK).ravel()), key=as_float)
            if not np.isfinite(logits_NK).all() or worst > as_number(bound, worst):
                found.append(f"{name}: off by {as_float(worst)!r} against {bound!r}")
            tally()[name] += 1
    return found


FUNCTIONS = {
    *((name, np.float64) for name in ("Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Selu", "Softplus")),
    *((name, np.float64) for name in ("Softsign", "ThresholdedRelu")),
    ("HardSwish", np.float32),
    ("Mish", np.float64),
}
"""Operators without a kernel of a format: ONNX Runtime computes the function body that the specification gives them."""


def test_the_operators_that_are_no_kernel_are_known(tmp_path: Path) -> None:
    found: set[tuple[str, type]] = set()
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    for operator in VARIANTS:
        for seed in range(1, 7):
            made = variant(operator, seed)
            if made is None:
                continue
            try:
                written = write(read(made.model))
                onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
            except Exception:  # Refused, or without a kernel.
                continue
            loaded = onnx.load(options.optimized_model_filepath)
            if len(loaded.graph.node) != len(onnx.load_model_from_string(written).graph.node):
                found.add((operator, made.dtype))
    assert found <= FUNCTIONS
    assert ("Softplus", np.float64) in found


def test_every_operator_of_the_table_has_variants() -> None:
    assert set(VARIANTS) == set(LOWERINGS)


@pytest.mark.parametrize("operator", sorted(VARIANTS))
def test_no_variant_of_an_operator_contradicts_its_proof(operator: str) -> None:
    before = tally().copy()
    for seed in range(1, 6 * COUNT):
        chosen = variant(operator, seed)
        if chosen is not None:
            assert contradictions(chosen, seed, ROUGH.get(operator, 0.0)) == [], f"seed {seed}"
        if (tally() - before)["canonical"] == COUNT:
            break
    figures = tally() - before
    sys.stdout.write(f"{operator} {dict(figures)}\n")
    assert figures["canonical"] > 0 or operator in NO_PROOF
