"""Export the networks of `networks.py` (or `samples.py`): `export.py --out DIR [--samples] [NAME ...]`.

Runs in an environment with `requirements.txt`, never in lipcert's own. Each network is trained for some steps on
synthetic images, frozen as its library documents, exported, and the file compared with the module by ONNX Runtime.
Writes `DIR/NAME.FORM.onnx` (a sample has one form: `DIR/NAME.onnx`) and `DIR/claims.json`. Notes of the exporters about
source files and machines are removed from the graphs, which are otherwise unchanged.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from forms import Form, Network
from networks import NETWORKS
from samples import SAMPLES
from torch import nn

PACKAGES = ("deel-torchlip", "orthogonium", "torch")
DISAGREEMENT = 1e-4
"""Largest difference between the file and the module that rounding explains in these networks."""


def _images(shape: tuple[int, int, int], labels_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a smooth random picture of each class, with noise; values in [0, 1]."""
    coarse = torch.rand(10, shape[0], 4, 4, generator=torch.Generator().manual_seed(11))
    pictures = F.interpolate(coarse, shape[1:], mode="bilinear")
    noise = torch.randn(len(labels_N), *shape, generator=generator)
    return (pictures[labels_N] + 0.2 * noise).clamp(0.0, 1.0)


def _train(model: nn.Module, network: Network, generator: torch.Generator) -> None:
    """Run some steps of Adam on the cross-entropy, or on the logistic loss of one output."""
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(network.steps):
        labels = torch.randint(0, 10, (32,), generator=generator)
        logits = model(_images(network.shape, labels, generator))
        n_outputs = logits.shape[1]
        if n_outputs == 1:
            loss = F.softplus(-logits[:, 0] * (2.0 * (labels == 8) - 1.0)).mean()
        else:
            loss = F.cross_entropy(10.0 * logits, labels % n_outputs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    # Parametrised layers iterate once more, with the last weights.
    with torch.no_grad():
        model(_images(network.shape, torch.arange(4), generator))


def _lipschitz_estimate(model: nn.Module, shape: tuple[int, int, int], generator: torch.Generator) -> float:
    """Return a lower bound of the L2 Lipschitz constant: the largest norm of a float64 Jacobian at some images."""
    double = copy.deepcopy(model).double()
    largest = 0.0
    candidates = [_images(shape, torch.arange(4), generator), torch.rand(2, *shape, generator=generator)]
    for image in torch.cat(candidates).double():
        point = image[None].clone().requires_grad_(True)
        logits = double(point)[0]
        units = torch.eye(len(logits), dtype=torch.float64)
        (rows,) = torch.autograd.grad(logits, point, units, is_grads_batched=True)
        jacobian = rows.flatten(1)
        if bool(torch.isfinite(jacobian).all()):
            largest = max(largest, float(torch.linalg.matrix_norm(jacobian, 2)))
    return largest


def _write(model: nn.Module, form: Form, shape: tuple[int, int, int], path: Path) -> None:
    """Export the model to `path`."""
    dtype = getattr(torch, form.dtype)
    module = copy.deepcopy(model).to(dtype).eval()
    example = torch.rand(2, *shape, dtype=dtype)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    if form.exporter == "dynamo":
        batch = torch.export.Dim("N", min=1, max=4096)
        torch.onnx.export(
            module,
            (example,),
            path,
            dynamo=True,
            opset_version=form.opset,
            external_data=not form.one_file,
            dynamic_shapes=({0: batch},),
            verbose=False,
            **names,
        )
    else:
        axes = {"image": {0: "N"}, "logits": {0: "N"}}
        torch.onnx.export(module, (example,), path, dynamo=False, opset_version=form.opset, dynamic_axes=axes, **names)
    _strip(path)


def _strip(path: Path) -> None:
    """Remove notes about source code: they name files of this machine and are larger than a small graph."""
    model = onnx.load(path, load_external_data=False)
    for part in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())


def _disagreement(model: nn.Module, form: Form, shape: tuple[int, int, int], path: Path) -> float | None:
    """Return the largest difference between file and module, if ONNX Runtime has a kernel for every operator."""
    dtype = getattr(torch, form.dtype)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        return None
    worst = 0.0
    for n in (1, 3):
        batch = torch.rand(n, *shape, dtype=dtype)
        with torch.no_grad():
            expected = copy.deepcopy(model).to(dtype)(batch).numpy()
        (computed,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        worst = max(worst, float(np.abs(computed - expected).max()))
    return worst


def _exported(network: Network, seed: int, folder: Path, sample: bool) -> dict[str, Any]:
    """Build, train, freeze and export a network; return its entry in claims.json."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = network.build()
    _train(model, network, generator)
    model = network.freeze(model).eval()
    entry: dict[str, Any] = {
        "library": network.library,
        "what": network.layers,
        "claim": network.claim,
        "claim_margin": network.claim_margin,
        "holds": network.holds,
        "why": network.why,
        "lipschitz_estimate": _lipschitz_estimate(model, network.shape, generator),
        "files": {},
    }
    if network.patterns:
        entry["operators"] = list(network.patterns)
    for form in network.forms:
        path = folder / (f"{network.name}.onnx" if sample else f"{network.name}.{form.name}.onnx")
        try:
            _write(model, form, network.shape, path)
        except Exception as error:  # exporters raise any type of error; the table shows it
            path.unlink(missing_ok=True)
            entry["files"][form.name] = {"exporter_fails": f"{type(error).__name__}: {str(error).strip()}"[:160]}
            continue
        difference = _disagreement(model, form, network.shape, path)
        if difference is not None and not difference <= DISAGREEMENT:
            raise SystemExit(f"{path.name}: differs from the module by {difference}")
        entry["files"][form.name] = {"file": path.name}
    return entry


def main() -> None:
    """Run the command.

    Raises:
        SystemExit: a name is unknown, or a file differs from its module.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these networks; claims of the others stay")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--samples", action="store_true", help="the small networks of samples.py")
    arguments = parser.parse_args()
    networks = SAMPLES if arguments.samples else NETWORKS
    unknown = set(arguments.names) - {network.name for network in networks}
    if unknown:
        raise SystemExit(f"no network {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    claims = folder / "claims.json"
    entries = json.loads(claims.read_text(encoding="utf-8"))["networks"] if arguments.names and claims.exists() else {}
    for seed, network in enumerate(networks):
        if arguments.names and network.name not in arguments.names:
            continue
        entries[network.name] = _exported(network, seed, folder, arguments.samples)
        print(network.name, f"{entries[network.name]['lipschitz_estimate']:.6g}", flush=True)
    versions = {package: metadata.version(package).partition("+")[0] for package in PACKAGES}
    # In the order of the list, whichever were exported now.
    ordered = {network.name: entries[network.name] for network in networks if network.name in entries}
    text = json.dumps({"versions": versions, "networks": ordered}, indent=1)
    claims.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
