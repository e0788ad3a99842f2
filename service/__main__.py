"""Command line of the service: `python -m service` serves the models of `LIPCERT_MODELS` over HTTP; settings in
`service.settings`.

`python -m service audit ANSWER.json IMAGE --model ARTEFACT`: audit an archived answer, see docs/audit.md.

`python -m service evidence ARTEFACT --out DIR`: write the evidence folder of an artefact, see docs/evidence.md.

Exit status: 0 stopped on request, the answer holds, or the second program accepts the folder; 1 a model, the provider
or the port is not available, or the answer does not hold; 2 a setting, the command, a file to be audited or DIR is not
valid; 3 the audit is undecided, or the second program refuses the folder; 70 the GPU was lost while serving.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import logging
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import FrameType

from service.artefact.pool import VerifierPool
from service.errors import KeptError, LipcertError, SettingsError
from service.processes.serving import run_server
from service.runtime.cpus import usable_cpus

_log = logging.getLogger("service")

_RETRY_S = 0.005
"""Time after which a signal during the import of an extension module is handled again."""


def main(arguments: Sequence[str] | None = None, program: str = "python -m service") -> int:
    """Run a command; without one, serve. Return the exit status."""
    chosen = _parser(program).parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        return chosen.run(chosen)
    except (SettingsError, KeptError) as error:
        _log.error("%s", error)
        return 2
    except LipcertError as error:
        _log.error("%s", error)
        return 1


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Serve certified classifiers; audit their answers; write evidence."
    )
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    serve = "Serve the models of LIPCERT_MODELS over HTTP; the default command."
    commands.add_parser("serve", help=serve, description=serve).set_defaults(run=_serve)
    audit = commands.add_parser(
        "audit",
        help="Audit an archived answer.",
        description="Derive class and certified radius of one answer of POST /predict a second time, in ball "
        "arithmetic and without the server's code. Prints `holds: ...` (exit status 0), or a line `does not hold: ...` "
        "for each check that failed (1) and a line `undecided: ...` for each that could not be decided (3, if no check "
        "failed). A missing or invalid file ends with 2.",
    )
    audit.add_argument("answer", type=Path, metavar="ANSWER.json", help="the answer, as it was received")
    audit.add_argument("image", type=Path, metavar="IMAGE", help="the image file that was sent, or the npy array")
    audit.add_argument("--model", type=Path, required=True, metavar="ARTEFACT", help="the folder of the model")
    audit.set_defaults(run=_audit)
    evidence = commands.add_parser(
        "evidence",
        help="Write the evidence folder of an artefact.",
        description="Write one folder for the engineer who signs for a classifier: derivation, bounds, norm "
        "certificates, exact test vectors, assumptions; index.html for a browser, evidence.json for a machine. Ends "
        "with the verdict of check.py, a second program in that folder: `accepted: ...` (exit status 0) or `refused: "
        "REASON` (3).",
    )
    evidence.add_argument("artefact", type=Path, metavar="ARTEFACT", help="the folder of the model")
    evidence.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the new folder; must be empty if it exists"
    )
    evidence.add_argument("--images", type=Path, metavar="DIR", help="image files that become test vectors, too")
    evidence.set_defaults(run=_evidence)
    return parser


def _audit(chosen: argparse.Namespace) -> int:
    # Imported here: serving does not load the audit's arithmetic, nor the audit the runtime that it checks.
    from service.audit import Conclusion, audit

    statuses = {Conclusion.HOLDS: 0, Conclusion.DOES_NOT_HOLD: 1, Conclusion.UNDECIDED: 3}
    verdict = audit(chosen.answer, chosen.image, chosen.model)
    sys.stdout.write("".join(f"{line}\n" for line in verdict.lines))
    return statuses[verdict.conclusion]


def _evidence(chosen: argparse.Namespace) -> int:
    if importlib.util.find_spec("onnxruntime") is None:
        _log.error("evidence needs onnxruntime, which is not installed: `pip install 'lipcert[cpu]'`, or [gpu]")
        return 1
    from service.evidence.folder import write_evidence

    verdict = write_evidence(chosen.artefact, chosen.out, chosen.images)
    sys.stdout.write(f"{verdict.line}\n")
    return 0 if verdict.accepted else 3


def _serve(_: argparse.Namespace) -> int:
    if importlib.util.find_spec("onnxruntime") is None:
        _log.error("serving needs onnxruntime, which is not installed: `pip install 'lipcert[cpu]'`, or [gpu]")
        return 1
    stopped = False

    def stop(signal_number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        del signal_number
        stopped = True
        if _imports_extension(frame):
            signal.setitimer(signal.ITIMER_REAL, _RETRY_S)
        else:
            raise SystemExit(0)

    # Before uvicorn runs, the handler ends the loading. Once uvicorn has drained its connections it raises the signal
    # again, and the handler ends the process with status 0.
    for stop_signal in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(stop_signal, stop)
    # Nothing loaded at start becomes garbage; collection would take a sixth of the time to ready.
    gc.disable()
    try:
        # The verifiers start first and load their libraries while this process loads its own: hence the late imports.
        with VerifierPool(usable_cpus()) as pool:
            from service.settings import read_settings

            return run_server(read_settings(), pool)
    except BaseException:
        # Code in C or Rust turns the handler's SystemExit into an error of its language.
        if stopped:
            return 0
        raise
    finally:
        gc.enable()


def _imports_extension(frame: FrameType | None) -> bool:
    """Return whether the main thread is importing an extension module: those of Rust print a panic if interrupted."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    sys.exit(main())
