"""A command line run inside the test process, with its exit status and its output."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """End of a command."""

    exit_code: int
    output: str
    """stdout and stderr, in the order of writing."""


def run_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Result:
    """Run `main` with the arguments; an error that it does not handle is raised here."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return Result(main(arguments), output.getvalue())
