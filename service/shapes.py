"""Array shapes in annotations: `Float64[np.ndarray, "N K"]`, in the words of jaxtyping.

Tests load jaxtyping, which checks every call against them. A server does not check them, so it does not load it either:
jaxtyping costs a tenth of a second, in each process.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float64, Int64, Num, UInt8
else:

    class _Array:
        """Stands for any array type of any shape."""

        def __class_getitem__(cls, array_and_shape: tuple[type, str]) -> type:
            return array_and_shape[0]

    Bool = Float64 = Int64 = Num = UInt8 = _Array

__all__ = ["Bool", "Float64", "Int64", "Num", "UInt8"]
