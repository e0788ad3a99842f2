"""Train networks of deel-torchlip for a given time and export them: `authors.py --data DIR --out DIR [NAME ...]`.

Runs in the environment of `benchmarks/libraries/requirements.txt` and imports nothing of lipcert. Writes
`OUT/NAME/model.onnx` (float64, image N x 1 x 28 x 28 in [0, 1] -> logits) and `OUT/NAME/run.json`.

Rows `...-notebook` have the networks and losses of the library's notebooks on MNIST 0-8 and Fashion-MNIST; the second
takes batches of 4096 there. Rows `...-tuned...` are a stronger opponent from its own layers and losses, set after
short trainings: `--hold-out N` trains without N images and prints what a setting is worth on them, `--set key=value`
changes one."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deel import torchlip
from deel.torchlip.modules import loss as losses
from torch import Tensor, nn

EPSILONS = (0.1, 0.25, 0.3, 0.5, 1.0, 1.58)
SETTLING = 10
"""Forward passes in training mode before the weights are frozen: each goes on with the power iteration."""


@dataclass(frozen=True)
class Setting:
    """One training."""

    data: str
    """Folder of the data set."""
    classes: tuple[int, ...]
    network: str
    """Of `NETWORKS`."""
    loss: str
    """Of `LOSSES`."""
    options: Mapping[str, float]
    """Arguments of the loss."""
    batch_size: int
    learning_rate: float
    """Of Adam with its defaults."""
    seconds: float
    """Of training, on one core."""
    schedule: str = "constant"
    """`constant`, or `falling`: 5 % of the time rising, then half a cosine to 0."""
    mirror: bool = False
    """Mirror every second image, left to right."""
    outputs: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", 1 if len(self.classes) == 2 else len(self.classes))


def dense(*widths: int) -> Callable[[int], list[nn.Module]]:
    """Dense layers between GroupSort2, and a head with rows of norm 1."""

    def build(outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = [nn.Flatten()]
        for columns, rows in zip((784, *widths), widths, strict=False):
            layers += [torchlip.SpectralLinear(columns, rows), torchlip.GroupSort2()]
        return [*layers, torchlip.FrobeniusLinear(widths[-1], outputs)]

    return build


def sorting(outputs: int) -> list[nn.Module]:
    """The notebook on MNIST 0-8: dense 128-64-32 with FullSort."""
    layers: list[nn.Module] = [nn.Flatten()]
    for columns, rows in ((784, 128), (128, 64), (64, 32)):
        layers += [torchlip.SpectralLinear(columns, rows), torchlip.FullSort()]
    return [*layers, torchlip.FrobeniusLinear(32, outputs)]


def convolutions(*channels: int, width: int) -> Callable[[int], list[nn.Module]]:
    """Stages of 3 x 3 convolutions, each ended by an L2-norm pool of 2 x 2; one dense layer, head with rows of norm 1.

    `convolutions(16, 32, width=64)` is the notebook on Fashion-MNIST; some of its versions have an orthogonal head.
    """

    def build(outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        before = 1
        for after in channels:
            layers += [torchlip.SpectralConv2d(before, after, 3, padding=1), torchlip.GroupSort2()]
            layers.append(torchlip.ScaledL2NormPool2d(2))
            before = after
        features = before * (28 // 2 ** len(channels)) ** 2
        layers += [nn.Flatten(), torchlip.SpectralLinear(features, width), torchlip.GroupSort2()]
        return [*layers, torchlip.FrobeniusLinear(width, outputs, disjoint_neurons=True)]

    return build


NETWORKS: dict[str, Callable[[int], list[nn.Module]]] = {
    "dense 128-64-32, FullSort": sorting,
    "dense 256-128-64": dense(256, 128, 64),
    "dense 256-256": dense(256, 256),
    "dense 512-512": dense(512, 512),
    "convolutions 16-32, dense 64": convolutions(16, 32, width=64),
    "convolutions 32-64, dense 128": convolutions(32, 64, width=128),
}

LOSSES: dict[str, Callable[..., nn.Module]] = {
    "HKRLoss": losses.HKRLoss,
    "TauBCEWithLogitsLoss": losses.TauBCEWithLogitsLoss,
    "HKRMulticlassLoss": losses.HKRMulticlassLoss,
    "SoftHKRMulticlassLoss": losses.SoftHKRMulticlassLoss,
    "LseHKRMulticlassLoss": losses.LseHKRMulticlassLoss,
    "TauCrossEntropyLoss": losses.TauCrossEntropyLoss,
}

ALL = tuple(range(10))
SETTINGS: dict[str, Setting] = {
    "mnist-0-8-notebook": Setting(
        data="mnist",
        classes=(0, 8),
        network="dense 128-64-32, FullSort",
        loss="HKRLoss",
        # The notebook's alpha of 10 as this version counts it: 10 / (1 + 10).
        options={"alpha": 10 / 11, "min_margin": 1.0},
        batch_size=128,
        learning_rate=1e-3,
        seconds=120.0,
    ),
    "fashion-mnist-notebook": Setting(
        data="fashion-mnist",
        classes=ALL,
        network="convolutions 16-32, dense 64",
        loss="HKRMulticlassLoss",
        # 100 / (1 + 100).
        options={"alpha": 100 / 101, "min_margin": 0.25},
        batch_size=256,
        learning_rate=1e-3,
        seconds=600.0,
    ),
    "mnist-0-8-tuned": Setting(
        data="mnist",
        classes=(0, 8),
        network="dense 256-128-64",
        loss="HKRLoss",
        options={"alpha": 0.98, "min_margin": 3.0},
        batch_size=128,
        learning_rate=3e-3,
        seconds=120.0,
        schedule="falling",
    ),
    "fashion-mnist-tuned-accurate": Setting(
        data="fashion-mnist",
        classes=ALL,
        network="dense 256-256",
        loss="LseHKRMulticlassLoss",
        options={"alpha": 0.98, "min_margin": 1.0},
        batch_size=256,
        learning_rate=3e-3,
        seconds=600.0,
        schedule="falling",
        mirror=True,
    ),
    "fashion-mnist-tuned-robust": Setting(
        data="fashion-mnist",
        classes=ALL,
        network="dense 256-256",
        loss="SoftHKRMulticlassLoss",
        options={"alpha": 0.98, "min_margin": 4.0, "temperature": 5.0},
        batch_size=256,
        learning_rate=3e-3,
        seconds=600.0,
        schedule="falling",
        mirror=True,
    ),
}


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, raw or `.gz`."""
    packed = folder / f"{name}.gz"
    content = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    (axes,) = struct.unpack_from(">xxxB", content)
    shape = struct.unpack_from(f">{axes}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def training_images(folder: Path, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pixels N x 1 x 28 x 28 in [0, 1] of these classes, and their places among them."""
    image_NHW = read_idx(folder, "train-images-idx3-ubyte")
    number_N = read_idx(folder, "train-labels-idx1-ubyte")
    kept_N = np.isin(number_N, classes)
    label_N = np.searchsorted(classes, number_N[kept_N])
    return torch.from_numpy(image_NHW[kept_N][:, None].astype(np.float32) / 255), torch.from_numpy(label_N)


def batches(image_NCHW: Tensor, label_N: Tensor, setting: Setting, generator: torch.Generator) -> Iterator[Any]:
    """Shuffled anew for each epoch, without end; an incomplete last batch is dropped."""
    while True:
        order_N = torch.randperm(len(label_N), generator=generator)
        for start in range(0, len(label_N) - setting.batch_size + 1, setting.batch_size):
            chosen_M = order_N[start : start + setting.batch_size]
            image_MCHW = image_NCHW[chosen_M]
            if setting.mirror:
                image_MCHW = torch.cat([image_MCHW[0::2], image_MCHW[1::2].flip(-1)])
                chosen_M = torch.cat([chosen_M[0::2], chosen_M[1::2]])
            yield image_MCHW, label_N[chosen_M]


def targets(label_N: Tensor, setting: Setting) -> Tensor:
    """As the losses want them: +1 and -1 of one output, numbers for cross-entropy, else one-hot."""
    if setting.outputs == 1:
        return (1.0 - 2.0 * label_N)[:, None]
    if setting.loss == "TauCrossEntropyLoss":
        return label_N
    return nn.functional.one_hot(label_N, setting.outputs).float()


def learning_rate(setting: Setting, share: float) -> float:
    """After this share of the time."""
    if setting.schedule == "constant":
        return setting.learning_rate
    if setting.schedule != "falling":
        raise SystemExit(f"no schedule {setting.schedule!r}: constant or falling")
    rising = min(1.0, share / 0.05)
    return setting.learning_rate * rising * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def train(model: nn.Module, setting: Setting, source: Iterator[Any]) -> dict[str, float]:
    """Train until the time is over; the last state stays. Only this is timed.

    What counts are processor seconds, on one thread: the seconds of the clock, unless others use the machine as well.
    """
    criterion = LOSSES[setting.loss](**setting.options)
    optimiser = torch.optim.Adam(model.parameters(), setting.learning_rate)
    model.train()
    steps, started, processor = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.process_time() - processor) < setting.seconds:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(setting, elapsed / setting.seconds)
        image_NCHW, label_N = next(source)
        optimiser.zero_grad()
        loss = criterion(model(image_NCHW), targets(label_N, setting))
        loss.backward()
        optimiser.step()
        steps += 1
    return {
        "processor_seconds": time.process_time() - processor,
        "seconds": time.perf_counter() - started,
        "steps": steps,
        "last_loss": loss.item(),
    }


def worth(model: nn.Module, image_NCHW: Tensor, label_N: Tensor) -> dict[str, float]:
    """Clean and certified accuracy if the body has the constant 1: `margin / ||w_i - w_j||`, in float64."""
    model = model.double()
    with torch.no_grad():
        logits_NK = torch.cat([model(part.double()) for part in image_NCHW.split(500)])
    rows_KD = model[-1].weight.detach()
    if logits_NK.shape[1] == 1:
        logits_NK, rows_KD = torch.cat([logits_NK, -logits_NK], 1), torch.cat([rows_KD, -rows_KD])
    bounds_KK = (rows_KD[:, None] - rows_KD[None]).norm(dim=-1)
    class_N = logits_NK.argmax(1)
    ratio_NK = (logits_NK.gather(1, class_N[:, None]) - logits_NK) / bounds_KK[class_N]
    ratio_NK.scatter_(1, class_N[:, None], math.inf)
    right_N, radius_N = class_N == label_N, ratio_NK.min(1).values
    certified = {f"{epsilon:g}": (right_N & (radius_N > epsilon)).double().mean().item() for epsilon in EPSILONS}
    return {"clean": right_N.double().mean().item(), **certified}


def export(model: nn.Module, path: Path) -> None:
    """Write the plain model in float64, with any batch size."""
    torch.onnx.export(
        model.double().eval(),
        (torch.rand(2, 1, 28, 28, dtype=torch.float64),),
        path,
        dynamo=True,
        opset_version=18,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("N", min=1, max=4096)},),
        verbose=False,
    )


def run(name: str, setting: Setting, data: Path, out: Path, hold_out: int, seed: int) -> None:
    """Train, freeze as the library says, export."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    image_NCHW, label_N = training_images(data / setting.data, setting.classes)
    order_N = torch.randperm(len(label_N), generator=generator)
    held_M, kept_N = order_N[:hold_out], order_N[hold_out:]
    model = torchlip.Sequential(*NETWORKS[setting.network](setting.outputs))
    source = batches(image_NCHW[kept_N], label_N[kept_N], setting, generator)
    measured = train(model, setting, source)
    with torch.no_grad():
        for _ in range(SETTLING):
            model(image_NCHW[:2])
    plain = model.eval().vanilla_export()
    record = {
        "name": name,
        "library": f"deel-torchlip {metadata.version('deel-torchlip')}",
        "setting": asdict(setting),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "images": len(kept_N),
        "epochs": measured["steps"] * setting.batch_size / len(kept_N),
        **measured,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    if hold_out:
        record["held_out"] = {"n": hold_out, **worth(plain, image_NCHW[held_M], label_N[held_M])}
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    export(plain, folder / "model.onnx")
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)


def changed(setting: Setting, changes: Sequence[str]) -> Setting:
    """With `key=value` replaced, values as JSON where they are; `options.key=value` for the loss."""
    for change in changes:
        key, _, text = change.partition("=")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if key == "options":
            setting = replace(setting, options=value)
        elif key.startswith("options."):
            setting = replace(setting, options={**setting.options, key.removeprefix("options."): value})
        else:
            setting = replace(setting, **{key: value})
    return setting


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SETTINGS)}; all by default")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with mnist/ and fashion-mnist/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--hold-out", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    names = arguments.names or list(SETTINGS)
    unknown = set(names) - SETTINGS.keys()
    if unknown:
        raise SystemExit(f"no setting {', '.join(sorted(unknown))}: choose of {', '.join(SETTINGS)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in names:
        setting = changed(SETTINGS[name], arguments.changes)
        run(name, setting, arguments.data, arguments.out, arguments.hold_out, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
