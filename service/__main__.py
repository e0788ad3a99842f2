"""Command line of the service: `python -m service` serves the models of `LIPCERT_MODELS` over HTTP; settings in
`service.settings`.

`python -m service audit ANSWER.json IMAGE --model ARTEFACT`: audit an archived answer, see docs/audit.md.
`python -m service import FILE.onnx --out DIR`: make an artefact of an ONNX file, see docs/import.md.

`python -m service evidence ARTEFACT --out DIR`: write the evidence folder of an artefact, see docs/evidence.md.
`python -m service keys new NAME --scope predict`: make an API key, see docs/access.md.
`python -m service predict FILE ...`: classify image files, see docs/client.md; its help has its exit statuses.
`python -m service certify-images SOURCE ... --out DIR`: certify image collections, see docs/bulk.md.
`python -m service ray up`: serve in replicas of Ray Serve on this machine, see docs/ray.md.

Exit status: 0 stopped on request, the answer holds, the file is imported, or the second program accepts the folder; 1 a
model, the provider or the port is not available, or the answer does not hold; 2 a setting, the command, a file to be
audited or DIR is not valid, or a file is not imported; 3 the audit is undecided, or the second program refuses the
folder; 70 the GPU was lost while serving; 75 a worker or the event loop was stuck.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import FrameType

from service.access.scopes import PREDICT, SCOPES
from service.artefact.pool import VerifierPool
from service.bulk import arguments as bulk_arguments
from service.cluster import arguments as ray_arguments
from service.errors import ImportRefusedError, KeptError, LipcertError, SettingsError
from service.logs import FORMAT, limit_logs
from service.processes.serving import run_server
from service.runtime.cpus import usable_cpus
from service.sheets import arguments

_log = logging.getLogger("service")

_RETRY_S = 0.005
"""Time after which a signal during the import of an extension module is handled again."""


def main(arguments: Sequence[str] | None = None, program: str = "python -m service") -> int:
    """Run a command; without one, serve. Return the exit status."""
    chosen = _parser(program).parse_args(arguments)
    logging.basicConfig(format=FORMAT, level=logging.INFO, stream=sys.stderr)
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
        prog=program, description="Serve certified classifiers; classify; import others; audit; write evidence."
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
    audit.add_argument(
        "--novelty-model",
        type=Path,
        metavar="ARTEFACT",
        help="the folder of the novelty model, for an answer with `novelty`; default: that is not audited",
    )
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
    _describe_import(
        commands.add_parser(
            "import",
            help="Make an artefact of an ONNX file.",
            description="Read an ONNX classifier of any origin, prove it and write it as an artefact that the service "
            "serves. Prints one JSON object with the proved bound and error, or, with exit status 2, every reason "
            "against it on stderr, one per line.",
        )
    )
    predict = commands.add_parser(
        "predict", help="Classify image files and folders.", description=arguments.DESCRIPTION
    )
    arguments.describe(predict)
    predict.set_defaults(run=_predict)
    bulk = commands.add_parser(
        "certify-images", help="Certify image collections of any size.", description=bulk_arguments.DESCRIPTION
    )
    bulk_arguments.describe(bulk)
    bulk.set_defaults(run=_certify_images)
    ray = commands.add_parser(
        "ray", help="Serve in replicas of Ray Serve on this machine.", description=ray_arguments.DESCRIPTION
    )
    ray_arguments.describe(ray)
    ray.set_defaults(run=_ray)
    _describe_keys(
        commands.add_parser(
            "keys",
            help="Make an API key.",
            description="Print a new API key, which cannot be shown again, and the line to add to the file of "
            "LIPCERT_API_KEYS_FILE, from which the key cannot be derived.",
        )
    )
    return parser


def _describe_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["new"])
    parser.add_argument("name", metavar="NAME", help="1 to 64 letters, digits, - and _")
    parser.add_argument(
        "--scope",
        action="append",
        choices=SCOPES,
        help="can be repeated; admin includes the others; default: predict",
    )
    parser.set_defaults(run=_new_key)


def _describe_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.onnx")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of models; written: DIR/NAME")
    parser.add_argument("--name", metavar="NAME", help="name of the model; default: that of the file")
    parser.add_argument(
        "--labels",
        metavar="A,B,C",
        help="labels in class order, or a file with one on each line; default: class 0, class 1, ...",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        metavar="C,H,W",
        help="shape of the images, where the input of the file has another one: flat, or channels last",
    )
    parser.add_argument("--dry-run", action="store_true", help="report, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace an artefact of that name")
    parser.add_argument("--max-seconds", type=_positive, default=0, metavar="S", help="most time; default: no limit")
    parser.add_argument("--max-bytes", type=_positive, default=0, metavar="B", help="most memory; default: no limit")
    parser.add_argument(
        "--max-work",
        type=_positive,
        default=0,
        metavar="W",
        help="most multiply-adds of the proof; default: 2^30, and 2^21 for each number that the file holds",
    )
    parser.set_defaults(run=_import)


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text} does not name three sizes, as 3,32,32 does")
    channels, height, width = (int(_positive(size)) for size in sizes)
    return channels, height, width


def _positive(text: str) -> float:
    number = float(text) if "." in text else int(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _import(chosen: argparse.Namespace) -> int:
    from service.artefact.importing import ImportOrder, import_model
    from service.certificate.proof_limits import ProofLimits

    try:
        order = ImportOrder(
            chosen.file,
            chosen.out,
            name=chosen.name,
            labels=_labels(chosen.labels),
            shape=chosen.shape,
            dry_run=chosen.dry_run,
            force=chosen.force,
        )
        report = import_model(order, ProofLimits(chosen.max_seconds, int(chosen.max_bytes), chosen.max_work))
    except ImportRefusedError as error:
        sys.stderr.write("".join(f"{chosen.file}: {reason}\n" for reason in error.reasons))
        return 2
    sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0


def _labels(text: str | None) -> tuple[str, ...] | None:
    """Return the labels of a list, or of the lines of a file."""
    if text is None:
        return None
    try:
        if not Path(text).is_file():
            return tuple(part.strip() for part in text.split(","))
        return tuple(line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ImportRefusedError([f"the labels cannot be read: {error}"]) from error


def _audit(chosen: argparse.Namespace) -> int:
    # Imported here: serving does not load the audit's arithmetic, nor the audit the runtime that it checks.
    from service.audit import Conclusion, audit

    statuses = {Conclusion.HOLDS: 0, Conclusion.DOES_NOT_HOLD: 1, Conclusion.UNDECIDED: 3}
    verdict = audit(chosen.answer, chosen.image, chosen.model, chosen.novelty_model)
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


def _predict(chosen: argparse.Namespace) -> int:
    from service.sheets.command import INTERRUPTED, predict

    status = predict(chosen)
    if status == INTERRUPTED:
        # Without waiting for threads that pause before another try.
        sys.stdout.flush()
        os._exit(status)
    return status


def _certify_images(chosen: argparse.Namespace) -> int:
    from service.bulk.command import certify_images

    return certify_images(chosen)


def _ray(chosen: argparse.Namespace) -> int:
    from service.cluster.command import up

    return up(chosen)


def _new_key(chosen: argparse.Namespace) -> int:
    from service.access.keys import new_key

    key, line = new_key(chosen.name, chosen.scope or [PREDICT])
    sys.stdout.write(f"key:  {key}\nline: {line}\n")
    return 0


def _serve(_: argparse.Namespace) -> int:
    if importlib.util.find_spec("onnxruntime") is None:
        _log.error("serving needs onnxruntime, which is not installed: `pip install 'lipcert[cpu]'`, or [gpu]")
        return 1
    limit_logs()
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
    # The end of a terminal, or the signal by which many servers read their settings again, must not end this one. The
    # processes inherit it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
