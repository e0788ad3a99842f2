"""A clock that a test moves, for modules that read `time.monotonic`."""

from __future__ import annotations

from types import ModuleType

import pytest


class Clock:
    """Stands for the module `time`."""

    now_s = 1e6

    def monotonic(self) -> float:
        return self.now_s

    def install(self, patch: pytest.MonkeyPatch, module: ModuleType) -> Clock:
        """Make `module` read this clock."""
        patch.setattr(module, "time", self)
        return self
