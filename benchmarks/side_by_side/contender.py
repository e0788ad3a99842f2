"""One ONNX file in the comparison, whoever made it: proved by the certifier, run and differentiated by torch.

Axes: N batch, C H W image, K classes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from jaxtyping import Float64

from benchmarks.side_by_side.in_torch import GraphInTorch
from service.artefact import Card, InputShape, digest
from service.certificate import Radii, certified_radius, certify, two_class_logits
from service.classifier import Classifier
from service.engine import Engine, GraphError

BATCH = 25
"""Images at once: what lies between two convolutions then stays in the cache."""
CHECKED = 64
"""Random images on which torch and ONNX Runtime are compared."""


class DisagreementError(Exception):
    """Torch and ONNX Runtime differ by more than the proved error of both."""


class Contender(Classifier):
    """What `models.attacks` needs of a classifier, for a file without `transport.onnx`.

    Both libraries' files go this way, so that one code evaluates, proves and attacks them. A float64 convolution has no
    kernel in ONNX Runtime's CPU provider; where the runtime can run the file, both must agree within the proved error.
    """

    def __init__(self, model: Path, labels: tuple[str, ...]) -> None:  # pyright: ignore[reportMissingSuperCall]
        """Read and prove `model`.

        Raises:
            UnsupportedGraphError: there is no proof.
            UnknownOperatorError: torch cannot run it here.
            DisagreementError: see its docstring.
        """
        content = model.read_bytes()
        self.certificate = certify(content)
        self.digest = digest(content)
        self.labels = labels
        self.name = model.parent.name
        channels, height, width = self.certificate.input_shape
        self.input_shape = (channels, height, width)
        shape = InputShape(channels=channels, height=height, width=width)
        self.card = Card(name=self.name, labels=list(labels), input=shape)
        self.provider = "torch"
        self._graph = GraphInTorch(content).eval()
        self._compare(content)
        self.parameters = _count(content)
        """Numbers in weights and biases."""

    def classify(
        self, image_NCHW: Float64[np.ndarray, "N C H W"], resize: bool = False
    ) -> tuple[Float64[np.ndarray, "N K"], Radii]:
        """Logits and proved radii."""
        del resize
        with torch.no_grad():
            parts = torch.from_numpy(np.ascontiguousarray(image_NCHW)).split(BATCH)
            raw_NK = torch.cat([self._graph(part) for part in parts]).numpy()
        logits_NK = two_class_logits(raw_NK) if raw_NK.shape[1] == 1 else raw_NK
        certificate = self.certificate
        return logits_NK, certified_radius(logits_NK, certificate.margin_bounds_KK, certificate.logit_error)

    def margin_gradient(
        self,
        image_NCHW: Float64[np.ndarray, "N C H W"],
        weights_NK: Float64[np.ndarray, "N K"],
        resize: bool = False,
    ) -> tuple[Float64[np.ndarray, "N K"], Float64[np.ndarray, "N C H W"]]:
        """Logits, and the gradient of `sum_k weights[k] logits[k]` with respect to the image."""
        del resize
        images = torch.from_numpy(np.ascontiguousarray(image_NCHW)).split(BATCH)
        weights = torch.from_numpy(np.ascontiguousarray(weights_NK)).split(BATCH)
        pairs = [self._gradient(image, weight) for image, weight in zip(images, weights, strict=True)]
        logits_NK, gradient_NCHW = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
        return logits_NK, gradient_NCHW

    def _gradient(self, image: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variable = image.detach().clone().requires_grad_()
        with torch.enable_grad():
            logits = self._graph(variable)
            logits = torch.cat([logits, -logits], 1) if logits.shape[1] == 1 else logits
            (gradient,) = torch.autograd.grad((logits * weights).sum(), variable)
        return logits.detach(), gradient

    def _compare(self, content: bytes) -> None:
        try:
            engine = Engine(content, "cpu", 1)
        except GraphError:
            return
        image_NCHW = np.random.default_rng(0).random((CHECKED, *self.input_shape))
        (expected_NK,) = engine.run(engine.output_names[:1], {engine.input_names[0]: image_NCHW})
        with torch.no_grad():
            computed_NK = self._graph(torch.from_numpy(image_NCHW)).numpy()
        difference, allowed = float(np.abs(expected_NK - computed_NK).max()), 2 * self.certificate.logit_error
        if not difference <= allowed:
            raise DisagreementError(
                f"{self.name}: torch and ONNX Runtime differ by {difference:.3g}, allowed is {allowed:.3g}"
            )


def _count(content: bytes) -> int:
    tensors = onnx.load_from_string(content).graph.initializer
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    return sum(int(np.prod(tensor.dims)) for tensor in tensors if tensor.data_type in floats)
