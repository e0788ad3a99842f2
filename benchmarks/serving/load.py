"""Load from `wrk` (https://github.com/wg/wrk): so many connections, each with one request on its way all the time.

wrk runs a generated Lua script that sends the bodies in turn and prints one line of JSON at its end. It is closed-loop;
its percentiles are those of wrk itself, which adds the samples that a stalled connection could not take.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARKER = "lipcert-bench "
_TIMEOUT_S = 60


class LoadError(Exception):
    """A run that does not count: wrk is missing or failed, or a request did."""


@dataclass(frozen=True)
class Request:
    """What the clients send, one body after the other."""

    path: str
    headers: Mapping[str, str]
    bodies: Sequence[bytes]
    images: int = 1
    """Images in one body."""


@dataclass(frozen=True)
class Load:
    """What one run of wrk counted."""

    requests: int
    duration_s: float
    p50_ms: float
    p99_ms: float

    @property
    def requests_per_s(self) -> float:
        """Answers in a second."""
        return self.requests / self.duration_s


def find_wrk() -> str:
    """The command, or `LoadError` with how to get it."""
    found = shutil.which("wrk")
    if found is None:
        raise LoadError("wrk is missing; install it (Debian, Ubuntu: apt-get install wrk; macOS: brew install wrk)")
    return found


def run_wrk(port: int, request: Request, clients: int, seconds: int) -> Load:
    """Send `request` from `clients` connections for so many seconds.

    Raises:
        LoadError: wrk is missing or failed, or not every request was answered with a status below 400.
    """
    wrk = find_wrk()
    with tempfile.TemporaryDirectory(prefix="lipcert-bench-") as folder:
        script = Path(folder) / "script.lua"
        for index, body in enumerate(request.bodies):
            (Path(folder) / f"body-{index}").write_bytes(body)
        script.write_text(lua_script(request, Path(folder)), encoding="utf-8")
        command = [wrk, "-t1", f"-c{clients}", f"-d{seconds}s", f"--timeout={_TIMEOUT_S}s", "--latency", "-s"]
        result = subprocess.run(
            [*command, str(script), f"http://127.0.0.1:{port}{request.path}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + 2 * _TIMEOUT_S,
        )
    if result.returncode != 0:
        raise LoadError(f"wrk ended with status {result.returncode}: {result.stderr.strip() or result.stdout.strip()}")
    return parse_wrk(result.stdout)


def lua_script(request: Request, folder: Path) -> str:
    """The script: requests are formatted once, from the files `body-0`, `body-1`, ... of `folder`."""
    headers = ", ".join(f"[{_lua(name)}] = {_lua(value)}" for name, value in request.headers.items())
    return f"""\
local requests, at = {{}}, 0

function init(args)
  for index = 0, {len(request.bodies) - 1} do
    local file = assert(io.open({_lua(str(folder))} .. "/body-" .. index, "rb"))
    local headers = {{ {headers} }}
    headers["Host"] = wrk.headers["Host"]
    requests[index + 1] = wrk.format("POST", {_lua(request.path)}, headers, file:read("*a"))
    file:close()
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format({_lua(MARKER)} ..
    '{{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, ' ..
    '"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""


def _lua(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def parse_wrk(output: str) -> Load:
    """Read the line of JSON that the script printed.

    Raises:
        LoadError: there is none, nothing was answered, or a request failed.
    """
    lines = [line for line in output.splitlines() if line.startswith(MARKER)]
    if len(lines) != 1:
        raise LoadError(f"wrk printed no result: {output.strip() or 'nothing at all'}")
    counted = json.loads(lines[0].removeprefix(MARKER))
    failed = {kind: counted[kind] for kind in ("connect", "read", "write", "status", "timeout") if counted[kind]}
    if failed:
        kinds = ", ".join(f"{kind} {count}" for kind, count in failed.items())
        raise LoadError(f"of {counted['requests']} requests some failed: {kinds}")
    if counted["requests"] == 0:
        raise LoadError("no request was answered; measure for longer")
    return Load(
        requests=counted["requests"],
        duration_s=counted["duration_us"] / 1e6,
        p50_ms=counted["p50_us"] / 1e3,
        p99_ms=counted["p99_us"] / 1e3,
    )
