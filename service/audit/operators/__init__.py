"""One rule for each operator that computes: a matrix, or a map with a Lipschitz constant on the box."""

from service.audit.operators import activations, convolution, linear, piecewise, pooling, reductions, squares
from service.audit.operators.table import RULES

__all__ = ["RULES", "activations", "convolution", "linear", "piecewise", "pooling", "reductions", "squares"]
