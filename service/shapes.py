"""Array shapes in annotations, in the syntax of jaxtyping: `Float64[np.ndarray, "N K"]`.

Tests load jaxtyping, which checks every call against the annotations. A server does not check them and does not load
jaxtyping, whose import takes 0.1 s in each process.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float32, Float64, Int64, Num, UInt8, UInt16
else:

    class _Array:
        """Any array type of any shape."""

        def __class_getitem__(cls, array_and_shape: tuple[type, str]) -> type:
            return array_and_shape[0]

    Bool = Float32 = Float64 = Int64 = Num = UInt8 = UInt16 = _Array

__all__ = ["Bool", "Float32", "Float64", "Int64", "Num", "UInt8", "UInt16"]
