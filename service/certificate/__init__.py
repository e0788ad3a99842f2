"""The mathematics of a certificate: Lipschitz bounds, rounding errors and radii of ONNX classifiers.

It needs numpy and onnx alone; of this project it imports only how shapes are written.
"""

from typing import TYPE_CHECKING, Any

from service.certificate.norms import spectral_norm_bound
from service.certificate.radius import Radii, certified_radius, two_class_logits
from service.certificate.statement import Certificate, NodeReport, UnsupportedGraphError

if TYPE_CHECKING:
    from service.certificate.analysis import certify

__all__ = [
    "Certificate",
    "NodeReport",
    "Radii",
    "UnsupportedGraphError",
    "certified_radius",
    "certify",
    "spectral_norm_bound",
    "two_class_logits",
]


def __getattr__(name: str) -> Any:
    """Return `certify`, imported on its first use: a process that proves nothing loads neither the rules nor onnx."""
    if name != "certify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.certificate.analysis import certify

    return certify
