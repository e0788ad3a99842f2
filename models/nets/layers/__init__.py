"""Layers whose Lipschitz constant in the Euclidean norm is known, and their ONNX nodes.

Each layer states its constant in `lipschitz_constant`; all are 1 except that of `Normalize`, and a composition has at
most the product. That is the claim of the trainer; `service.certificate` proves the bound from the exported bytes.

A layer emits its forward nodes alone. Its gradient is derived from `model.onnx` by `service.network`, and the export
compares it with torch's autograd.

Weights are trained in float32 through a parametrisation. `fold()` gives the layer that is served: the
parametrisation evaluated in float64, rounded to float32, held in float64.

Axes: N batch, C channels, H height, W width (A, B after pooling), D features, K classes, P pixels (H * W), O outputs.
"""
