"""The certificate of a classifier: plain data, which needs no ONNX library."""

from dataclasses import dataclass, replace

import numpy as np

from service.certificate.margins import Margins, margins_behind
from service.certificate.rounding import add_up, mul_up

MOST_TABLED_CLASSES = 256


@dataclass(frozen=True)
class NodeReport:
    """Bounds that are proved up to one node."""

    node: str
    """Operator and name."""
    lipschitz_bound: float
    """L2 Lipschitz bound of the map from the image to this node's output."""
    error: float
    """Bound of the L2 norm of computed minus exact output."""
    theorem: str
    """First line of the theorem that gave the bound."""


@dataclass(frozen=True)
class Certificate:
    """Bounds of one classifier for every image in [0, 1]^d.

    Axes: K classes; a graph with one output counts as two, see `two_class_logits`.
    """

    input_shape: tuple[int, ...]
    """Without the batch axis, e.g. `(C, H, W)`."""
    n_outputs: int
    """Outputs of the graph; 1 means a binary model with logits `(f, -f)`."""
    precision: str
    """`float64` or `float32`: the arithmetic of the graph."""
    lipschitz_bound: float
    """Upper bound of the L2 Lipschitz constant of the map from the image to the graph's outputs."""
    margin_bounds_KK: Margins
    """`K_ij`: upper bounds of the L2 Lipschitz constants of `f_i - f_j`.

    An array of at most `MOST_TABLED_CLASSES` classes; of more, rows that are computed when they are asked for.
    """
    logit_error: float
    """`E >= |computed logit - exact logit|`, any order of summation, the rounding of the input included."""
    nodes: tuple[NodeReport, ...]

    def margin_table(self) -> list[list[float | None]] | None:
        """Return `margin_bounds_KK` as lists; null above `MOST_TABLED_CLASSES` classes, where an answer states its own.

        A thousand classes are a million numbers, of which a radius needs one row.
        """
        return self.margin_bounds_KK.tolist() if isinstance(self.margin_bounds_KK, np.ndarray) else None

    def after_preprocessing(self, norm: float, error_l2: float) -> "Certificate":
        """Return the certificate of this classifier behind a map of L2 Lipschitz bound `norm`.

        Args:
            norm: proved bound of the preprocessing, from the image that was sent to the graph's input.
            error_l2: bound of the L2 norm of the computed minus the exact input of the graph, in [0, 1] pixel units.
        """
        return replace(
            self,
            lipschitz_bound=mul_up(self.lipschitz_bound, norm),
            margin_bounds_KK=margins_behind(self.margin_bounds_KK, norm),
            logit_error=add_up(self.logit_error, mul_up(self.lipschitz_bound, error_l2)),
        )
