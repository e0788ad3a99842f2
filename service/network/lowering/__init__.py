"""How each ONNX operator, in the forms that opsets 7 and later gave it, is read; importing fills the table."""

from service.network.lowering import elementwise, linear, rearrangements, reductions, resampling, windows
from service.network.lowering.table import LOWERINGS

MODULES = (elementwise, linear, rearrangements, reductions, resampling, windows)

__all__ = ["LOWERINGS", "MODULES"]
