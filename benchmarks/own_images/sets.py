"""Folders of images as a user brings them: `DIR/<set>/train/<class>/*.png` and `DIR/<set>/test/<class>/*.png`.

`python -m benchmarks.own_images.sets --out DIR [SET ...]` makes them. Each set has its own seed, so its files depend
neither on the other sets nor on the order. The pixels are 8-bit.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.own_images.pictures import casting, shape, texture

PHOTOGRAPHS = {"gravel": "gravel.png", "grass": "grass.png", "brick": "brick.png", "tissue": "ihc.png"}
"""Texture to the photograph of 512 x 512 pixels that it is cut out of, from the most frequent to the rarest."""
TEXTURES = {"gravel": 300, "grass": 150, "brick": 90, "tissue": 60}
"""Number of images, train and test together."""
TRAINING_COLUMNS = 336
"""Columns of a photograph, from the left, that training images are cut out of; test images lie right of them."""
SHAPES = ("circle", "cross", "ring", "square", "triangle")


@dataclass(frozen=True)
class Sources:
    """Where the images come from that are not drawn."""

    malaria: Path = Path("data/malaria-cells")
    """Folder with `train/<class>/*.png` and `test/<class>/*.png`."""
    photographs: Path | None = None
    """Folder of the photographs; by default that of the package scikit-image."""
    scale: float = 1.0
    """Share of the images of each class that is made, rounded; tests make tiny sets."""

    def number(self, images: int) -> int:
        """How many of so many images are made, at least one."""
        return max(1, round(self.scale * images))


def malaria(folder: Path, sources: Sources) -> None:
    """Blood cells, 50 x 50 grey: 1,000 training images spread over those of the published set, all its test images."""
    for label in ("parasitized", "uninfected"):
        for part, wanted in (("train", 500), ("test", None)):
            files = sorted((sources.malaria / part / label).glob("*.png"))
            if not files:
                raise SystemExit(f"{sources.malaria / part / label} has no images: name the folder with --malaria")
            number = sources.number(wanted or len(files))
            (folder / part / label).mkdir(parents=True)
            for n in range(number):
                file = files[n * len(files) // number]
                shutil.copyfile(file, folder / part / label / file.name)


def textures(folder: Path, sources: Sources) -> None:
    """Four real textures, 128 x 128 RGB, 450 and 150 images, up to five times as many of one as of another.

    Brightness, contrast and tint are random and the same for all four: only the structure tells them apart.
    """
    photographs = sources.photographs or _bundled_photographs()
    for k, (label, images) in enumerate(TEXTURES.items()):
        with Image.open(photographs / PHOTOGRAPHS[label]) as photograph:
            grey_HW = np.asarray(photograph.convert("L"), dtype=np.float64)
        n_test = sources.number(images // 4)
        for part, number, region_HW in (
            ("train", max(1, sources.number(images) - n_test), grey_HW[:, :TRAINING_COLUMNS]),
            ("test", n_test, grey_HW[:, TRAINING_COLUMNS:]),
        ):
            rng = np.random.default_rng([k, part == "test"])
            for n in range(number):
                _write(folder / part / label / f"{n:03}.png", texture(region_HW, rng))


def textures_broken(folder: Path, sources: Sources) -> None:
    """The textures, with seven files in `train` that are no images."""
    textures(folder, sources)
    train = folder / "train"
    for label in TEXTURES:
        content = (train / label / "000.png").read_bytes()
        (train / label / "cut-off.png").write_bytes(content[: len(content) // 2])
    (train / "gravel" / "only-the-head.png").write_bytes((train / "tissue" / "000.png").read_bytes()[:40])
    (train / "grass" / "empty.png").write_bytes(b"")
    (train / "brick" / "notes.jpg").write_text("take these pictures again in better light\n")


def castings(folder: Path, sources: Sources) -> None:
    """Grey surfaces, 224 x 224 RGB: 500 sound, 140 with a bright scratch 2 to 3 pixels wide; for test 100 and 100."""
    for k, (label, n_train) in enumerate({"scratched": 140, "sound": 500}.items()):
        for part, number in (("train", n_train), ("test", 100)):
            rng = np.random.default_rng([k, part == "test"])
            for n in range(sources.number(number)):
                _write(folder / part / label / f"{n:03}.png", casting(rng, scratched=label == "scratched"))


def digits(folder: Path, sources: Sources) -> None:
    """The handwritten digits of scikit-learn, 8 x 8 grey, 10 classes; every fifth image of a class is for test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the set digits needs scikit-learn: pip install scikit-learn") from error
    pixels_ND, labels_N = (np.asarray(values) for values in load_digits(return_X_y=True))
    for label in range(10):
        images_NHW = pixels_ND[labels_N == label].reshape(-1, 8, 8)
        for n, image_HW in enumerate(images_NHW if sources.scale == 1 else images_NHW[: 5 * sources.number(30)]):
            part = "test" if n % 5 == 4 else "train"
            _write(folder / part / str(label) / f"{n:03}.png", np.rint(image_HW * 255 / 16))


def shapes(folder: Path, sources: Sources) -> None:
    """Five drawn shapes, 96 wide and 72 high, RGB: 100 training and 40 test images of each."""
    for k, label in enumerate(SHAPES):
        for part, number in (("train", 100), ("test", 40)):
            rng = np.random.default_rng([k, part == "test"])
            for n in range(sources.number(number)):
                _write(folder / part / label / f"{n:03}.png", shape(label, rng))


SETS: dict[str, Callable[[Path, Sources], None]] = {
    "malaria": malaria,
    "textures": textures,
    "textures-broken": textures_broken,
    "castings": castings,
    "digits": digits,
    "shapes": shapes,
}


def make_set(name: str, out: Path, sources: Sources) -> Path:
    """Make one set in its folder below `out`, unless it is there; return the folder."""
    if (out / name).exists():
        return out / name
    unfinished = out / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    SETS[name](unfinished, sources)
    return unfinished.rename(out / name)


def _bundled_photographs() -> Path:
    # The package is located, not imported: its photographs are all that is needed.
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("the set textures is cut out of photographs of scikit-image: pip install scikit-image")
    return Path(package.origin).parent / "data"


def _write(path: Path, pixels: np.ndarray) -> None:
    """Write H x W (grey) or H x W x 3 (RGB) values of [0, 255], rounded and clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).save(path)


def main() -> None:
    """Make the sets that are named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"some of {', '.join(SETS)}")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder for each set")
    parser.add_argument("--malaria", type=Path, default=Sources.malaria, help="folder of the blood cells")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sets) - set(SETS))
    if unknown:
        parser.error(f"no set {', '.join(unknown)}; there are {', '.join(SETS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets or SETS:
        sys.stdout.write(f"{make_set(name, arguments.out, Sources(arguments.malaria))}\n")


if __name__ == "__main__":
    main()
