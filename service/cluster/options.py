"""Arguments of the Serve application: how many replicas, on which share of a node.

In a Serve config they are `args` of the application. The answers of a replica depend on `LIPCERT_*` variables, which
belong in `runtime_env.env_vars`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import SettingsError
from service.settings import Settings, threads_of

NAME = "lipcert"
"""Of the deployment."""
_HEALTH_CHECK_S = 5.0
"""Between two checks of a replica; Ray replaces it after three that fail."""


class Options(BaseModel):
    """Replicas and their resources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of replicas; with `max_replicas`, the least number."""

    max_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Most replicas, between which Ray scales by the requests in progress."""

    target_ongoing_requests: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 32.0
    """Requests in progress of a replica that Ray scales for: those of one forward pass share its cost."""

    cpus: Annotated[float, Field(gt=0.0, le=1024.0, allow_inf_nan=False)] = 1.0
    """CPUs of a replica, which decide its workers and threads."""

    gpus: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] | None = None
    """Share of a GPU of a replica; default: 1 with `LIPCERT_PROVIDER=cuda`, otherwise 0."""


def read_options(given: Mapping[str, Any]) -> Options:
    """Return the arguments of a Serve application.

    Raises:
        SettingsError: an argument is unknown or not valid.
    """
    try:
        options = Options.model_validate(dict(given))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise SettingsError(f"args of the Serve application: {'; '.join(faults)}") from None
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise SettingsError(f"args of the Serve application: max_replicas is below replicas, {options.replicas}")
    return options


def deployment_options(options: Options, settings: Settings) -> dict[str, Any]:
    """Return the arguments of `serve.deployment`.

    Raises:
        SettingsError: TLS or gRPC is set, or the provider and the share of a GPU contradict each other.
    """
    if settings.tls_certificate is not None or settings.tls_key is not None:
        raise SettingsError(
            "LIPCERT_TLS_CERTIFICATE and LIPCERT_TLS_KEY have no effect on Ray, whose proxy has the connections; unset "
            "them, and see docs/ray.md for TLS"
        )
    if settings.grpc_port is not None:
        raise SettingsError("LIPCERT_GRPC_PORT has no effect on Ray, whose proxy has the connections; unset it")
    gpus = options.gpus
    if gpus is None:
        gpus = 1.0 if settings.provider == "cuda" else 0.0
    if (settings.provider == "cuda") != (gpus > 0.0):
        raise SettingsError(
            f"gpus: {gpus:g} and LIPCERT_PROVIDER={settings.provider} contradict each other: a replica sees the GPU "
            "that Ray assigns to it; set LIPCERT_PROVIDER=cuda and gpus above 0, or LIPCERT_PROVIDER=cpu and gpus: 0"
        )
    found: dict[str, Any] = {
        "name": NAME,
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": gpus},
        # The replica refuses more than its places itself, with a problem document and Retry-After.
        "max_ongoing_requests": settings.max_requests + 1,
        "health_check_period_s": _HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": settings.grace_s + settings.deadline_s,
        "graceful_shutdown_wait_loop_s": settings.drain_s,
    }
    if options.max_replicas is None:
        return found | {"num_replicas": options.replicas}
    scaling = {
        "min_replicas": options.replicas,
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_ongoing_requests,
    }
    return found | {"autoscaling_config": scaling}


def replica_settings(settings: Settings, cpus: int) -> Settings:
    """Return the settings of one replica: one process on its own CPUs, of which a node has more."""
    alone = settings.model_copy(update={"processes": 1})
    threads = threads_of(alone, cpus)
    return alone.model_copy(update={"workers": threads.workers, "threads": threads.inference})
