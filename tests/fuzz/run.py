"""Fuzz the targets of `targets.py` with Atheris, coverage-guided, one after the other, each in a process of its own.

`python tests/fuzz/run.py [TARGET ...] [--seconds 60] [--merge]`: starts from the corpus in `corpus/TARGET.zip`; inputs
that reach new code go to `build/fuzz/TARGET`, inputs that raise to `build/fuzz/defects`. `--merge` writes the corpus
again: of all inputs, the fewest and shortest that reach the same code. Exit status 1: a target has raised.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CORPUS = HERE / "corpus"
BUILD = ROOT / "build" / "fuzz"
NAMES = (
    "predict-json", "predict-batch", "infer", "form", "query", "npy", "image", "tiff-image", "network", "card",
    "archived-answer",
)  # fmt: skip
"""As in `targets.TARGETS`, whose import must be instrumented."""
LONGEST_INPUT = 8192
"""Bytes; the seeds of images and models are shorter."""
_SLOWEST_S = 30
_MEMORY_MB = 2048
_TARGET = "FUZZED_TARGET"
_DATE = (1980, 1, 1, 0, 0, 0)


def main() -> int:
    """Run the command line; return the exit status."""
    if _TARGET in os.environ:
        fuzz(os.environ[_TARGET])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--merge", action="store_true", help="write the corpus again, and search for nothing")
    chosen = parser.parse_args()
    unknown = set(chosen.targets) - set(NAMES)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; choose among {', '.join(NAMES)}")
    run = merge if chosen.merge else search
    return max(run(name, chosen.seconds) for name in chosen.targets or NAMES)


def fuzz(name: str) -> None:
    """Run libFuzzer in this process, with the options of its command line, and end it."""
    import atheris

    # A defect shows as status 500, and refusals by the thousand are nothing to log.
    logging.disable(logging.CRITICAL)
    # The libraries that read what a client sent.
    with atheris.instrument_imports(include=["service", "PIL", "python_multipart"]):
        sys.path[:0] = [str(ROOT), str(HERE)]
        from targets import TARGETS
    # To merge, libFuzzer calls its first argument by a shell.
    atheris.Setup([f"{sys.executable} {__file__}", *sys.argv[1:]], TARGETS[name])
    atheris.Fuzz()


def search(name: str, seconds: int) -> int:
    """Fuzz one target and print one line; return 1 if it has raised."""
    folder, defects = unpack(name), BUILD / "defects"
    defects.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={defects}/{name}-", f"-max_len={LONGEST_INPUT}"]
    done = _inside(
        name, [*options, f"-timeout={_SLOWEST_S}", f"-rss_limit_mb={_MEMORY_MB}", "-print_final_stats=1", str(folder)]
    )
    executed = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    print(f"{name}: {executed[1] if executed else '?'} inputs, status {done.returncode}", flush=True)
    if done.returncode:
        print(done.stderr[-6000:])
    return int(done.returncode != 0)


def merge(name: str, seconds: int) -> int:
    """Reduce the corpus of one target and what was found to the inputs that reach its code; return 0."""
    del seconds
    found, kept = unpack(name), BUILD / "kept" / name
    kept.mkdir(parents=True, exist_ok=True)
    _inside(name, ["-merge=1", f"-max_len={LONGEST_INPUT}", str(kept), str(found)]).check_returncode()
    pack(name, {path.name: path.read_bytes() for path in kept.iterdir()})
    return 0


def unpack(name: str) -> Path:
    """Return a folder with the corpus of a target and the inputs of earlier searches."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in read_corpus(name).items():
        (folder / file).write_bytes(data)
    return folder


def read_corpus(name: str) -> dict[str, bytes]:
    """Return the inputs of a target by their names."""
    with zipfile.ZipFile(CORPUS / f"{name}.zip") as archive:
        return {file: archive.read(file) for file in archive.namelist()}


def pack(name: str, inputs: dict[str, bytes]) -> None:
    """Write the corpus of a target; equal inputs give equal bytes."""
    CORPUS.mkdir(exist_ok=True)
    with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(inputs):
            archive.writestr(zipfile.ZipInfo(file, _DATE), inputs[file], zipfile.ZIP_DEFLATED, 9)


def _inside(name: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    # In the environment, because libFuzzer starts itself again with other options.
    environment = {**os.environ, _TARGET: name}
    command = [sys.executable, __file__, *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", check=False
    )


if __name__ == "__main__":
    sys.exit(main())
