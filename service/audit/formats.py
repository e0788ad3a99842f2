"""Floating-point formats of the runtime, as the rounding errors see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from flint import arb

from service.audit.balls import NotAuditableError, power, upper


@dataclass(frozen=True)
class Format:
    """A binary floating-point format, rounding to nearest."""

    name: str
    digits: int
    """Digits of the significand: the unit roundoff is `2**-digits`."""
    lowest: int
    """The smallest normal number is `2**lowest`."""
    highest: int
    """Overflow begins at `2**highest`."""

    def gamma(self, n: int) -> arb:
        """Return `n u / (1 - n u)`, the bound of the relative error of n roundings in any order (Higham 2002, 3.1).

        Raises:
            NotAuditableError: `n u` is 1/2 or more.
        """
        nu = arb(n) * power(-self.digits)
        if not nu < power(-1):
            raise NotAuditableError(f"a sum of {n} roundings is too long for {self.name}")
        return upper(nu / (arb(1) - nu))

    @property
    def unit(self) -> arb:
        """The unit roundoff u."""
        return power(-self.digits)

    @property
    def tiny(self) -> arb:
        """The largest error of one operation that underflows."""
        return power(self.lowest)


FORMATS = {np.float64: Format("float64", 53, -1022, 1024), np.float32: Format("float32", 24, -126, 128)}
