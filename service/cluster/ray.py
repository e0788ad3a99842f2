"""`service.cluster.ray:app`, the application for Ray Serve; needs the extra `ray`.

Each replica is a process with its own models, proofs and batcher: a certificate is true of the replica that gives it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from service.cluster.options import deployment_options, read_options
from service.cluster.replica import check_health, replica_app
from service.settings import read_settings

# Without static types: the library belongs to an extra.
_ray: Any = importlib.import_module("ray")
_serve: Any = importlib.import_module("ray.serve")


def build_replica() -> FastAPI:
    """Return the application of the replica in this process, for the CPUs that Ray assigned to it."""
    assigned = _ray.get_runtime_context().get_assigned_resources()
    return replica_app(max(1, int(assigned.get("CPU", 1))))


class Replica:
    """A replica; `serve.ingress` gives it `app` and the handling of requests."""

    app: FastAPI

    def check_health(self) -> None:
        """Raise `ClusterError` where the service is not live or not ready; Ray calls this every few seconds."""
        check_health(self.app.state.service)


def app(given: Mapping[str, Any]) -> Any:
    """Return the application for `serve.run`, `serve run` and `serve deploy`.

    Args:
        given: see `service.cluster.options.Options`.

    Raises:
        SettingsError: an argument or a `LIPCERT_*` variable is not valid.
    """
    options = deployment_options(read_options(given), read_settings())
    ingress = _serve.ingress(build_replica)(Replica)
    return _serve.deployment(**options)(ingress).bind()
