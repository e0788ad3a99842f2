"""`python -m benchmarks.soundness [SECTION ...] --data DIR [--write]`: attack the shipped models as they are served.

Sections: `boundary` (the nearest points of another class that can be found from test images of each
shipped classifier), `planted` (the same
with huge biases planted in the hidden layers), `known` (networks whose distance to the boundary is known exactly),
`invariance` (batches, threads, graph optimisation), `times` (of the analysis) and `loss` (of radius to `logit_error`).
Without a section all of them run. `--write` puts each into `benchmarks/SOUNDNESS.md`; the command fails where a
promise is broken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.soundness import document, nearest, sections
from models.export import code_version

ROOT = Path(__file__).resolve().parent.parent.parent
SECTIONS: dict[str, Callable[[argparse.Namespace], sections.Section]] = {
    "boundary": nearest.boundary_search,
    "planted": sections.planted_biases,
    "known": sections.known_distances,
    "invariance": sections.invariance,
    "times": sections.analysis_times,
    "loss": sections.radius_lost,
}


def main() -> None:
    """Run the sections, print them, and on request write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="of the section boundary; default: all")
    parser.add_argument("--zoo", type=Path, default=ROOT / "models" / "zoo", help="folder of the artefacts")
    parser.add_argument("--images", type=int, default=500, help="test images of each model that are searched from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"write the sections of {document.FILE.name}")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    # Threads that spin for each other are slower than one.
    torch.set_num_threads(1)
    # Before anything is written: the file that is written is part of the tree.
    code = code_version()
    broken = 0
    for name in arguments.sections or SECTIONS:
        started = time.monotonic()
        section = SECTIONS[name](arguments)
        made = document.provenance(
            f"python -m benchmarks.soundness {name} --images {arguments.images} --seed {arguments.seed}", code
        )
        text = f"{section.text.rstrip()}\n\n{made} {time.monotonic() - started:.0f} s.\n"
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        broken += section.violations
        if arguments.write:
            document.write_section(name, "soundness", text)
    if broken:
        raise SystemExit(f"{broken} promises are broken; the tables above say which")


if __name__ == "__main__":
    main()
