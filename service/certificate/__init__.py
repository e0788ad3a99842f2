"""What can be proved about an ONNX classifier: Lipschitz bounds, rounding error, certified radius.

numpy and onnx only; imports nothing else of this project.
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
    """`certify` comes with the rules and with onnx, which a process that proves nothing does not load."""
    if name != "certify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.certificate.analysis import certify

    return certify
