"""Settings of the server: read once at start from `LIPCERT_*` environment variables, then frozen."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsError

PREFIX = "LIPCERT_"
_MOST_WORKERS = 8
PILLOW_PIXEL_LIMIT = 89_478_485
"""Pillow refuses or warns above this on its own; a higher limit of ours would not be honoured."""


class Settings(BaseSettings):
    """What whoever runs the server can choose; field `x` is the variable `LIPCERT_X`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is every interface (a container needs that)."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 lets the system choose."""

    models: Path = Path(__file__).resolve().parent.parent / "models" / "zoo"
    """Folder whose sub-folders are the artefacts to serve."""

    default_model: Annotated[str, Field(min_length=1)] = "mnist"
    """Name of the model that answers when a request names none."""

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Execution provider: `auto` takes CUDA where it is, else the CPU; `cuda` without CUDA is a start-up
    error."""

    max_body_bytes: Annotated[int, Field(ge=1)] = 16 * 1024 * 1024
    """Largest request body, in bytes; enforced while the body arrives."""

    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_PIXEL_LIMIT)] = 2 * 1024 * 1024
    """Most pixels (of all images of a request) that are decoded; a counterfactual takes some 120 bytes for each of
    their channels."""

    max_batch: Annotated[int, Field(ge=1)] = 256
    """Most images in one `/predict/batch`."""

    processes: Annotated[int, Field(ge=0, le=256)] = 1
    """Processes that serve side by side, on CPUs alone; 0 takes one for each CPU that the server may use. Several
    answer more requests of small networks, since Python runs one thread of a process at a time; the default model is
    in memory once for all."""

    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Threads of a process that decode, compute and answer, side by side; 0 shares the CPUs among the processes, 8 for
    each at most."""

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads inside one inference; 0 shares the CPUs among the workers: 1 on up to 8 CPUs."""

    forward_batch: Annotated[int, Field(ge=0, le=65536)] = 0
    """Most images that share one pass of the network; 0 takes 32 on a CPU and 256 on a GPU. Memory goes with it."""

    max_delay_ms: Annotated[float, Field(ge=0.0, le=10_000.0, allow_inf_nan=False)] = 0.0
    """How long a request waits for others to share its pass; 0 takes what is waiting and never waits when idle."""

    max_requests: Annotated[int, Field(ge=1)] = 1024
    """Most requests that are read, wait or are computed at the same time, shared among the processes; more get status
    503."""

    max_waiting_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    """The same for the bytes of their bodies."""

    deadline_s: Annotated[float, Field(gt=0.0, le=86_400.0, allow_inf_nan=False)] = 30.0
    """Seconds after which a request that has no answer gets status 503; `Prefer: wait=SECONDS` asks for less."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""


@dataclass(frozen=True)
class Threads:
    """How the CPUs are shared: `processes * workers * inference` threads compute at the same time."""

    processes: int
    workers: int
    """In one process."""
    inference: int
    """Inside one inference."""

    @property
    def run_before_fork(self) -> bool:
        """Whether a network may run before the processes are there: threads of the runtime, which its first pass
        starts, would be missing in them."""
        return self.processes == 1 or self.inference == 1


def threads_of(settings: Settings, cpus: int) -> Threads:
    """What the settings say, or as many threads as there are CPUs.

    Workers with one thread each come first: two of them, each with a batch of its own, answer more images than one
    inference on two threads. They share one interpreter, so beyond some number threads inside an inference pay more.
    """
    processes = settings.processes or cpus
    share = max(1, cpus // processes)
    workers = settings.workers or min(share, _MOST_WORKERS)
    return Threads(processes, workers, settings.threads or max(1, share // workers))


def variable_names() -> list[str]:
    """Every `LIPCERT_*` variable that the server knows, sorted."""
    return sorted(PREFIX + name.upper() for name in Settings.model_fields)


def read_settings() -> Settings:
    """Read the settings from the environment of the process.

    pydantic-settings drops a variable that it does not know, so a misspelt limit would silently keep its
    default; here it is refused.

    Raises:
        SettingsError: a `LIPCERT_*` variable is unknown or has an invalid value; one line says which and
        what is
            expected.
    """
    known = variable_names()
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise SettingsError("; ".join(_unknown(name, known) for name in unknown))
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("; ".join(_invalid(fault["loc"], fault["msg"]) for fault in error.errors())) from None


def _unknown(name: str, known: list[str]) -> str:
    # Without the prefix, which they all share and which would make everything look alike.
    suffixes = {variable.removeprefix(PREFIX): variable for variable in known}
    nearest = difflib.get_close_matches(name.upper().removeprefix(PREFIX), suffixes, n=1)
    advice = f"did you mean {suffixes[nearest[0]]}?" if nearest else f"known are: {', '.join(known)}"
    return f"{name} is not a setting of this server; {advice}"


def _invalid(location: tuple[int | str, ...], reason: str) -> str:
    name = PREFIX + str(location[0]).upper()
    value = next((os.environ[key] for key in os.environ if key.upper() == name), "")
    line = f"{name}={value!r} is not valid: {reason}"
    if value.startswith("tcp://"):
        # A Kubernetes service called `lipcert` makes the cluster set LIPCERT_PORT to an address.
        line += " (set by Kubernetes for a service of that name: use enableServiceLinks: false in the pod)"
    return line
