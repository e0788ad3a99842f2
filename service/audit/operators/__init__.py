"""One rule for each operator that computes: a matrix, or a map that never expands."""

from service.audit.operators import convolution, linear, piecewise, pooling, reductions
from service.audit.operators.table import RULES

__all__ = ["RULES", "convolution", "linear", "piecewise", "pooling", "reductions"]
