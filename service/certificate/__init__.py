"""The mathematics of a certificate: Lipschitz bounds, rounding errors and radii of ONNX classifiers.

It proves a `Network`; bytes go through the reader first.
"""

from typing import TYPE_CHECKING, Any

from service.certificate.norms import spectral_norm_bound
from service.certificate.radius import Radii, certified_radius, pair_radii, two_class_logits
from service.certificate.reference import reference_cost, reference_radii
from service.certificate.statement import Certificate, NodeReport
from service.network.operators import UnsupportedModelError

if TYPE_CHECKING:
    from service.certificate.analysis import certify

__all__ = [
    "Certificate",
    "NodeReport",
    "Radii",
    "UnsupportedModelError",
    "certified_radius",
    "certify",
    "pair_radii",
    "reference_cost",
    "reference_radii",
    "spectral_norm_bound",
    "two_class_logits",
]


def __getattr__(name: str) -> Any:
    """Return `certify`, imported on its first use: a process that proves nothing loads neither the rules nor onnx."""
    if name != "certify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from service.certificate.analysis import certify

    return certify
