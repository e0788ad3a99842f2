"""Parts of an evaluation as tasks of Ray; the artefact is at one path on all nodes.

A part whose process or node ends is measured again by another one. Its seeds belong to the part, so its arrays are
those of a run in one process on the same kind of processor.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from models.evaluation.attacks import CertificateRefutedError
from models.evaluation.images import EvaluationError
from models.evaluation.partial import Arrays, code_digest
from models.evaluation.tasks import InProcess, Runner, Task, library_versions
from service.artefact.card import ArtefactError
from service.inference.classifier import Classifier
from service.runtime.engine import ProviderError
from service.runtime.provider import CUDA, Resolved

_TRIES = 3
"""Of a part whose process or node ends."""


@dataclass(frozen=True)
class Served:
    """The artefact that the tasks are about, and the code that measures it."""

    folder: Path
    digest: str
    """Of `model.onnx`."""
    provider: Resolved
    threads: int
    code: str
    versions: tuple[tuple[str, str], ...]


def served(classifier: Classifier, folder: Path, threads: int) -> Served:
    """Return the description of an artefact for the tasks.

    Args:
        classifier: as it is loaded here.
        folder: of the artefact.
        threads: of ONNX Runtime.
    """
    versions = tuple(sorted(library_versions().items()))
    provider = "cuda" if classifier.provider == CUDA else "cpu"
    return Served(folder.absolute(), classifier.digest, provider, threads, code_digest(), versions)


@contextmanager
def runner_for(classifier: Classifier, folder: Path, threads: int, address: str | None) -> Generator[Runner]:
    """Yield the runner of an evaluation.

    Args:
        classifier: as it is loaded here.
        folder: of the artefact.
        threads: of ONNX Runtime in each process.
        address: of a Ray cluster, see `on_ray`; null: this process.

    Raises:
        EvaluationError: there is no such cluster.
    """
    if address is None:
        yield InProcess(classifier)
        return
    with on_ray(address, served(classifier, folder, threads)) as runner:
        yield runner


@contextmanager
def on_ray(address: str, artefact: Served) -> Generator[RayRunner]:
    """Yield a runner on a cluster, and leave the cluster at the end.

    Args:
        address: of the cluster; `local` starts one on this machine.
        artefact: that is measured.

    Raises:
        EvaluationError: there is no such cluster.
    """
    ray: Any = importlib.import_module("ray")
    try:
        ray.init(address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except Exception as error:
        raise EvaluationError(f"the Ray cluster {address} cannot be reached: {error}") from error
    try:
        yield RayRunner(ray, artefact)
    finally:
        ray.shutdown()


class RayRunner:
    """Measures tasks on a cluster.

    Args:
        ray: the module, connected.
        artefact: that is measured.
    """

    def __init__(self, ray: Any, artefact: Served) -> None:
        self._ray, self._artefact = ray, artefact
        resource = "GPU" if artefact.provider == "cuda" else "CPU"
        each = 1 if resource == "GPU" else artefact.threads
        found = int(ray.cluster_resources().get(resource, 0))
        if found < each:
            raise EvaluationError(f"the Ray cluster has {found} {resource}s, and a part needs {each}")
        self.width = found // each
        options = {"num_gpus": 1} if resource == "GPU" else {"num_cpus": each}
        self._measure = ray.remote(max_retries=_TRIES - 1, **options)(_measure)

    def submit(self, task: Task) -> Callable[[], Arrays]:
        """Start the task; return a function that waits for its arrays."""
        reference = self._measure.remote(self._artefact, task.measure, task.arguments)
        return lambda: self._result(reference)

    def _result(self, reference: Any) -> Arrays:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, CertificateRefutedError | EvaluationError):
                raise error.cause from error
            raise EvaluationError(f"a part cannot be measured: {error}") from error
        except errors.RayError as error:
            raise EvaluationError(
                f"a part ended {_TRIES} processes of the cluster; the parts before it are stored, and the same command "
                f"continues: {error}"
            ) from error


def _measure(artefact: Served, measure: Callable[..., Arrays], arguments: tuple[Any, ...]) -> Arrays:
    # Arrays in the store of Ray are read-only; torch takes writable ones.
    copied = [given.copy() if isinstance(given, np.ndarray) else given for given in arguments]
    return measure(_classifier(artefact), *copied)


@lru_cache(maxsize=1)
def _classifier(artefact: Served) -> Classifier:
    """Return the classifier, verified in this process.

    Raises:
        EvaluationError: this node has another artefact or other versions of the code and its libraries.
    """
    node = platform.node()
    if code_digest() != artefact.code:
        raise EvaluationError(f"{node} has another version of lipcert than the driver: install the same one")
    if other := dict(artefact.versions).items() ^ library_versions().items():
        raise EvaluationError(
            f"{node} and the driver have other versions of {', '.join(sorted({n for n, _ in other}))}"
        )
    try:
        classifier = Classifier.load(artefact.folder, artefact.provider, artefact.threads)
    except (ArtefactError, ProviderError) as error:
        raise EvaluationError(f"{node}: {error}") from error
    if classifier.digest != artefact.digest:
        raise EvaluationError(f"{artefact.folder} on {node} is another model than the driver's: copy it to all nodes")
    return classifier
