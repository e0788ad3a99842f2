"""Compare a running server with its own OpenAPI document, by Schemathesis: all checks, links between requests too.

`python tests/fuzz/schema.py [--cases 1000] [--seed N]` (`make schemathesis`): starts the server on a free port, and
prints the report. `--cases` is the number for each operation and phase. Exit status 1: a response contradicts the
document.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    environment = {
        **os.environ,
        "LIPCERT_PORT": "0",
        "LIPCERT_MODELS": str(ROOT / "models" / "zoo"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT) as server:
        assert server.stderr is not None
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+:\d+", line)))
            checks = ["--checks", "all", "--max-examples", str(chosen.cases), "--seed", str(chosen.seed)]
            schemathesis = [str(Path(sys.executable).with_name("st")), "--config-file", str(HERE / "schemathesis.toml")]
            done = subprocess.run(
                [*schemathesis, "run", f"{address}/openapi.json", *checks], stdin=subprocess.DEVNULL, check=False
            )
        finally:
            server.terminate()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
