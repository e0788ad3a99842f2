"""A queueing model of the service, as processes of simpy: batches that gather while one is computed.

A node is one server that takes whatever waits, at most a full batch, and answers all of them together after a time
that depends on their number. That is a queue with bulk service (Bailey, *On queueing processes with bulk service*,
JRSS B 1954) whose batches are not delayed for company.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

MOST = 32
"""Images of a forward pass on a CPU, the default of `LIPCERT_FORWARD_BATCH`."""


@dataclass(frozen=True)
class Service:
    """Time of a batch: `fixed_s + each_s * n`, times a factor that is drawn from `factors`, whose mean is 1."""

    fixed_s: float
    each_s: float
    factors: np.ndarray
    around_s: float = 0.0
    """Of a request outside of the server: the client and the network."""
    most: int = MOST
    """Requests of a batch."""

    @property
    def capacity(self) -> float:
        """Requests per second with full batches."""
        return self.most / (self.fixed_s + self.each_s * self.most)


class Node:
    """One server with its queue."""

    def __init__(self, environment: simpy.Environment, service: Service, random: np.random.Generator) -> None:
        self.environment, self.service, self._random = environment, service, random
        self.waiting: deque[float] = deque()
        self.ahead = 0
        """Requests that wait or are computed."""
        self.seconds: list[float] = []
        """From arrival to answer."""
        self._is_working = False

    def arrive(self) -> None:
        """Take a request now."""
        self.waiting.append(self.environment.now)
        self.ahead += 1
        if not self._is_working:
            self._is_working = True
            self.environment.process(self._serve())

    def _serve(self) -> Any:
        while self.waiting:
            batch = [self.waiting.popleft() for _ in range(min(self.service.most, len(self.waiting)))]
            duration_s = self.service.fixed_s + self.service.each_s * len(batch)
            yield self.environment.timeout(duration_s * float(self._random.choice(self.service.factors)))
            self.ahead -= len(batch)
            self.seconds += [self.environment.now - arrived + self.service.around_s for arrived in batch]
        self._is_working = False


Policy = Callable[[Sequence[Node], np.random.Generator], Node]


def at_random(nodes: Sequence[Node], random: np.random.Generator) -> Node:
    """Return any node: what DNS or a hash of the client's address does."""
    return nodes[random.integers(len(nodes))]


def better_of_two(nodes: Sequence[Node], random: np.random.Generator) -> Node:
    """Return the one of two random nodes with fewer requests (Mitzenmacher, IEEE TPDS 2001)."""
    first, second = (nodes[k] for k in random.integers(len(nodes), size=2))
    return first if first.ahead <= second.ahead else second


class InTurn:
    """Return the nodes in turn."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self, nodes: Sequence[Node], _: np.random.Generator) -> Node:
        return nodes[next(self._numbers) % len(nodes)]


def simulate(
    services: Sequence[Service], rate: float, requests: int, policy: Policy = at_random, seed: int = 0
) -> np.ndarray:
    """Return the seconds of each request, without the first tenth, for requests that arrive at random times.

    Args:
        services: of each node.
        rate: requests per second of all nodes together, a Poisson process.
        requests: number of them.
        policy: chooses the node of a request.
        seed: of arrivals and durations.
    """
    environment, random = simpy.Environment(), np.random.default_rng(seed)
    nodes = [Node(environment, service, random) for service in services]

    def arrivals() -> Any:
        for number in range(requests):
            yield environment.timeout(random.exponential(1.0 / rate))
            if number == requests // 10:
                for node in nodes:
                    node.seconds.clear()
            policy(nodes, random).arrive()

    environment.process(arrivals())
    environment.run()
    return np.concatenate([node.seconds for node in nodes])
