"""How much the tests draw: a little of each kind in `make test`, everything in `make thorough`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

Amount = TypeVar("Amount")

THOROUGH = bool(os.environ.get("TESTS_THOROUGH"))
ZOO = Path(__file__).resolve().parents[1] / "models" / "zoo"


def often(quick: Amount, thorough: Amount) -> Amount:
    """Return `thorough` where the variable TESTS_THOROUGH is set, otherwise `quick`."""
    return thorough if THOROUGH else quick


def shipped_models() -> list[str]:
    """Return the names of all shipped models, or of the smallest dense and the smallest convolutional one."""
    return often(["malaria-cells", "mnist-0-8"], sorted(card.parent.name for card in ZOO.glob("*/card.json")))
