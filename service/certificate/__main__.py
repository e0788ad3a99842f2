"""Command line of the certifier: `python -m service.certificate FILE.onnx` prints the proved bounds of an ONNX
classifier as one JSON object.

Exit status: 0 proved; 2 not proved, with every reason on stderr, one per line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from service.certificate.analysis import certify
from service.certificate.proof_limits import ProofLimits, within
from service.network.operators import UnsupportedModelError
from service.network.reader import read_draft


def main(arguments: Sequence[str] | None = None, program: str = "python -m service.certificate") -> int:
    """Print the proved bounds, or every reason why there is no proof; return the exit status."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Prove L2 Lipschitz and rounding-error bounds of an ONNX classifier for images in [0, 1].",
    )
    parser.add_argument("file", type=Path, metavar="FILE.onnx")
    parser.add_argument("--max-seconds", type=float, default=0.0, help="that the proof may take; default: no limit")
    parser.add_argument("--max-bytes", type=int, default=0, help="of memory, of the process; default: no limit")
    parser.add_argument(
        "--max-work",
        type=float,
        default=0.0,
        help="multiply-adds that the proof may take, counted before they are done; default: 2^30, and 2^21 for each "
        "number that the file holds",
    )
    options = parser.parse_args(arguments)
    file: Path = options.file
    try:
        model_bytes = file.read_bytes()
    except OSError as error:
        sys.stderr.write(f"{file}: cannot be read: {error.strerror}\n")
        return 2
    try:
        with within(ProofLimits(options.max_seconds, options.max_bytes)):
            certificate = certify(read_draft(model_bytes, options.max_work))
    except UnsupportedModelError as error:
        sys.stderr.write("".join(f"{file}: {reason}\n" for reason in error.reasons))
        return 2
    report = {
        "digest": "sha256:" + hashlib.sha256(model_bytes).hexdigest(),
        "input_shape": list(certificate.input_shape),
        "precision": certificate.precision,
        "lipschitz_bound": certificate.lipschitz_bound,
        "margin_bounds": certificate.margin_table(),
        "logit_error": certificate.logit_error,
        "nodes": [
            {
                "node": node.node,
                "lipschitz_bound": node.lipschitz_bound,
                "error": node.error,
                "theorem": node.theorem,
            }
            for node in certificate.nodes
        ],
    }
    sys.stdout.write(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
