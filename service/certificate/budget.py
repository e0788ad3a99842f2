"""Costs of the joint bounds of one graph, in multiply-adds: no clock, so that bounds are the same everywhere."""

import math
from dataclasses import dataclass

LARGEST_PROOF = 1e10
"""Multiply-adds for the norm of one matrix."""
_ALL_PROOFS = 5e11
"""Multiply-adds for all joint norms of a graph: some 20 seconds of two cores."""


@dataclass
class Budget:
    """Multiply-adds that are left for joint norms."""

    left: float = _ALL_PROOFS

    def affords(self, cost: float, limit: float = math.inf) -> bool:
        """Spend `cost` and return true; return false where it exceeds `limit` or the rest of the budget."""
        if cost > min(limit, self.left):
            return False
        self.left -= cost
        return True
