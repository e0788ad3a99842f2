"""What can be proved about an ONNX classifier: Lipschitz bounds, rounding error, certified radius.

numpy and onnx only; imports nothing else of this project.
"""

from service.certificate.analysis import Certificate, NodeReport, certify
from service.certificate.graph import UnsupportedGraphError
from service.certificate.norms import spectral_norm_bound
from service.certificate.radius import Radii, certified_radius, two_class_logits

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
