"""Parts of a run as tasks of Ray; the folder of the results must be one that all nodes share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

from service.bulk.tables import Record
from service.bulk.work import Job, certify_part
from service.settings import PREFIX
from service.sheets.sources import SourceError

_TRIES = 3
"""Of a part whose process or node ends."""


def run_on_ray(job: Job, lines: Iterator[str], address: str) -> Iterator[Record]:
    """Yield the record of each part when it is complete, in any order.

    Args:
        job: of the run.
        lines: parts.
        address: of the cluster; `local` starts one here.

    Raises:
        SourceError: there is no such cluster, or a part cannot be certified, see `certify_part`.
        OSError: a file cannot be written.
    """
    ray: Any = importlib.import_module("ray")
    settings = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    try:
        ray.init(
            address,
            runtime_env={"env_vars": settings},
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
        )
    except Exception as error:
        raise SourceError(f"the Ray cluster {address} cannot be reached: {error}") from error
    try:
        task = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(certify_part)
        shared, pending = ray.put(job), []
        # Twice the CPUs, so that no node waits for this process.
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        for line in lines:
            pending.append(task.remote(shared, line))
            if len(pending) >= most:
                done, pending = ray.wait(pending)
                yield from map(_result, [ray] * len(done), done)
        while pending:
            done, pending = ray.wait(pending)
            yield from map(_result, [ray] * len(done), done)
    finally:
        ray.shutdown()


def _result(ray: Any, reference: Any) -> Record:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, SourceError | OSError) else SourceError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise SourceError(
            f"a part ended {_TRIES} processes of the cluster; the other parts are kept: {error}"
        ) from error
