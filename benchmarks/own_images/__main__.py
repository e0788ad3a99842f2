"""`python -m benchmarks.own_images --data DIR --out DIR [--sets SET ...]`: certified training beside a small network.

DIR holds the folders that `python -m benchmarks.own_images.sets` makes, or any others of the same layout. For each:
`lipcert train FOLDER` without an option, then the network of `cnn.py` on the pixels that the certified model takes, the
same once more for as long as the certified training took, and on the images as they are where these are larger. Rows
are printed as they are measured; `--write` puts them into `benchmarks/OWN_IMAGES.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image, UnidentifiedImageError

from benchmarks.own_images.cnn import EPOCHS, Score, accuracies, fit
from benchmarks.soundness.document import table
from models.data.folders import load_folder
from models.data.labelled import DataSet
from models.export import code_version, environment
from models.recipes import DataOptions
from service.artefact.card import read_card

FILE = Path(__file__).resolve().parent.parent / "OWN_IMAGES.md"
HEADER = (
    "set",
    "network",
    "pixels",
    "training images",
    "accuracy, %",
    "balanced, %",
    "certified, %",
    "wall, min",
    "epochs",
)
TEXT = """\
# Own images

`lipcert train FOLDER` without an option beside an ordinary network: three blocks of a 3 x 3 convolution, BatchNorm, \
ReLU and maximum, a global maximum, one dense layer. Both are tested on the same images. *Balanced* is the mean of the \
classes' accuracies, *certified* the share of test images that are classified right with a proved L2 radius above \
epsilon, pixels in [0, 1]. The wall time of `lipcert train` is that of the whole command, from the files to the \
measured artefact; of the others, that of the training.
"""


def certify(folder: Path, out: Path, threads: int) -> tuple[str | None, float]:
    """Run `lipcert train` with its log beside the artefact; return the reason where it failed, and its minutes."""
    command = [sys.executable, "-m", "lipcert", "train", str(folder), "--out", str(out)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = time.monotonic()
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    minutes = (time.monotonic() - started) / 60
    (out / f"{folder.name}.log").write_text(ended.stdout + ended.stderr, encoding="utf-8")
    words = (ended.stderr.strip() or "no message").splitlines()[-1].replace(str(folder), folder.name)
    return (f"failed: {words}" if ended.returncode else None), minutes


def pixels_of(folder: Path, shape: tuple[int, int, int] | None) -> DataSet:
    """The readable images of a folder in the shape C, H, W; by default in the shape that the trainer gives them."""
    options = {} if shape is None else {"channels": shape[0], "image_size": shape[1:]}
    return load_folder(folder, DataOptions.model_validate({"dataset": "image-folder", "skip_broken": True, **options}))


def shape_of_files(folder: Path) -> tuple[int, int]:
    """Height and width of the first image of the folder that can be read."""
    for file in sorted(folder.glob("train/*/*")):
        with contextlib.suppress(UnidentifiedImageError), Image.open(file) as image:
            return image.height, image.width
    raise SystemExit(f"no image in {folder}/train/<class> can be read: make the set again")


def predicted(artefact: Path, images_NCHW: torch.Tensor) -> torch.Tensor:
    """The classes, N, that the network of an artefact gives 8-bit images; one output is positive for class 0."""
    session = onnxruntime.InferenceSession(artefact / "model.onnx", providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    kind = np.float64 if source.type == "tensor(double)" else np.float32
    logits = [
        np.asarray(session.run(None, {source.name: images.numpy().astype(kind) / 255})[0])
        for images in images_NCHW.split(64)
    ]
    logits_NK = torch.from_numpy(np.concatenate(logits))
    return logits_NK.argmax(1) if logits_NK.shape[1] > 1 else (logits_NK[:, 0] <= 0).long()


def rows_of(folder: Path, out: Path, threads: int) -> Iterator[tuple[object, ...]]:
    """Measure one set; yield the cells of each row of the table."""
    failure, minutes = certify(folder, out, threads)
    if failure is not None:
        yield (folder.name, "certified", failure, *[None] * 4, f"{minutes:.1f}", None)
        data = pixels_of(folder, None)
    else:
        card = read_card(out / folder.name)
        data = pixels_of(folder, card.input.shape)
        accuracy, balanced = accuracies(predicted(out / folder.name, data.test.images_NCHW), data.test.labels_N)
        measured = f"{100 * accuracy:.1f}"
        if card.accuracy is not None and abs(accuracy - card.accuracy) > 1 / len(data.test):
            measured += f" (its card: {100 * card.accuracy:.1f})"
        shares = ", ".join(f"{100 * share.value:.1f} at {share.epsilon:g}" for share in card.certified_accuracy)
        cells = (measured, f"{100 * balanced:.1f}", shares, f"{minutes:.1f}", None)
        yield (*_subject(folder, "certified", data), *cells)
    score = fit(data)
    yield _row(folder, "ordinary", data, score)
    if failure is None:
        epochs = max(1, round(60 * minutes * score.epochs / score.wall_seconds))
        yield _row(folder, "ordinary, as long", data, fit(data, epochs=epochs))
    _, channels, *size = data.train.images_NCHW.shape
    height, width = shape_of_files(folder)
    if size != [height, width]:
        whole = pixels_of(folder, (channels, height, width))
        yield _row(folder, "ordinary", whole, fit(whole))


def _subject(folder: Path, network: str, data: DataSet) -> tuple[str, str, str, str]:
    n, channels, height, width = data.train.images_NCHW.shape
    return folder.name, network, f"{channels} x {height} x {width}", str(n)


def _row(folder: Path, network: str, data: DataSet, score: Score) -> tuple[object, ...]:
    return (
        *_subject(folder, network, data),
        f"{100 * score.accuracy:.1f}",
        f"{100 * score.balanced_accuracy:.1f}",
        None,
        f"{score.wall_seconds / 60:.1f}",
        score.epochs,
    )


def main() -> None:
    """Measure the sets, print the rows and on request write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder for each set")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefacts")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="default: all of --data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both trainings (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    arguments = parser.parse_args()
    names = arguments.sets or sorted(path.parent.name for path in arguments.data.glob("*/train"))
    missing = [name for name in names if not (arguments.data / name / "train").is_dir()]
    if missing or not names:
        parser.error(
            f"{arguments.data} has no set {', '.join(missing)}: python -m benchmarks.own_images.sets makes them"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    # Before anything is written: the file that is written is part of the tree.
    code, rows = code_version(), []
    sys.stdout.write(table(HEADER, rows) + "\n")
    for name in names:
        for row in rows_of(arguments.data / name, arguments.out, arguments.threads):
            rows.append(row)
            sys.stdout.write(table(HEADER, [row]).splitlines()[-1] + "\n")
            sys.stdout.flush()
    if arguments.write:
        made = environment(0.0)
        chosen = f" --sets {' '.join(names)}" if arguments.sets else ""
        command = f"python -m benchmarks.own_images --data DIR --out DIR{chosen} --threads {arguments.threads} --write"
        provenance = (
            f"`{command}`, code {code}. {made['cpu']}, {os.cpu_count()} logical CPUs, {arguments.threads} thread(s); "
            f"Python {made['python']}, torch {made['torch']}. The ordinary network has {EPOCHS} epochs, *as long* as "
            "many as fit into the time of `lipcert train`."
        )
        FILE.write_text(f"{TEXT}\n{provenance}\n\n{table(HEADER, rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
