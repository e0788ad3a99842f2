"""Measure counterfactuals by strength, and draw some: `python docs/strength.py --data DIR`, as docs/reference_image.py.

Another shipped model judges the counterfactuals of a model: the share that it assigns the class that they state. Prints
the table of docs/counterfactuals.md and writes docs/images/strengths.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.soundness.data import test_images  # noqa: E402
from models.export import code_version, environment  # noqa: E402
from service.inference.classifier import Classifier, View, counterfactuals  # noqa: E402
from service.inference.closest import LEVELS, lowest_levels  # noqa: E402
from service.inference.counterfactual import Counterfactual  # noqa: E402
from service.inference.strength import strengthen  # noqa: E402

JUDGES = {"mnist": "mnist-accurate", "fashion-mnist-robust": "fashion-mnist-accurate"}
STRENGTHS = (1.0, 1.25, 1.5, 2.0, 3.0)
BATCH = 250
GALLERY = ROOT / "docs" / "images" / "strengths.png"
DRAWN = (1.0, 2.0, 3.0)
EXAMPLES, SCALE, GAP, TOP = 6, 2, 4, 14
HEADER = (
    "| model | judge | strength | n | distance / nearest | own margin, extended | own margin "
    "| judge agrees, extended | judge agrees |"
)


def main() -> None:
    """Measure both models; print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000, help="most images of a test set")
    arguments = parser.parse_args()
    rows, pictures = [], []
    for name, judge in JUDGES.items():
        model, other = (Classifier.load(ROOT / "models" / "zoo" / one, "cpu", threads=1) for one in (name, judge))
        image_NCHW, _ = test_images(model, arguments.data, arguments.images)
        found = {strength: strong(model, image_NCHW, strength) for strength in STRENGTHS}
        rows += [f"| `{name}` | `{judge}` | {row}" for row in measured(model, other, image_NCHW, found)]
        pictures.append(drawn(image_NCHW, found))
    made = environment(0.0)
    sys.stdout.write("\n".join([HEADER, "|---" * 9 + "|", *rows, ""]))
    sys.stdout.write(f"\n{made['cpu']}, one thread, ONNX Runtime {made['onnxruntime']}, code {code_version()}.\n")
    Image.fromarray(np.hstack(pictures)).save(GALLERY, optimize=True)


def strong(model: Classifier, image_NCHW: np.ndarray, strength: float) -> list[Counterfactual]:
    """Return the counterfactuals of a strength."""
    view = model.view(model.input_shape)
    found: list[Counterfactual] = []
    for start in range(0, len(image_NCHW), BATCH):
        part = image_NCHW[start : start + BATCH]
        predictions = view.predict(part)
        nearest = counterfactuals(view, part, predictions, [None] * len(part))
        classes = [prediction.class_id for prediction in predictions]
        found += strengthen(view, part, classes, nearest, [strength] * len(part), len(model.labels))
    return found


def measured(
    model: Classifier, judge: Classifier, image_NCHW: np.ndarray, found: dict[float, list[Counterfactual]]
) -> list[str]:
    """Return a row for each strength, over the images that reached another class.

    Args:
        model: that found the counterfactuals.
        judge: another model of the same data.
        image_NCHW: the images.
        found: by strength.
    """
    nearest = found[1.0]
    reached = [n for n, one in enumerate(nearest) if one.reached]
    target_N = np.array([nearest[n].class_id for n in reached])
    distance_N = np.array([nearest[n].distance for n in reached])
    start_ND = image_NCHW[reached].reshape(len(reached), -1) * LEVELS
    nearest_NCHW = np.stack([nearest[n].pixels_CHW for n in reached]).astype(np.float64)
    rows = []
    for strength, ones in found.items():
        extended_ND = nearest_NCHW.reshape(len(reached), -1)
        if strength > 1.0:
            extended_ND = lowest_levels(start_ND, start_ND - extended_ND, LEVELS * strength * distance_N)
        pixels_NCHW = np.stack([ones[n].pixels_CHW for n in reached]).astype(np.float64)
        margins, shares = [], []
        for level_NCHW in (extended_ND.reshape(nearest_NCHW.shape), pixels_NCHW):
            margins.append(margin_to(logits_of(model.view(model.input_shape), level_NCHW), target_N).mean())
            shares.append((margin_to(logits_of(judge.view(judge.input_shape), level_NCHW), target_N) > 0.0).mean())
        ratio = np.mean([ones[n].distance for n in reached] / distance_N)
        rows.append(
            f"{strength:g} | {len(reached):,} | {ratio:.3f} | {margins[0]:.2f} | {margins[1]:.2f} | {shares[0]:.1%} | "
            f"{shares[1]:.1%} |"
        )
    return rows


def logits_of(view: View, level_NCHW: np.ndarray) -> np.ndarray:
    """Return the logits of images in units of 1 / 255."""
    parts = [view.classify(level_NCHW[n : n + BATCH] / LEVELS)[0] for n in range(0, len(level_NCHW), BATCH)]
    return np.concatenate(parts)


def margin_to(logits_NK: np.ndarray, class_id_N: np.ndarray) -> np.ndarray:
    """Return by how much the logit of a class exceeds all others."""
    row_N = np.arange(len(class_id_N))
    others_NK = logits_NK.copy()
    others_NK[row_N, class_id_N] = -np.inf
    return logits_NK[row_N, class_id_N] - others_NK.max(axis=1)


def drawn(image_NCHW: np.ndarray, found: dict[float, list[Counterfactual]]) -> np.ndarray:
    """Return evenly spaced images beside their counterfactuals, grey, one row each."""
    rows = np.linspace(0, len(image_NCHW) - 1, EXAMPLES + 2).astype(int)[1:-1]
    columns = [np.rint(255 * image_NCHW[rows, 0])] + [
        np.stack([found[strength][n].pixels_CHW[0] for n in rows]) for strength in DRAWN
    ]
    side = image_NCHW.shape[-1] * SCALE + GAP
    sheet = Image.new("L", (side * len(columns) + 3 * GAP, TOP + side * EXAMPLES), 255)
    pen = ImageDraw.Draw(sheet)
    for place, (title, column) in enumerate(zip(("image", *map("{:g}".format, DRAWN)), columns, strict=True)):
        pen.text((place * side + GAP, 0), title, fill=0)
        for n, picture in enumerate(column.astype(np.uint8)):
            large = np.kron(picture, np.ones((SCALE, SCALE), np.uint8))
            sheet.paste(Image.fromarray(large), (place * side, TOP + n * side))
    return np.asarray(sheet)


if __name__ == "__main__":
    main()
