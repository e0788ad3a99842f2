"""Parts of a measurement as tasks, which give the same arrays in whichever process they are measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from models.evaluation.partial import Arrays, PartialResults
from models.export import environment
from service.inference.classifier import Classifier


@dataclass(frozen=True)
class Task:
    """One part of a measurement."""

    settings: Mapping[str, Any]
    """Everything that the arrays depend on; JSON values."""
    measure: Callable[..., Arrays]
    """A function of a module, called with the classifier and the arguments."""
    arguments: tuple[Any, ...]


class Runner(Protocol):
    """Measures tasks."""

    @property
    def width(self) -> int:
        """Number of tasks that are measured at the same time."""
        ...

    def submit(self, task: Task) -> Callable[[], Arrays]:
        """Return a function that returns the arrays of the task; it waits for them."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Measures each task in this process, when its arrays are wanted."""

    classifier: Classifier
    width: int = 1

    def submit(self, task: Task) -> Callable[[], Arrays]:
        """Return a function that measures the task."""
        return partial(task.measure, self.classifier, *task.arguments)


def measured(tasks: Sequence[Task], runner: Runner, cache: PartialResults | None) -> Iterator[Arrays]:
    """Yield the arrays of each task, in order; those that are stored are read, others are measured and stored.

    Args:
        tasks: the parts.
        runner: measures up to twice its width of tasks ahead.
        cache: of finished parts; null: no part is stored.

    Raises:
        OSError: a part cannot be stored.
    """
    waiting = deque[tuple[Task, Callable[[], Arrays]]]()
    for task in tasks:
        if cache is not None and cache.holds(task.settings):
            waiting.append((task, lambda task=task: runner.submit(task)()))
        else:
            waiting.append((task, runner.submit(task)))
        if len(waiting) > 2 * runner.width:
            yield _arrays(*waiting.popleft(), cache)
    while waiting:
        yield _arrays(*waiting.popleft(), cache)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that arrays depend on."""
    made = environment(0.0)
    return {name: made[name] for name in ("torch", "onnxruntime", "numpy")}


def _arrays(task: Task, measure: Callable[[], Arrays], cache: PartialResults | None) -> Arrays:
    return measure() if cache is None else cache.part(task.settings, measure)
