"""Measure saliency beside SmoothGrad of an ordinary CNN: `python docs/saliency.py --data DIR [MODEL ...]`.

Folders as for docs/reference_image.py. The CNN is trained here, on the same images. Prints the table of
docs/saliency.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.soundness.data import data_folder, test_images  # noqa: E402
from models.data.datasets import load_dataset, options_of  # noqa: E402
from models.export import code_version, environment  # noqa: E402
from service.inference.classifier import Classifier  # noqa: E402

MODELS = ("mnist", "fashion-mnist-robust")
EPOCHS, BATCH = 1, 128
SMOOTHED, SIGMA = 25, 0.15
SHARES = np.linspace(0.0, 1.0, 21)
MOVED = 0.5
"""L2 length of the random change of an image, pixels in [0, 1]."""
HEADER = (
    "| data | network, explanation | clean | deletion | at random | insertion | at random | stability | gradients |",
    "|---" * 9 + "|",
)

Logits = Callable[[np.ndarray], np.ndarray]
Explain = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", default=MODELS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500, help="test images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write("\n".join([*HEADER, ""]))
    for name in arguments.model:
        model = Classifier.load(ROOT / "models" / "zoo" / name, "cpu", threads=1)
        image_NCHW, label_N = test_images(model, arguments.data, arguments.images)
        cnn = trained(model, arguments.data)
        rows: list[tuple[str, Logits, Explain, int]] = [
            (f"`{name}`, saliency", lambda x, m=model: m.classify(x)[0], lambda x, m=model: saliency(m, x), 1),
            ("CNN, gradient", lambda x, c=cnn: logits(c, x), lambda x, c=cnn: gradient(c, x), 1),
            ("CNN, SmoothGrad", lambda x, c=cnn: logits(c, x), lambda x, c=cnn: smooth(c, x), SMOOTHED),
        ]
        for title, of, explain, cost in rows:
            row = measured(of, explain, image_NCHW, label_N)
            sys.stdout.write(f"| {model.card.data['name']} | {title} | {row} | {cost} |\n")
            sys.stdout.flush()
    made = environment(0.0)
    sys.stdout.write(f"\n{made['cpu']}, one thread, torch {made['torch']}, code {code_version()}.\n")


def trained(model: Classifier, data: Path) -> nn.Module:
    """Return a small CNN, trained on the images of a model with Adam and cross-entropy."""
    torch.manual_seed(0)
    found = load_dataset(options_of(model.card.data, list(model.labels)), data_folder(model, data)).train
    image_NCHW, label_N = found.pixels(torch.float32), found.labels_N
    cnn = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, len(model.labels))),
    )
    adam = torch.optim.Adam(cnn.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(label_N)).split(BATCH):
            adam.zero_grad()
            nn.functional.cross_entropy(cnn(image_NCHW[rows]), label_N[rows]).backward()
            adam.step()
    return cnn.eval()


def logits(cnn: nn.Module, image_NCHW: np.ndarray) -> np.ndarray:
    """Return the logits of the CNN."""
    with torch.no_grad():
        return cnn(torch.from_numpy(image_NCHW).float()).double().numpy()


def gradient(cnn: nn.Module, image_NCHW: np.ndarray, pair_N2: torch.Tensor | None = None) -> np.ndarray:
    """Return the gradient of the margin of two classes of the CNN, by default of the two with the largest logits."""
    image = torch.from_numpy(image_NCHW).float().requires_grad_()
    logits_NK = cnn(image)
    if pair_N2 is None:
        pair_N2 = logits_NK.topk(2).indices
    margin_N2 = logits_NK.gather(1, pair_N2)
    (found,) = torch.autograd.grad((margin_N2[:, 0] - margin_N2[:, 1]).sum(), image)
    return found.double().numpy()


def smooth(cnn: nn.Module, image_NCHW: np.ndarray) -> np.ndarray:
    """Return SmoothGrad (Smilkov et al. 2017): the mean gradient of that margin over noisy images."""
    random = np.random.default_rng(0)
    pair_N2 = torch.from_numpy(logits(cnn, image_NCHW)).topk(2).indices
    total = np.zeros_like(image_NCHW)
    for _ in range(SMOOTHED):
        total += gradient(cnn, image_NCHW + SIGMA * random.normal(size=image_NCHW.shape), pair_N2)
    return total / SMOOTHED


def saliency(model: Classifier, image_NCHW: np.ndarray) -> np.ndarray:
    """Return the gradient that the option `saliency` answers."""
    predictions = model.predict(image_NCHW)
    weights_NK = np.zeros((len(image_NCHW), len(model.labels)))
    for n, prediction in enumerate(predictions):
        weights_NK[n, prediction.class_id], weights_NK[n, prediction.runner_up] = 1.0, -1.0
    return model.margin_gradient(image_NCHW, weights_NK)[1]


def measured(of: Logits, explain: Explain, image_NCHW: np.ndarray, label_N: np.ndarray) -> str:
    """Return accuracy, deletion and insertion beside random orders, and stability.

    Args:
        of: logits of the network.
        explain: its attributions, like the images.
        image_NCHW: pixels in [0, 1].
        label_N: true classes.
    """
    random = np.random.default_rng(1)
    class_N = of(image_NCHW).argmax(axis=1)
    found = explain(image_NCHW)
    way = random.normal(size=image_NCHW.shape)
    way *= MOVED / norm(way)[:, None, None, None]
    moved = explain(np.clip(image_NCHW + way, 0.0, 1.0))
    cosine_N = (found * moved).sum(axis=(1, 2, 3)) / np.maximum(norm(found) * norm(moved), 1e-300)
    cells = [f"{(class_N == label_N).mean():.1%}"]
    for is_deletion in (True, False):
        for weight in (np.abs(found), random.random(found.shape)):
            cells.append(f"{area(of, image_NCHW, class_N, weight, is_deletion):.3f}")
    return " | ".join([*cells, f"{cosine_N.mean():.3f}"])


def norm(image_NCHW: np.ndarray) -> np.ndarray:
    """Return the L2 norm of each image."""
    return np.linalg.norm(image_NCHW.reshape(len(image_NCHW), -1), axis=1)


def area(of: Logits, image_NCHW: np.ndarray, class_N: np.ndarray, weight_NCHW: np.ndarray, is_deletion: bool) -> float:
    """Return the mean share of images that have their class while pixels are made black, or put back from black.

    Args:
        of: logits of the network.
        image_NCHW: the images.
        class_N: their predicted classes.
        weight_NCHW: pixels of the largest weight go first.
        is_deletion: whether they are made black.
    """
    flat_ND = image_NCHW.reshape(len(image_NCHW), -1)
    rank_ND = (-weight_NCHW.reshape(flat_ND.shape)).argsort(axis=1).argsort(axis=1)
    shares = []
    for share in SHARES:
        first_ND = rank_ND < round(share * flat_ND.shape[1])
        shown_ND = np.where(first_ND == is_deletion, 0.0, flat_ND)
        shares.append((of(shown_ND.reshape(image_NCHW.shape)).argmax(axis=1) == class_N).mean())
    return float(np.mean(shares))


if __name__ == "__main__":
    main()
