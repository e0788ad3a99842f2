"""Settings of the server: read once at start from `LIPCERT_*` environment variables, then frozen."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsError

PREFIX = "LIPCERT_"
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
    """Most pixels (of all images of a request) that are decoded; a counterfactual takes some 230 bytes for each of
    their channels."""

    max_batch: Annotated[int, Field(ge=1)] = 256
    """Most images in one `/predict/batch`."""

    threads: Annotated[int, Field(ge=0)] = 0
    """Threads inside one inference; 0 takes as many as the process has CPUs. Requests run side by side anyway."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""


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
