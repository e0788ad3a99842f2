"""Count the calls inside `service/` for one request: a PNG file posted to `/predict` of a server that is warm.

`python tests/project/call_count.py [--list]` prints two numbers, and on demand every call:

* calls: Python functions of files below `service/` that are entered or resumed, in every thread, from the ASGI call of
  the application until the worker waits again. A coroutine or generator that is resumed counts as a call, as
  `sys.setprofile` reports it; C functions and functions without a file (methods of dataclasses) do not count;
* changes of file: consecutive calls whose files differ.

The server has one worker and the shipped default model. Commit f810897 has 144 and 47.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import MutableMapping
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_BELOW = str(ROOT / "service") + "/"
_WARM_UP = 5
# The worker goes back to its queue after the answer.
_PAUSE_S = 0.2


def count_calls() -> list[tuple[str, str]]:
    """Return file and qualified name of every call inside `service/` for one request, in order."""
    from service.api.app import create_app
    from service.api.examples import SAMPLE_DIGIT
    from service.settings import Settings

    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_BELOW):
            calls.append((code.co_filename.removeprefix(_BELOW), code.co_qualname))

    async def measure() -> None:
        app = create_app(Settings(models=ROOT / "models" / "zoo", workers=1))
        png = SAMPLE_DIGIT.read_bytes()
        for _ in range(_WARM_UP):
            await _post(app, png)
        await asyncio.sleep(_PAUSE_S)
        calls.clear()
        sys.setprofile(note)
        try:
            await _post(app, png)
        finally:
            sys.setprofile(None)
        await asyncio.sleep(_PAUSE_S)

    # The worker starts during the first request, and takes the function over.
    threading.setprofile(note)
    try:
        asyncio.run(measure())
    finally:
        threading.setprofile(None)
    return calls


def changes_of_file(calls: list[tuple[str, str]]) -> int:
    """Return how many calls are in another file than the call before."""
    return sum(before[0] != after[0] for before, after in pairwise(calls))


async def _post(app: Any, png: bytes) -> None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/predict",
        "raw_path": b"/predict",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"image/png"), (b"content-length", str(len(png)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": png, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    if statuses != [200]:
        raise RuntimeError(f"the request was answered with {statuses}")


def main() -> None:
    """Print the figures."""
    calls = count_calls()
    print(f"calls inside service/ {len(calls)}, changes of file {changes_of_file(calls)}")
    if "--list" in sys.argv[1:]:
        print("\n".join(f"{file} {name}" for file, name in calls))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
