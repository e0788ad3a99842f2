"""Settings of the server: read once at start from `LIPCERT_*` environment variables, then frozen."""

from __future__ import annotations

import difflib
import ipaddress
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import SettingsError

PREFIX = "LIPCERT_"
_MOST_WORKERS = 8
PILLOW_PIXEL_LIMIT = 89_478_485
"""Pixels above which Pillow itself warns or refuses, so that no higher limit would be honoured."""
_ALIAS = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""Form of an alias, that of a name in a card."""
_SERVICE_LINK = re.compile(
    r"LIPCERT_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")

_log = logging.getLogger(__name__)


class Settings(BaseSettings):
    """Choices of the operator; field `x` is the variable `LIPCERT_X`, and an empty variable counts as unset."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
    )

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; `0.0.0.0` is every interface (a container needs that)."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 lets the system choose."""

    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """TCP port of the Open Inference Protocol over gRPC (extra `grpc`); 0 lets the system choose. Unset: no gRPC."""

    models: Path = Path(__file__).resolve().parent.parent / "models" / "zoo"
    """Folder whose sub-folders are the artefacts to serve."""

    default_model: Annotated[str, Field(min_length=1)] = "mnist"
    """Name of the model that answers a request without a model name, or a version (`NAME:VERSION`) or an alias; unless
    it is set, the only model where there is one."""

    aliases: str = ""
    """Further names of models, `ALIAS=MODEL` or `ALIAS=MODEL:VERSION`, separated by commas."""

    novelty_models: str = ""
    """Novelty models of models, `MODEL=NOVELTY` separated by commas, in place of those that cards name; `MODEL=` takes
    the one of a card away."""

    strict: bool = False
    """Whether a model that cannot be verified ends the start; otherwise the others are served and `/models` lists it as
    broken. The default model always has to be verified."""

    require_signature: str = ""
    """Public key of minisign, or a file of such keys: a model whose `card.json` none of them has signed cannot be
    verified. Empty: signatures are not read."""

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    """Execution provider: `auto` takes CUDA where it works, else warns and takes the CPU; `cuda` ends the start where
    CUDA does not work."""

    proof_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Most seconds that the proof of one model may take at the start; 0 sets no limit."""

    proof_bytes: Annotated[int, Field(ge=0)] = 0
    """Most memory of a process that proves models at the start, in bytes; 0 sets no limit."""

    proof_work: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Most multiply-adds of the proof of one model at the start; 0: 2^30, and 2^21 for each weight of the model."""

    max_body_bytes: Annotated[int, Field(ge=1)] = 16 * 1024 * 1024
    """Largest request body, in bytes; enforced while the body arrives."""

    max_head_bytes: Annotated[int, Field(ge=1024, le=1024 * 1024)] = 32 * 1024
    """Largest head of a request, in bytes: request line and headers."""

    max_headers: Annotated[int, Field(ge=10, le=10_000)] = 100
    """Most headers of a request."""

    max_target_bytes: Annotated[int, Field(ge=64, le=1024 * 1024)] = 8 * 1024
    """Longest path with query, in bytes."""

    max_pipelined: Annotated[int, Field(ge=1, le=1024)] = 16
    """Most requests of one connection that wait for the answer to an earlier one; the connection is closed after their
    answers."""

    max_connections: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most open connections of a process; the one that is silent for longest gives way to a new one. 0 takes 16384, or
    as many as the limit of open files allows."""

    max_connections_per_address: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Most open connections of a process from one address. 0 sets no limit, because all clients behind a proxy have its
    address."""

    head_s: Annotated[float, Field(ge=1.0, le=3600.0, allow_inf_nan=False)] = 10.0
    """Seconds from the first byte of a request, or from the start of its connection, to the end of its headers."""

    body_s: Annotated[float, Field(ge=1.0, le=3600.0, allow_inf_nan=False)] = 10.0
    """Most seconds between two pieces of a body."""

    idle_s: Annotated[float, Field(ge=1.0, le=86_400.0, allow_inf_nan=False)] = 75.0
    """Seconds that a connection waits for its next request; longer than a proxy in front keeps it (60 by default in
    many)."""

    write_s: Annotated[float, Field(ge=1.0, le=3600.0, allow_inf_nan=False)] = 30.0
    """Seconds in which a client has to read its answer, and one more for each 16 KiB."""

    max_pixels: Annotated[int, Field(ge=1, le=PILLOW_PIXEL_LIMIT)] = 2 * 1024 * 1024
    """Most pixels that are decoded, of all images of a request; a counterfactual takes some 120 bytes for each pixel
    and channel."""

    max_batch: Annotated[int, Field(ge=1)] = 256
    """Most images in one `/predict/batch`."""

    processes: Annotated[int, Field(ge=0, le=256)] = 1
    """Processes that serve side by side, on CPUs alone; 0 takes one for each CPU that the server may use. Several
    answer more requests of small networks, because each has its own GIL; the default model is in memory once for
    all."""

    workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Threads of a process that decode, compute and answer side by side; 0 shares the CPUs among the processes, at most
    8 for each."""

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads inside one inference; 0 shares the CPUs among the workers: 1 on up to 8 CPUs."""

    forward_batch: Annotated[int, Field(ge=0, le=65536)] = 0
    """Most images that share one forward pass; 0 takes 32 on a CPU and 256 on a GPU. Memory grows with it."""

    gpu_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """Most GPU memory for weights and results of one graph, in bytes; a model has two graphs. 0 sets no limit."""

    max_delay_ms: Annotated[float, Field(ge=0.0, le=10_000.0, allow_inf_nan=False)] = 0.0
    """Milliseconds that a request waits for others to share its forward pass; 0 adds no delay."""

    max_requests: Annotated[int, Field(ge=1)] = 1024
    """Most requests that are read, queued or computed at the same time, shared among the processes; more get status
    503."""

    max_waiting_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    """Most bytes in the bodies of these requests that have arrived, shared among the processes; more get status 503."""

    max_wait_ms: Annotated[float, Field(ge=0.0, le=86_400_000.0, allow_inf_nan=False)] = 0.0
    """Milliseconds that a request may have to wait behind others, by the estimate of the server; it gets status 503
    otherwise. 0 lets a burst wait, and in an overload as many requests as keep answers within about three times the
    time of a request alone."""

    client_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of `LIPCERT_MAX_REQUESTS` and `LIPCERT_MAX_WAITING_BYTES` that the requests from one address can hold; 1
    where all clients have one address, as behind a proxy."""

    min_rate: Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)] = 1024.0
    """Slowest body, in bytes per second, on average and after 5 seconds; slower ones get status 408."""

    deadline_s: Annotated[float, Field(gt=0.0, le=86_400.0, allow_inf_nan=False)] = 30.0
    """Seconds after which a request without an answer gets status 503; `Prefer: wait=SECONDS` asks for less."""

    api_keys_file: Path | None = None
    """File of API keys, with lines of `lipcert keys new`; a change counts within a second. With a key, every path but
    pages and health needs one."""

    api_keys: str = ""
    """API keys, separated by `;`, besides those of the file."""

    allow_anonymous: bool = False
    """Whether serving without API keys beyond this machine is intended; without it, the start warns."""

    rate_per_key: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Requests per second of one API key, over all processes; more get status 429. 0 sets no limit."""

    rate_per_address: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Requests per second of one address (IPv6: of one network of 64 bits), over all processes; more get status 429. 0
    sets no limit."""

    rate_burst: Annotated[int, Field(ge=1)] = 50
    """Requests that a key or an address may send at once before its rate limits it."""

    trusted_proxies: str = ""
    """Addresses and networks of proxies, separated by commas, whose `X-Forwarded-For` names the address of the
    client."""

    cors_origins: str = ""
    """Origins, separated by commas, whose pages may send requests from a browser; `*` is every origin."""

    tls_certificate: Path | None = None
    """PEM file with the certificate and its chain; serves HTTPS, TLS 1.2 or newer. A new handshake takes a changed
    file."""

    tls_key: Path | None = None
    """PEM file with the key of the certificate, not encrypted."""

    stuck_s: Annotated[float, Field(ge=0.0, le=86_400.0, allow_inf_nan=False)] = 0.0
    """Seconds without a step of a worker, beyond those that the step may take, after which the process ends with status
    75; 0: a third of `LIPCERT_DEADLINE_S`, and at least 5."""

    drain_s: Annotated[float, Field(ge=0.0, le=3_600.0, allow_inf_nan=False)] = 1.0
    """Seconds after SIGTERM in which `/health/ready` is 503 and everything else goes on: load balancers take the server
    out in the meantime."""

    grace_s: Annotated[float, Field(gt=0.0, le=3_600.0, allow_inf_nan=False)] = 6.0
    """Seconds after that in which open requests are answered; then they get status 503, and the process ends."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe message that is logged."""

    log_format: Literal["text", "json"] = "text"
    """Lines of the log: `text`, or `json`, one object a line."""

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        """Return the value; the web server would take a misspelt network for the name of a socket."""
        for network in list_of(value):
            ipaddress.ip_network(network)
        return value

    @field_validator("aliases", "novelty_models")
    @classmethod
    def _are_pairs(cls, value: str, info: ValidationInfo) -> str:
        """Return the value; raise `ValueError` for one that `aliases_of` or `novelty_models_of` cannot read."""
        (aliases_of if info.field_name == "aliases" else novelty_models_of)(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        for origin in list_of(value):
            if not re.fullmatch(r"\*|https?://[^/\s?#]+", origin):
                raise ValueError(f"{origin!r} is no origin; write scheme and host alone, as https://example.org")
        return value


@dataclass(frozen=True)
class Threads:
    """Shares of the CPUs: `processes * workers * inference` threads compute at the same time."""

    processes: int
    workers: int
    """In one process."""
    inference: int
    """Inside one inference."""

    @property
    def run_before_fork(self) -> bool:
        """Whether a network may run before the fork: the runtime starts its threads in the first forward pass, and a
        fork would lose them."""
        return self.processes == 1 or self.inference == 1


def threads_of(settings: Settings, cpus: int) -> Threads:
    """Return the numbers of the settings, or shares of the CPUs.

    Workers with one thread each come first: two of them, each with its own batch, answer more images than one
    inference on two threads. They share one interpreter, so beyond some number threads inside an inference pay more.
    """
    processes = settings.processes or cpus
    share = max(1, cpus // processes)
    workers = settings.workers or min(share, _MOST_WORKERS)
    return Threads(processes, workers, settings.threads or max(1, share // workers))


def list_of(value: str) -> list[str]:
    """Return the parts of a setting that are separated by commas."""
    return [part.strip() for part in value.split(",") if part.strip()]


def novelty_models_of(value: str) -> dict[str, str]:
    """Return the novelty model of each model that the setting names; empty for no novelty model.

    Raises:
        ValueError: a part is not `MODEL=NOVELTY`, or names a model twice.
    """
    return _pairs_of(value, "write MODEL=NOVELTY once for each model, separated by commas")


def aliases_of(value: str) -> dict[str, str]:
    """Return the name that each alias of the setting stands for.

    Raises:
        ValueError: a part is not `ALIAS=MODEL`, repeats an alias, or names nothing or another alias; or the alias has
            not the form of a name.
    """
    found = _pairs_of(value, "write ALIAS=MODEL once for each alias, separated by commas")
    for alias, name in found.items():
        if not re.fullmatch(_ALIAS, alias):
            raise ValueError(f"{alias!r} is no name; take letters, digits, `.`, `_` and `-`, 100 at most")
        if not name:
            raise ValueError(f"{alias!r} stands for nothing; write {alias}=MODEL or {alias}=MODEL:VERSION")
        if name in found:
            raise ValueError(f"{alias}={name}, and {name!r} is an alias itself; name a model or a version")
    return found


def default_of(settings: Settings) -> str:
    """Return the default model, or its version, without an alias."""
    return aliases_of(settings.aliases).get(settings.default_model, settings.default_model)


def _pairs_of(value: str, advice: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in list_of(value):
        name, equals, other = (piece.strip() for piece in part.partition("="))
        if not (name and equals) or name in found:
            raise ValueError(f"{part!r}: {advice}")
        found[name] = other
    return found


def variable_names() -> list[str]:
    """Return every `LIPCERT_*` variable that the server knows, sorted."""
    return sorted(PREFIX + name.upper() for name in Settings.model_fields)


def read_settings() -> Settings:
    """Return the settings in the environment of the process.

    pydantic-settings drops a variable that it does not know, so a misspelt limit would silently leave the default;
    here it is refused. The variables that Kubernetes sets in every pod beside a service whose name starts with
    `lipcert` are ignored with a warning, also `LIPCERT_PORT` and `LIPCERT_GRPC_PORT` where they are its address.

    Raises:
        SettingsError: a `LIPCERT_*` variable is unknown or has an invalid value; one line names it and the valid
            values.
    """
    given = {name for name in os.environ if name.upper().startswith(PREFIX)}
    links = {name for name in given if _is_service_link(name.upper(), os.environ[name])}
    known = variable_names()
    unknown = sorted(name for name in given - links if name.upper() not in known)
    if unknown:
        raise SettingsError("; ".join(_unknown(name, known) for name in unknown))
    replaced: dict[str, Any] = {}
    if links:
        _log.warning(
            "ignored: %s, which Kubernetes sets for a service of that name; enableServiceLinks: false in the pod "
            "leaves them out",
            ", ".join(sorted(links)),
        )
        fields = {name.upper().removeprefix(PREFIX).lower() for name in links}
        replaced = {name: Settings.model_fields[name].default for name in fields & Settings.model_fields.keys()}
    try:
        return _with_only_model(Settings(**replaced))
    except ValidationError as error:
        raise SettingsError("; ".join(_invalid(fault["loc"], fault["msg"]) for fault in error.errors())) from None


def _with_only_model(settings: Settings) -> Settings:
    """Return the settings with the only model as the default one, where no default was asked for."""
    if "default_model" in settings.model_fields_set:
        return settings
    cards = (card for form in ("", "[1-9]*/") for card in settings.models.glob(f"[!._]*/{form}card.json"))
    names = {card.relative_to(settings.models).parts[0] for card in cards}
    return settings.model_copy(update={"default_model": names.pop()}) if len(names) == 1 else settings


def _is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes sets this variable for a service (its documentation: "Environment variables")."""
    if _SERVICE_LINK.fullmatch(name):
        return True
    return name.endswith("_PORT") and _SERVICE_ADDRESS.match(value) is not None


def _unknown(name: str, known: list[str]) -> str:
    # Without the prefix, which makes all names look alike.
    suffixes = {variable.removeprefix(PREFIX): variable for variable in known}
    nearest = difflib.get_close_matches(name.upper().removeprefix(PREFIX), suffixes, n=1)
    advice = f"did you mean {suffixes[nearest[0]]}?" if nearest else f"known are: {', '.join(known)}"
    return f"{name} is not a setting of this server; {advice}"


def _invalid(location: tuple[int | str, ...], reason: str) -> str:
    name = PREFIX + str(location[0]).upper()
    value = next((os.environ[key] for key in os.environ if key.upper() == name), "")
    return f"{name}={value!r} is not valid: {reason}"
