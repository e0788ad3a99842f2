"""Export of a trained network as an artefact: fold, emit `model.onnx`, prove, compare, measure, write.

The graphs that the server runs are compared and measured: it writes them from `model.onnx` (`service.network`).
The export is refused, and nothing written, where the server's certifier cannot bound the graph, where a proved bound is
above the declared one, where logits of ONNX Runtime differ from those of torch by more than the proved error, or where
the gradient differs from autograd's.

Axes: N batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from jaxtyping import Bool, Float64

from models.data.labelled import LabelledImages
from models.nets.networks import LipschitzNetwork
from models.nets.onnx_graph import GraphBuilder
from models.precision import in_float32
from service.artefact.card import Card, CertifiedAccuracy, InputShape, write_artefact
from service.certificate import Certificate, certified_radius, certify, two_class_logits
from service.network.graphs import forward_graph, gradient_graph
from service.network.reader import read
from service.runtime.engine import Engine

BOUND_TOLERANCE = 1e-3
"""Largest relative excess of the proved bound over the declared one; a larger one means that a layer is misstated."""
GRADIENT_TOLERANCE = 1e-9
"""Largest absolute difference between the served gradient and autograd, both float64, gradients of order 1."""
MEASURED_AT_ONCE = 250
"""Test images in one batch."""
PROBES = 64
"""Random images on which graph and network are compared, fewer of large images."""
PROBED_NUMBERS = 2**17
"""Numbers in all of them: each is held in float64 by every layer, for the gradient."""


class ExportRefusedError(Exception):
    """The artefact would contradict its certificate; nothing was written."""


def emit_graph(network: LipschitzNetwork) -> bytes:
    """Return `model.onnx`, image -> logits; equal networks give equal bytes."""
    folded = network.fold()
    graph = GraphBuilder(network.input_shape)
    return graph.build(folded.head.emit(graph, folded.body.emit(graph, graph.image)))


def prove(network: LipschitzNetwork, model_bytes: bytes, lipschitz_constant: float) -> Certificate:
    """Return the proof of the server's certifier, compared with the declared Lipschitz constant.

    Args:
        network: the trained network.
        model_bytes: its graph, by `emit_graph`.
        lipschitz_constant: declared for f (one output) or for the body (several outputs: `K_ij` is
            `lipschitz_constant * ||w_i - w_j||`).

    Raises:
        UnsupportedModelError: the certifier has no bound; the message names every node.
        ExportRefusedError: a proved bound is above the declared one by more than `BOUND_TOLERANCE`.
    """
    certificate = certify(model_bytes)
    rows = network.fold().head.weight()
    rows = torch.cat([rows, -rows]) if len(rows) == 1 else rows
    declared_KK = (
        lipschitz_constant * torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    )
    proved_KK = np.asarray(certificate.margin_bounds_KK)
    excess_KK = proved_KK - declared_KK * (1 + BOUND_TOLERANCE)
    np.fill_diagonal(excess_KK, -np.inf)
    i, j = np.unravel_index(np.argmax(excess_KK), excess_KK.shape)
    if excess_KK[i, j] > 0:
        raise ExportRefusedError(
            f"the proved Lipschitz bound of logit {i} minus logit {j} is {proved_KK[i, j]:.6f}, the "
            f"recipe declares {declared_KK[i, j]:.6f}: a layer stretches more than it states, or the weights are no "
            "longer orthogonal; nothing was written"
        )
    return certificate


def compare(network: LipschitzNetwork, model_bytes: bytes, certificate: Certificate, seed: int = 0) -> None:
    """Compare both graphs of the server, run on random images, with the folded network in torch.

    Args:
        network: the trained network.
        model_bytes: its graph, by `emit_graph`.
        certificate: of `model_bytes`.
        seed: of the images and margin weights.

    Raises:
        ExportRefusedError: logits differ by more than the proved errors, or the gradient differs from autograd's.
    """
    generator = np.random.default_rng(seed)
    probes = max(1, min(PROBES, PROBED_NUMBERS // math.prod(network.input_shape)))
    images = generator.random((probes, *network.input_shape))
    weights = generator.standard_normal((probes, network.outputs))
    folded = network.fold().cpu()

    variable = torch.from_numpy(images).requires_grad_()
    expected = folded(variable)
    (expected_gradient,) = torch.autograd.grad((expected * torch.from_numpy(weights)).sum(), variable)
    served = read(model_bytes)
    logits = run_graph(forward_graph(served).content, {"image": images})["logits"]
    beside = run_graph(gradient_graph(served).content, {"image": images, "margin_weights": weights})

    # Torch is a float64 evaluation in some order as well: each side is within logit_error of the exact value.
    allowed = 2 * certificate.logit_error
    for graph, found in (("of the logits", logits), ("of the gradient", beside["logits"])):
        difference = float(np.max(np.abs(found - expected.detach().numpy())))
        if not difference <= allowed:
            raise ExportRefusedError(
                f"logits by the graph {graph} differ from torch by {difference:.3g}, the proved error allows "
                f"{allowed:.3g}: a layer emits other nodes than it evaluates; nothing was written"
            )
    difference = float(np.max(np.abs(beside["gradient"] - expected_gradient.numpy())))
    if not difference <= GRADIENT_TOLERANCE:
        raise ExportRefusedError(
            f"the gradient that the server derives from the graph differs from autograd by {difference:.3g}, allowed "
            f"is {GRADIENT_TOLERANCE:.3g}: the backward pass of a layer is not the derivative of its forward pass; "
            "nothing was written"
        )


def converted(model_bytes: bytes, block: int, seed: int = 0) -> tuple[bytes, Certificate]:
    """Return a model in float32 with its proof, compared with the original on random images.

    Args:
        model_bytes: the model.
        block: the most columns of a matrix product, see `precision`.
        seed: of the images.

    Raises:
        UnsupportedModelError: the certifier has no bound of the converted model.
        PrecisionError: the model has no form in float32.
        ExportRefusedError: logits differ by more than the proved errors.
    """
    made = in_float32(model_bytes, block)
    certificate = certify(made)
    images = np.random.default_rng(seed).random((PROBES, *certificate.input_shape))
    before, after = (
        forward_engine(one, torch.get_num_threads()).run(("logits",), {"image": images})[0]
        for one in (model_bytes, made)
    )
    # Biases are rounded to float32 in the conversion, by less than the sums that they are added to.
    difference, allowed = float(np.max(np.abs(after - before))), 2 * certificate.logit_error
    if not difference <= allowed:
        raise ExportRefusedError(
            f"logits in float32 differ from those in float64 by {difference:.3g}, the proved error allows "
            f"{allowed:.3g}; nothing was written"
        )
    return made, certificate


def run_graph(graph: bytes, inputs: Mapping[str, Float64[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    """Return the outputs of a serialised graph, run on the CPU by the server's engine, with torch's threads."""
    engine = Engine(graph, "cpu", torch.get_num_threads())
    return dict(zip(engine.output_names, engine.run(engine.output_names, inputs), strict=True))


@dataclass(frozen=True)
class Measured:
    """Accuracy and certified accuracy on n test images, radii from the proved bounds."""

    accuracy: float
    certified_accuracy: dict[float, float]
    n: int


def measure(
    model_bytes: bytes, certificate: Certificate, test: LabelledImages, epsilons: tuple[float, ...]
) -> Measured:
    """Return the share of right and of certified answers on a test set, from the engine that the server uses.

    An image counts as certified at epsilon if its class is right and its proved radius is above epsilon.

    Args:
        model_bytes: the exported graph.
        certificate: of `model_bytes`.
        test: the test set.
        epsilons: L2 radii, pixels in [0, 1].
    """
    right_N, radius_N = radii(forward_engine(model_bytes, torch.get_num_threads()), certificate, test)
    return Measured(
        accuracy=float(right_N.mean()),
        certified_accuracy={e: float((right_N & (radius_N > e)).mean()) for e in epsilons},
        n=len(test),
    )


def forward_engine(model_bytes: bytes, threads: int) -> Engine:
    """Return the graph that the server writes from a model, loaded on the CPU."""
    network = read(model_bytes)
    return Engine(forward_graph(network).content, "cpu", threads, largest=network.largest)


def radii(
    engine: Engine, certificate: Certificate, test: LabelledImages
) -> tuple[Bool[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """Return, for each test image, whether its class is right, and its proved radius.

    Args:
        engine: of the logits.
        certificate: of the graph.
        test: the test set.
    """
    logits: list[np.ndarray] = []
    # In batches: the intermediate values of a convolutional network on a whole test set would fill the memory.
    for start in range(0, len(test), MEASURED_AT_ONCE):
        images_NCHW = test.at(slice(start, start + MEASURED_AT_ONCE)).pixels(torch.float64).numpy()
        logits += engine.run(("logits",), {"image": images_NCHW})
    # Margins are differences: in float32 they would be rounded once more.
    logits_NK = np.concatenate(logits).astype(np.float64)
    logits_NK = two_class_logits(logits_NK) if logits_NK.shape[1] == 1 else logits_NK
    found = certified_radius(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)
    return found.class_id_N == test.labels_N.numpy(), found.radius_N


def export_artefact(
    network: LipschitzNetwork,
    folder: Path,
    *,
    labels: list[str],
    lipschitz_constant: float,
    test: LabelledImages,
    epsilons: tuple[float, ...],
    data: dict[str, Any],
    recipe: dict[str, Any],
    seed: int,
    wall_time_s: float,
    devices: str | None = None,
    block: int | None = None,
) -> Measured:
    """Write `model.onnx` and `card.json` to `folder`, in place of an earlier artefact.

    Args:
        network: the trained network.
        folder: of the artefact; its name is the name of the model.
        labels: of the classes, in class order.
        lipschitz_constant: declared by the recipe, see `prove`.
        test: the test set.
        epsilons: L2 radii of the certified accuracy, pixels in [0, 1].
        data: description of the data set, for the card.
        recipe: in full, for the card.
        seed: of the training.
        wall_time_s: of the training, in seconds.
        devices: number and type of the devices of the training.
        block: columns of a block in float32, see `precision`; default: float64.

    Raises:
        UnsupportedModelError, ExportRefusedError, ArtefactError: the artefact would contradict its certificate; the
            folder is unchanged.
        PrecisionError: the network has no form in float32.
    """
    model_bytes = emit_graph(network)
    certificate = prove(network, model_bytes, lipschitz_constant)
    compare(network, model_bytes, certificate)
    if block is not None:
        model_bytes, certificate = converted(model_bytes, block)
    measured = measure(model_bytes, certificate, test, epsilons)
    channels, height, width = network.input_shape
    card = Card(
        name=folder.name,
        labels=labels,
        input=InputShape(channels=channels, height=height, width=width),
        data=data,
        loss=recipe["loss"],
        recipe=recipe if block is None else {**recipe, "export": described(block)},
        seed=seed,
        code_version=code_version(),
        accuracy=measured.accuracy,
        certified_accuracy=[
            CertifiedAccuracy(epsilon=e, value=v, n=measured.n) for e, v in measured.certified_accuracy.items()
        ],
        licence=data.get("licence"),
        environment=environment(wall_time_s, devices),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as workspace:
        fresh, replaced = Path(workspace) / "new", Path(workspace) / "old"
        write_artefact(fresh, card, model_bytes)
        if folder.exists():
            folder.rename(replaced)
        fresh.rename(folder)
    return measured


def described(block: int) -> dict[str, Any]:
    """Return the block `export` of the recipe in the card of a model in float32."""
    return {"precision": "float32", "blocks": block}


def environment(wall_time_s: float, devices: str | None = None) -> dict[str, Any]:
    """Return hardware, versions and duration of a run, without host name or path."""
    return {
        **({} if devices is None else {"devices": devices}),
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "wall_time_s": round(wall_time_s, 1),
    }


def code_version() -> str:
    """Return the commit of this source tree (`-dirty` where files differ), or outside git the package version."""
    git = shutil.which("git")
    if git is not None:
        described = subprocess.run(
            [git, "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            return described.stdout.strip()
    return metadata.version("lipcert")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
