"""Put the authors' library and lipcert side by side: `python -m benchmarks.side_by_side.compare DIR --data DATA`.

`DIR/authors` is what `authors.py` wrote, `DIR/ours` what `ours.py` wrote. Every file goes through the same certifier,
the same evaluation of the whole test set and the same attacks. `--write` puts the sections into
`benchmarks/SIDE_BY_SIDE.md`; with `--only NAME` the other one stays as it is. What the attacks found is kept in
`DIR/.partial`, so that an interrupted run goes on.

Axes: N images, K classes, M attacked images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64

from benchmarks.side_by_side import in_torch
from benchmarks.side_by_side.contender import Contender
from benchmarks.soundness import document
from benchmarks.soundness.document import table
from models import attacks
from models.datasets import PUBLISHED, load_dataset
from models.export import code_version
from models.partial import PartialResults
from models.recipes import DataOptions

FILE = Path(__file__).resolve().parent.parent / "SIDE_BY_SIDE.md"
N_ATTACK = 500
INSIDE = 1 - 1e-9
"""Below this share of a claimed radius an image of another class counts as a refutation."""
SQRT2 = math.sqrt(2.0)


@dataclass(frozen=True)
class Comparison:
    """One data set."""

    name: str
    title: str
    options: DataOptions
    epsilons: tuple[float, ...]
    authors: tuple[str, ...]
    """Of `authors.SETTINGS`."""
    ours: tuple[str, ...]
    """Recipes."""
    claims: Mapping[str, float]
    """What the library's documents divide the margin by -> in words."""


COMPARISONS = (
    Comparison(
        name="mnist-0-8",
        title="MNIST, 0 against 8",
        options=DataOptions(dataset="mnist", classes=("0", "8")),
        epsilons=(0.3, 1.0, 1.58),
        authors=("mnist-0-8-notebook", "mnist-0-8-tuned"),
        ours=("mnist-0-8",),
        claims={"margin / 2": 2.0},
    ),
    Comparison(
        name="fashion-mnist",
        title="Fashion-MNIST",
        options=DataOptions(dataset="fashion-mnist"),
        epsilons=(0.1, 0.25, 0.5, 1.0, 1.58),
        authors=("fashion-mnist-notebook", "fashion-mnist-tuned-accurate", "fashion-mnist-tuned-robust"),
        ours=("fashion-mnist-accurate", "fashion-mnist-robust"),
        claims={"margin / 2": 2.0, "margin / sqrt(2)": SQRT2},
    ),
)


@dataclass(frozen=True)
class Result:
    """What was measured on one file."""

    name: str
    made: Mapping[str, Any]
    """`run.json`."""
    parameters: int
    lipschitz_bound: float
    margin_bound: float
    """The largest over pairs of classes."""
    margin_N: Float64[np.ndarray, " N"]
    """Largest logit less the second."""
    right_N: Bool[np.ndarray, " N"]
    radius_N: Float64[np.ndarray, " N"]
    """Proved."""
    attacked_M: np.ndarray
    distance_M: Float64[np.ndarray, " M"]
    """To the nearest image of another class that any attack found."""

    @property
    def clean(self) -> float:
        return float(self.right_N.mean())

    def certified(self, epsilon: float) -> float:
        """Share of the test set that is right with a proved radius above epsilon."""
        return float((self.right_N & (self.radius_N > epsilon)).mean())

    def claimed(self, divisor: float, epsilon: float) -> float:
        """The same if the radius were the margin over `divisor`."""
        return float((self.right_N & (self.margin_N / divisor > epsilon)).mean())

    def robust(self, epsilon: float) -> float:
        """Share of the attacked images that are right and of which no attack found another class within epsilon."""
        return float((self.right_N[self.attacked_M] & (self.distance_M > epsilon)).mean())

    def excess(self, divisor: float) -> float:
        """Largest claimed radius / proved radius, over certified images."""
        certified_N = self.radius_N > 0
        return float((self.margin_N[certified_N] / divisor / self.radius_N[certified_N]).max(initial=0.0))

    def refuted(self, divisor: float) -> int:
        """Attacked images that got another class inside the claimed radius."""
        return int((self.distance_M < INSIDE * self.margin_N[self.attacked_M] / divisor).sum())

    @property
    def tightness(self) -> float:
        """Median of proved radius / distance, over certified images that were flipped."""
        radius_M = self.radius_N[self.attacked_M]
        kept_M = (radius_M > 0) & np.isfinite(self.distance_M)
        return float(np.median(radius_M[kept_M] / self.distance_M[kept_M])) if kept_M.any() else math.nan


def margins(logits_NK: Float64[np.ndarray, "N K"]) -> Float64[np.ndarray, " N"]:
    """Largest logit less the second; `(f, -f)` gives `2 |f|`."""
    ordered_NK = np.sort(logits_NK, axis=1)
    return ordered_NK[:, -1] - ordered_NK[:, -2]


def spread(wanted: int, available: int) -> np.ndarray:
    """Indices of so many images, evenly spaced."""
    wanted = min(wanted, available)
    return np.arange(wanted) * available // wanted


def measure(
    model: Path, made: Mapping[str, Any], labels: tuple[str, ...], data: Any, n_attack: int, keep: PartialResults
) -> Result:
    """One file through certifier, test set and attacks.

    Raises:
        CertificateRefutedError: an attack refuted the proof.
    """
    contender = Contender(model, labels)
    image_NCHW = data.test.pixels(torch.float64).numpy()
    logits_NK, radii = contender.classify(image_NCHW)
    attacked_M = spread(n_attack, len(image_NCHW))
    found = attacks.run_attacks(contender, image_NCHW[attacked_M], keep=keep, settings=_settings())
    print(f"{made['name']}: attacked", flush=True)
    return Result(
        name=made["name"],
        made=made,
        parameters=contender.parameters,
        lipschitz_bound=contender.certificate.lipschitz_bound,
        margin_bound=float(contender.certificate.margin_bounds_KK.max()),
        margin_N=margins(logits_NK),
        right_N=radii.class_id_N == data.test.labels_N.numpy(),
        radius_N=radii.radius_N,
        attacked_M=attacked_M,
        distance_M=attacks.union(found).distance_N,
    )


def _settings() -> dict[str, Any]:
    """What kept results of attacks depend on besides file, images and attack."""
    sources = (Path(in_torch.__file__), Path(attacks.__file__))
    code = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in sources)).hexdigest()
    return {"code": code, "torch": torch.__version__, "numpy": np.__version__}


def percent(share: float) -> str:
    """With two decimals, as the reports of artefacts."""
    return f"{100 * share:.2f}"


def up(bound: float, digits: int) -> str:
    """Rounded up: a bound must not look smaller than it is."""
    return f"{math.ceil(bound * 10**digits) / 10**digits:.{digits}f}"


def rows_of_accuracy(results: Sequence[Result], epsilons: Sequence[float]) -> str:
    """Clean and certified accuracy on the whole test set, and what each took."""
    header = ["", "clean", *(f"certified {epsilon:g}" for epsilon in epsilons), "core s", "clock s", "numbers", "K <="]
    return table(
        header,
        [
            [
                result.name,
                percent(result.clean),
                *(percent(result.certified(epsilon)) for epsilon in epsilons),
                f"{result.made['processor_seconds']:.0f}",
                f"{result.made['seconds']:.0f}",
                f"{result.parameters:,}",
                up(result.margin_bound, 6),
            ]
            for result in results
        ],
    )


def rows_of_attacks(results: Sequence[Result], epsilons: Sequence[float]) -> str:
    """Robust accuracy under the union of the attacks."""
    header = ["", "n", *(f"not flipped {epsilon:g}" for epsilon in epsilons), "radius / distance"]
    return table(
        header,
        [
            [
                result.name,
                len(result.attacked_M),
                *(percent(result.robust(epsilon)) for epsilon in epsilons),
                f"{result.tightness:.3f}",
            ]
            for result in results
        ],
    )


def rows_of_claims(results: Iterable[Result], claims: Mapping[str, float], epsilons: Sequence[float]) -> str:
    """The library's own radii beside the proved one."""
    header = ["", "radius", *(f"at {epsilon:g}" for epsilon in epsilons), "claimed / proved <=", "refuted"]
    rows: list[list[object]] = []
    for result in results:
        rows.append(
            [
                result.name,
                "proved",
                *(percent(result.certified(epsilon)) for epsilon in epsilons),
                "-",
                f"0 of {len(result.attacked_M)}",
            ]
        )
        for words, divisor in claims.items():
            shares = (percent(result.claimed(divisor, epsilon)) for epsilon in epsilons)
            rows.append(
                [
                    "",
                    words,
                    *shares,
                    up(result.excess(divisor), 6),
                    f"{result.refuted(divisor)} of {len(result.attacked_M)}",
                ]
            )
    return table(header, rows)


def best(results: Sequence[Result], epsilon: float | None) -> Result:
    """Of one side, at one radius; None is clean accuracy."""
    return max(results, key=lambda result: result.clean if epsilon is None else result.certified(epsilon))


def rows_of_differences(theirs: Sequence[Result], ours: Sequence[Result], epsilons: Sequence[float]) -> str:
    """The best of each side at each radius."""
    rows: list[list[object]] = []
    for epsilon in (None, *epsilons):

        def value(result: Result, epsilon: float | None = epsilon) -> float:
            return result.clean if epsilon is None else result.certified(epsilon)

        notebook, own = best(theirs[:1], epsilon), best(ours, epsilon)
        tuned = best(theirs[1:], epsilon) if len(theirs) > 1 else None
        rows.append(
            [
                "clean" if epsilon is None else f"certified {epsilon:g}",
                percent(value(notebook)),
                "not trained" if tuned is None else f"{percent(value(tuned))} ({tuned.name})",
                f"{percent(value(own))} ({own.name})",
                f"{100 * (value(own) - value(notebook)):+.2f}",
                "-" if tuned is None else f"{100 * (value(own) - value(tuned)):+.2f}",
            ]
        )
    return table(["", "notebook", "best tuned", "best of ours", "against notebook", "against tuned"], rows)


def rows_of_settings(results: Iterable[Result]) -> str:
    """How the authors' rows were trained."""
    rows: list[list[object]] = []
    for result in results:
        made = result.made["setting"]
        options = ", ".join(f"{key} {value:.6g}" for key, value in made["options"].items())
        rate = f"{made['learning_rate']:g}, {made['schedule']}"
        mirror = ", mirrored" if made["mirror"] else ""
        epochs = f"{result.made['epochs']:.1f}"
        rows.append(
            [result.name, made["network"], f"{made['loss']}({options})", f"{made['batch_size']}{mirror}", rate, epochs]
        )
    return table(["", "network", "loss", "batch", "Adam's rate", "epochs"], rows)


def section(comparison: Comparison, theirs: Sequence[Result], ours: Sequence[Result]) -> str:
    """One data set."""
    epsilons = comparison.epsilons
    n = len(ours[0].right_N)
    parts = [
        f"## {comparison.title}",
        f"Test set, n = {n}; shares in %. `core s`: processor seconds on one thread; `clock s`: of the clock, of the "
        "training alone; `K`: the largest proved Lipschitz bound of the difference of two logits.",
        rows_of_accuracy([*theirs, *ours], epsilons),
        "The best of each side at each radius, differences in points:",
        rows_of_differences(theirs, ours, epsilons),
        "Attacked images (evenly spaced in the test set): right, and given no other class within epsilon by any of "
        f"{', '.join(attacks.ATTACKS)}. `radius / distance`: median over certified images that were flipped.",
        rows_of_attacks([*theirs, *ours], epsilons),
        "The library's claims about the same files. `claimed / proved`: the largest over certified images. `refuted`: "
        "attacked images that were given another class inside the claimed radius.",
        rows_of_claims(theirs, comparison.claims, epsilons),
        "How the library's rows were trained:",
        rows_of_settings(theirs),
        f"Recipes of lipcert, code {ours[0].made['code_version']}, each with `--set schedule.epochs=E` alone: "
        + "; ".join(f"`{result.name}` E = {result.made['epochs']}" for result in ours)
        + ".",
    ]
    return "\n\n".join(parts)


TITLE = "# Side by side with the authors' library\n"
INTRODUCTION = """
deel-torchlip is the library of the authors of the hKR loss. Both sides get the same training images and the same time:
processor seconds of one thread (`core s`). Theirs are counted in the training loop alone, ours over the whole command
`python -m models train`. Seconds of the clock (`clock s`) are more by what others took of the machine at that moment.
Then every ONNX file, float64 on both sides, goes through one certifier (`service.certificate`), one evaluation
(`benchmarks/side_by_side/in_torch.py`, compared with ONNX Runtime where that has the kernels) and one set of attacks
(`models.attacks`). Seed 0, one run each.

Rows `notebook`: networks and losses of the library's notebooks (`docs/notebooks` of its repository), for this time
instead of a number of epochs. The notebook on Fashion-MNIST takes batches of 4096; here they are of 256, sixteen
times as many steps of an epoch. Its versions differ in the head: unit rows, as here, or orthogonal ones. Rows
`tuned`: set after thirteen short trainings (20 to 60 s) that were judged on held-out training images: the notebooks'
networks and dense ones of up to 512 columns; hKR, soft and log-sum-exp hKR and cross-entropy with a temperature;
margins from 0.1 to 4; rates that stay and that fall.

`margin / 2` follows from what the library says of its layers: a body of constant 1 and a head whose rows have norm 1
each, or one output f, whose radius is |f|. It holds up to the accuracy of the library's iterations and in exact
arithmetic. `margin / sqrt(2)` holds only where all logits together are 1-Lipschitz, which such a head does not make
them (orthogonal rows would). The proved radius divides each margin by the bound of its own pair of logits, and covers
rounding.
"""


def files_of(comparison: Comparison, folder: Path) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """Graphs of both sides, each with what is noted about its training; what was not trained is left out.

    Raises:
        SystemExit: a side has none.
    """
    theirs, ours = folder / "authors", folder / "ours"
    sides = (
        [(theirs / name / "model.onnx", theirs / name / "run.json") for name in comparison.authors],
        [(ours / name / "model.onnx", ours / f"{name}.run.json") for name in comparison.ours],
    )
    for side in sides:
        if not any(record.is_file() for _, record in side):
            raise SystemExit(f"{side[0][1]} is missing: run authors.py and ours.py first, as `make side-by-side` does")
    theirs_made, ours_made = ([pair for pair in side if pair[1].is_file()] for side in sides)
    return theirs_made, ours_made


def origin(made: Mapping[str, Any], code: str) -> str:
    """What made the figures of a section."""
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"Trained by {made['library']} with {versions}. {document.provenance('make side-by-side', code)}"


def write(sections: Mapping[str, str], file: Path = FILE) -> None:
    """Replace these sections; others stay."""
    if not file.exists():
        file.write_text(TITLE, encoding="utf-8")
    for name, text in {"introduction": INTRODUCTION, **sections}.items():
        document.write_section(name, "side-by-side", text, file)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="with mnist/ and fashion-mnist/")
    parser.add_argument("--n-attack", type=int, default=N_ATTACK, metavar="N", help="attacked images of each file")
    names = [comparison.name for comparison in COMPARISONS]
    parser.add_argument("--only", choices=names, action="append", help="leave the others out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/SIDE_BY_SIDE.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Before anything is written: the file that is written is part of the tree.
    code = code_version()
    keep = PartialResults(arguments.folder / ".partial")
    sections: dict[str, str] = {}
    for comparison in COMPARISONS:
        if arguments.only and comparison.name not in arguments.only:
            continue
        data = load_dataset(comparison.options, arguments.data, test_only=True)
        labels = comparison.options.classes or PUBLISHED[comparison.options.dataset].labels
        theirs, ours = (
            [
                measure(model, json.loads(record.read_text(encoding="utf-8")), labels, data, arguments.n_attack, keep)
                for model, record in files
            ]
            for files in files_of(comparison, arguments.folder)
        )
        sections[comparison.name] = f"{section(comparison, theirs, ours)}\n\n{origin(theirs[0].made, code)}"
        print(sections[comparison.name], flush=True)
    if arguments.write:
        write(sections)


if __name__ == "__main__":
    sys.exit(main())
